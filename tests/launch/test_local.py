"""Processes of one machine: what each is given, and what happens when one ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.conftest import Launch, words

# As launch/local.py, but impatient.
IMPATIENT = """
import sys
sys.path.insert(0, "launch")
import local
local.LEFT_SECONDS = 1
sys.exit(local.main(sys.argv[1:]))
"""


def settings(run: subprocess.CompletedProcess[str]) -> list[dict[str, str]]:
    """The variables of each process of a dry run."""
    assert run.returncode == 0, run.stderr
    found = []
    for program, *line in words(run.stdout):
        assert program == "env" and line[-2:] == ["lara", "train"]
        found.append(dict(word.split("=", 1) for word in line[:-2]))
    return found


def test_processes_find_each_other(launch: Launch) -> None:
    given = settings(launch("local.py", "-n", "3", "--dry-run", "--", "lara", "train"))
    assert [one["LARA_PROCESS_ID"] for one in given] == ["0", "1", "2"]
    assert {one["LARA_PROCESS_COUNT"] for one in given} == {"3"}
    [address] = {one["JAX_COORDINATOR_ADDRESS"] for one in given}
    host, port = address.split(":")
    assert host == "127.0.0.1" and 1024 <= int(port) < 65536


def test_cpu_devices(launch: Launch) -> None:
    call = ("local.py", "-n", "2", "--devices-per-process", "4", "--dry-run", "--", "lara", "train")
    for one in settings(launch(*call, XLA_FLAGS="--xla_a=1", CUDA_VISIBLE_DEVICES="0,1")):
        assert one["JAX_PLATFORMS"] == "cpu"
        first, devices, *_ = one["XLA_FLAGS"].split()
        assert first == "--xla_a=1"
        assert devices == "--xla_force_host_platform_device_count=4"


def test_gpus_are_shared_out(launch: Launch) -> None:
    call = ("local.py", "-n", "2", "--dry-run", "--", "lara", "train")
    given = settings(launch(*call, CUDA_VISIBLE_DEVICES="0,2,5,7"))
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["0,2", "5,7"]
    assert all("JAX_PLATFORMS" not in one for one in given)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-n", "0", "--", "lara"], "'0' is no whole number from 1"),
        (["-n", "2"], "the following arguments are required: command"),
        (["-n", "2", "--", "lara"], "3 GPUs (0,1,2) are no multiple of -n 2"),
    ],
)
def test_a_wrong_call(launch: Launch, arguments: list[str], told: str) -> None:
    run = launch("local.py", *arguments, CUDA_VISIBLE_DEVICES="0,1,2")
    assert run.returncode == 2
    assert told in run.stderr.splitlines()[-1]


def run_shell(
    repository: Path, script: str, *, processes: int = 2, options: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Processes that run a script; their number is $LARA_PROCESS_ID."""
    command = [sys.executable, "-c", IMPATIENT, "-n", str(processes), "--devices-per-process", "1"]
    return subprocess.run(
        [*command, *options, "--", "sh", "-c", script],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_output_says_whose_it_is(repository: Path) -> None:
    script = "echo out $LARA_PROCESS_ID; printf '1/2\\r2/2\\rend' >&2"
    run = run_shell(repository, script)
    assert run.returncode == 0
    assert sorted(run.stdout.splitlines()) == ["[0] out 0", "[1] out 1"]
    for number in (0, 1):
        assert f"[{number}] 2/2" in run.stderr
        assert f"[{number}] end\n" in run.stderr


def test_a_wrong_command_is_not_repeated(repository: Path) -> None:
    run = run_shell(repository, "exit 2")
    assert run.returncode == 2
    assert "again" not in run.stderr


def test_all_start_again_when_one_fails(repository: Path, tmp_path: Path) -> None:
    """Process 1 fails at first; process 0 does not notice, and is killed."""
    script = f"""
        echo $LARA_PROCESS_ID >>{tmp_path}/starts
        [ "$(grep -c $LARA_PROCESS_ID {tmp_path}/starts)" = 1 ] || exit 0
        [ $LARA_PROCESS_ID = 0 ] || exit 3
        sleep 60
    """
    run = run_shell(repository, script)
    assert run.returncode == 0, run.stderr
    assert "process 1 ended with status 3; still running: 0" in run.stderr
    assert "killing what has not ended: process 0" in run.stderr
    assert run.stderr.count("starting all processes again, 1 of 10 times") == 1
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "0", "1", "1"]


def test_restarts_are_limited(repository: Path, tmp_path: Path) -> None:
    run = run_shell(
        repository,
        f"echo >>{tmp_path}/starts; kill -9 $$",
        processes=1,
        options=["--restarts", "2"],
    )
    assert run.returncode == 128 + signal.SIGKILL
    assert "process 0 was ended by SIGKILL" in run.stderr
    assert len((tmp_path / "starts").read_text()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_reaches_all(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """They take as long as they need, and are not started again."""
    script = f"""
        trap 'sleep 2; echo saved; exit 1' TERM
        touch {tmp_path}/$LARA_PROCESS_ID
        while :; do sleep 0.05; done
    """
    launcher = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, "-n", "2", "--", "sh", "-c", script],
        cwd=repository,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.01)
    launcher.send_signal(number)
    out, told = launcher.communicate(timeout=60)
    assert launcher.returncode == 1, told
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]
    assert "again" not in told
