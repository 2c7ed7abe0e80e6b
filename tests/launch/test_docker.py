"""Images: what the Dockerfiles copy exists, and processes are not root's."""

import re
from pathlib import Path

import pytest

from tests.launch.conftest import Launch, Programs, refused, words

DOCKERFILES = ("Dockerfile.tpu", "Dockerfile.cuda")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in lines]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_sent(repository: Path, name: str) -> None:
    sent = {
        line[1:]
        for line in (repository / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    sources = [
        source
        for instruction, arguments in instructions(repository / "launch/docker" / name)
        if instruction == "COPY"
        for source in arguments.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (repository / source).exists(), source
        assert source.split("/")[0] in sent, f".dockerignore keeps {source} back"
    assert {source.split("/")[0] for source in sources} == sent


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_installed_is_pinned_and_copied_first(repository: Path, name: str) -> None:
    copied: set[str] = set()
    installed = []
    for instruction, arguments in instructions(repository / "launch/docker" / name):
        if instruction == "COPY":
            copied.update(arguments.split()[:-1])
        installed += re.findall(r"-r (\S+)", arguments) if instruction == "RUN" else []
        if instruction == "RUN" and "pip install" in arguments:
            files = re.findall(r"-r (\S+)", arguments)
            assert set(files) <= copied
            assert files or "--no-deps --editable ." in arguments
    extra = "tpu" if name.endswith("tpu") else "gpu"
    assert installed == ["requirements.txt", f"requirements/{extra}.txt", "requirements/cloud.txt"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_processes_are_not_roots(repository: Path, name: str) -> None:
    steps = instructions(repository / "launch/docker" / name)
    assert ("ARG", "RUN_AS=lara") in steps
    assert [arguments for instruction, arguments in steps if instruction == "USER"] == ["$RUN_AS"]


def test_build(launch: Launch, programs: Programs, repository: Path) -> None:
    arguments = [
        "docker/build.sh",
        "cuda",
        "us-docker.pkg.dev/p/r/lara:1",
        "--user",
        "root",
        "--push",
    ]
    run = launch(*arguments, "--dry-run")
    assert words(run.stdout) == [
        [
            *("docker", "build", "--platform=linux/amd64"),
            f"--file={repository}/launch/docker/Dockerfile.cuda",
            *("--build-arg=RUN_AS=root", "--tag=us-docker.pkg.dev/p/r/lara:1", str(repository)),
        ],
        ["docker", "push", "us-docker.pkg.dev/p/r/lara:1"],
    ]
    assert programs.calls() == []
    assert launch(*arguments).returncode == 0
    assert programs.calls() == words(run.stdout)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rocm", "lara:1"], ["'rocm'", "tpu cuda"]),
        (["tpu"], ["IMAGE is missing"]),
        (["tpu", "Lara"], ["'Lara'", "HOST/PROJECT/NAME:TAG"]),
        (["tpu", "lara:1", "--user", "me"], ["'me'", "lara root"]),
        (["tpu", "lara:1", "--pull"], ["'--pull'", "--push"]),
    ],
)
def test_wrong_calls_are_named(launch: Launch, arguments: list[str], parts: list[str]) -> None:
    refused(launch("docker/build.sh", *arguments), parts)
