"""`launch/README.md`: its commands are calls that the launchers accept; scripts are sound."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configs import bridge_4b
from tests.launch.conftest import Launch

LAUNCHERS = ("tpu_vm.sh", "gke_xpk.sh", "jobset.py", "slurm.sbatch", "docker/build.sh", "local.py")
README = Path(__file__).parents[2] / "launch" / "README.md"


def commands() -> list[tuple[str, list[str]]]:
    """Launcher and arguments of every command in the page's blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    found = []
    for line in "".join(blocks).splitlines():
        words = shlex.split(line.replace("PROJECT", "project"), comments=True)
        for place, word in enumerate(words):
            name = word.removeprefix("launch/")
            if name in LAUNCHERS:
                found.append((name, words[place + 1 :]))
    return found


def test_every_launcher_is_shown() -> None:
    assert {name for name, _ in commands()} == set(LAUNCHERS)


@pytest.mark.parametrize(
    ("script", "arguments"), commands(), ids=[f"{n} {' '.join(a[:2])}" for n, a in commands()]
)
def test_a_command_of_the_page_is_a_right_call(
    launch: Launch, script: str, arguments: list[str]
) -> None:
    if arguments[:2] == ["sync", "pod"]:
        arguments = [*arguments, "--revision", "HEAD"]  # where there are uncommitted changes
    split = arguments.index("--") if "--" in arguments else len(arguments)
    dry = ["--dry-run"] if "--dry-run" not in arguments else []
    # sbatch's own options come first.
    before, after = (dry, []) if script == "slurm.sbatch" else ([], dry)
    run = launch(script, *before, *arguments[:split], *after, *arguments[split:])
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_a_key_of_the_page_is_one_of_the_recipe() -> None:
    keys = re.findall(r"--config\.([\w.]+)=", README.read_text())
    assert keys
    for key in keys:
        section = bridge_4b.get_config()
        for name in key.split("."):
            section = section[name]


def test_a_recipe_takes_no_more_than_ten_lines() -> None:
    for block in re.findall(r"^```bash\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL):
        assert len(block.splitlines()) <= 10


def test_shellcheck(repository: Path) -> None:
    folder = repository / "launch"
    scripts = sorted([*folder.rglob("*.sh"), *folder.rglob("*.sbatch")])
    assert len(scripts) >= 9
    run = subprocess.run(
        ["shellcheck", *(str(path.relative_to(repository)) for path in scripts)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
