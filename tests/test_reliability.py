"""What goes wrong in a long run: each is one clear line, an exit code, and no loss beyond the last
completed save. The model is that of `soak/tiny.py`; data, loop and checkpoints are the real ones.
"""

import errno
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lara_jax import checkpoint_files as files
from lara_jax import cli, metrics
from tests.soak import kill_many, tiny

Train = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"), 20)


@pytest.fixture
def train(data: Path, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`lara train` for six steps with a checkpoint every two; returns the exit code."""
    tiny.use_tiny_model(monkeypatch.setattr)

    def run(*overrides: str, path: Path = data, workdir: Path = tmp_path / "run") -> int:
        settings = [
            f"data.path={path}",
            "train.steps=6",
            "train.stages=action",
            "data.batch_size=4",
            "checkpoint.every_steps=2",
            "log.every_steps=1",
            *overrides,
        ]
        command = ["train", "--config", str(repository / "configs" / "debug.py")]
        command += ["--workdir", str(workdir), *(f"--config.{setting}" for setting in settings)]
        return cli.main(command)

    return run


def saved(tmp_path: Path) -> list[int]:
    """Checkpoints of the run that are whole."""
    root = tmp_path / "run" / "checkpoints"
    return [step for step in files.steps(root) if not files.damage(root / str(step))]


def wait_for_first(tmp_path: Path) -> None:
    """Returns when the checkpoint of step 2 is written, which happens beside the training."""
    end = time.monotonic() + 60
    while saved(tmp_path) != [2]:
        assert time.monotonic() < end, saved(tmp_path)
        time.sleep(0.01)


def told(capsys: Capture) -> list[str]:
    """Lines on standard error, without progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "step/s" not in line]


def test_sigterm_in_the_middle_of_a_step(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """The step is finished, saved, and not done again."""
    with monkeypatch.context() as trouble:
        tiny.at_step(trouble.setattr, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train() == 1
    assert saved(tmp_path)[-1] in (3, 4)  # the loop may be a step ahead of the devices
    last = saved(tmp_path)[-1]
    assert f"stopped at step {last} of 6; the same command goes on from there" in told(capsys)
    assert train() == 0
    assert saved(tmp_path)[-1] == 6
    assert any(f"resuming at step {last}" in line for line in told(capsys))


def test_sigterm_while_a_checkpoint_is_written(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """That one is completed, and a later step has its own; also if asked again meanwhile."""

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as trouble:
        for step in (2, 3, 4, 5, 6):  # whichever is saved
            tiny.in_save(trouble.setattr, step, terminate)
        assert train("checkpoint.keep=9") == 1
    first, *_, last = saved(tmp_path)
    assert first == 2 < last
    assert files.cut_off(tmp_path / "run" / "checkpoints") == {}
    assert any(f"stopped at step {last} of 6" in line for line in told(capsys))


@pytest.fixture
def disk() -> Iterator[Callable[[], None]]:
    """A function after which no file of this process can grow beyond 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_full_disk(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    disk: Callable[[], None],
) -> None:
    def fill() -> None:
        """Once the first checkpoint is written, which happens beside the training."""
        wait_for_first(tmp_path)
        disk()

    with monkeypatch.context() as trouble:
        tiny.at_step(trouble.setattr, 4, fill)
        assert train() == 1
    assert saved(tmp_path) == [2]
    line = told(capsys)[-1]
    root = tmp_path / "run" / "checkpoints"
    assert line == (
        f"lara train: checkpoint 4 cannot be written to {root}: File too large; "
        "checkpoint 2 is intact"
    )


@pytest.mark.parametrize("log", ["metrics.csv", "tensorboard"])
def test_a_disk_that_is_full_for_another_file(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, log: str
) -> None:
    """The last line names the file and the checkpoint, and no thread leaves a traceback."""
    name, method = ("CsvTable", "write") if log == "metrics.csv" else ("Board", "add")
    real = getattr(getattr(metrics, name), method)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    root = tmp_path / "run" / "checkpoints"

    def full(*args: Any, **options: Any) -> None:
        """Once the first checkpoint is there, and before another one is begun."""
        if not (files.steps(root) or files.cut_off(root)):
            return real(*args, **options)
        wait_for_first(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            return real(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(getattr(metrics, name), method, full)
    assert train("train.steps=40", "checkpoint.every_steps=2") == 1
    lines = told(capfd)
    assert not any("Traceback" in line for line in lines)
    start, end = f"lara train: {tmp_path / 'run' / log}", " cannot be written: File too large; "
    assert lines[-1].startswith(start) and end in lines[-1]
    assert re.search(r"; checkpoint \d+ is intact$", lines[-1])


def test_a_run_starts_without_a_temporary_file(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full /tmp is not its concern."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    assert train("train.steps=1") == 0


def test_a_directory_that_takes_no_files(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Nothing is trained first: the run ends before it starts."""
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    # The file system is asked, since the superuser may write whatever a mode says.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert train() == 1
    (line,) = told(capsys)
    assert line == (
        f"lara train: checkpoints cannot be written to {root}: {root} is not writable; "
        "there is no checkpoint yet"
    )


def test_a_deleted_shard_of_data(data: Path, train: Train, tmp_path: Path, capsys: Capture) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    assert train("train.steps=2", path=copy) == 0
    (shard, _) = sorted(copy.rglob("*.tfrecord*"))
    shard.unlink()
    capsys.readouterr()
    assert train(path=copy) == 2
    (line,) = told(capsys)
    assert line.startswith(f"lara train: {shard} is missing")
    assert saved(tmp_path) == [2]


def test_a_truncated_checkpoint(train: Train, tmp_path: Path, capsys: Capture) -> None:
    """The run stops if asked to, and else goes on from the one before, saying so."""
    assert train() == 0
    newest = tmp_path / "run" / "checkpoints" / "6"
    content = max((newest / "training").rglob("*"), key=lambda file: file.stat().st_size)
    whole = files.damage(newest)
    os.truncate(content, content.stat().st_size // 2)
    assert whole == []
    capsys.readouterr()

    assert train("checkpoint.on_damage=error") == 2
    (line,) = told(capsys)
    assert f"{newest} is damaged: training/" in line and "is cut off" in line
    assert "checkpoint 4 is whole" in line

    assert train() == 0
    lines = told(capsys)
    assert lines[0].startswith(f"checkpoint {newest} is damaged: training/")
    assert lines[0].endswith("going on from checkpoint 4 instead")
    assert any("resuming at step 4 " in line for line in lines)
    assert saved(tmp_path) == [4, 6]


@pytest.mark.slow
def test_kills_leave_no_trace(tmp_path: Path) -> None:
    """`python -m tests.soak.kill_many --kills 50` is the long version."""
    found = kill_many.soak(tmp_path, kills=2, seed=1, model="tiny", samples=120, seconds=0.05)
    assert found["differences"] == []
    assert found["kills"] == 2 and found["kills_while_saving"] >= 1
