"""Launchers as processes, and stand-ins for the programs they call.

A stand-in writes down the arguments it got and ends with a status of choice. So a dry run's lines
can be held against what the same call really runs.
"""

import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

Launch = Callable[..., subprocess.CompletedProcess[str]]
PROGRAMS = ("gcloud", "xpk", "kubectl", "docker", "srun", "scontrol", "sudo", "curl")


class Programs:
    """A folder of stand-ins, first in the PATH, and what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls"
        for name in PROGRAMS:
            self.write(name, status=0)

    def write(self, name: str, *, status: int) -> None:
        """Makes `name` note its arguments, a NUL after each, and end with `status`.

        What is piped into it is read, since a writer whose reader has gone fails.
        """
        script = self.folder / name
        noted = f"{{ printf '%s\\0' {name} \"$@\"; echo; }} >>{shlex.quote(str(self.log))}"
        piped = "[ ! -p /dev/stdin ] || cat >/dev/null"
        script.write_text(f"#!/bin/bash\n{noted}\n{piped}\nexit {status}\n")
        script.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """Each call's words, the program first."""
        if not self.log.exists():
            return []
        return [line.split("\0")[:-1] for line in self.log.read_text().splitlines()]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """The stand-ins of one test."""
    folder = tmp_path / "programs"
    folder.mkdir()
    return Programs(folder)


@pytest.fixture
def launch(repository: Path, programs: Programs) -> Launch:
    """Calls `launch/SCRIPT ARGUMENTS...` with the stand-ins and without flags of the caller's."""

    def call(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        kept = {"HOME": os.environ["HOME"], "PATH": f"{programs.folder}:{os.environ['PATH']}"}
        program = "python" if script.endswith(".py") else "bash"
        return subprocess.run(
            [program, str(repository / "launch" / script), *arguments],
            env=kept | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return call


def words(output: str) -> list[list[str]]:
    """A dry run's lines as a shell reads them, comments left out."""
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


def refused(run: subprocess.CompletedProcess[str], parts: Sequence[str]) -> None:
    """Asserts a wrong call: status 2, nothing printed, one line that holds all `parts`."""
    assert run.returncode == 2, run.stdout + run.stderr
    assert run.stdout == ""
    lines = run.stderr.splitlines()
    assert len(lines) == 1, run.stderr
    for part in parts:
        assert part in lines[0]
