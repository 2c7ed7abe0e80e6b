"""Several processes of `lara train`, started by launch/local.py, do what one does.

The model is that of `soak/tiny.py`. Everything else is what runs on a pod: the command, how the
processes join, their part of the data, their part of a checkpoint, how they end and start again.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import pytest
from jax._src import xla_bridge

from lara_jax import checkpoint_files as files
from lara_jax import cluster
from lara_jax.checkpoint import difference, load_params
from tests.soak import tiny

STEPS, BATCH, EVERY = 8, 8, 2
SETTINGS = (
    "train.stages=latent_2",
    f"train.steps={STEPS}",
    f"data.batch_size={BATCH}",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.keep=9",
    "log.every_steps=1",
    "optimizer.epsilon=1e-3",
    "teacher.momentum=0.5",
)
# Both wait for less than they do: the test is of what follows.
LAUNCHER = """
import sys
sys.path.insert(0, "launch")
import local
local.LEFT_SECONDS = 10
sys.exit(local.main(sys.argv[1:]))
"""
CHILD = """
import os, sys
from pathlib import Path

from data_pipelines.sampling import StepSource
from lara_jax import cli, cluster
from tests.soak import tiny

folder, seconds, *arguments = sys.argv[1:]
number = os.environ[cluster.NUMBER]
cluster.HEARTBEAT_SECONDS = 6
Path(folder, f"pid.{number}").write_text(str(os.getpid()))
tiny.use_tiny_model(setattr)
tiny.log_batches(setattr, Path(folder, f"ids.{number}"), float(seconds))
read_frames = StepSource.read_frames

def log_frames(self, pixels, frames, at):
    read_frames(self, pixels, frames, at)
    with open(Path(folder, f"frames.{number}"), "a") as file:
        file.write(f"{' '.join(map(str, frames[at, 0, 0].tolist()))}\\n")

StepSource.read_frames = log_frames
sys.exit(cli.main(arguments))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"), 20)


class Run:
    """A folder of runs' files, and the launcher that trains there."""

    def __init__(self, folder: Path, data: Path, repository: Path, *, restarts: int = 0) -> None:
        self.folder, self.workdir = folder, folder / "run"
        self._data, self._repository, self._restarts = data, repository, restarts
        self._told = folder / "stderr.txt"
        folder.mkdir(exist_ok=True)

    def start(
        self, processes: int, *, devices: int = 1, seconds: float = 0.0
    ) -> "subprocess.Popen[bytes]":
        """So many processes with so many devices each; a step takes at least so long."""
        train = ["train", "--config", "configs/debug.py", "--workdir", str(self.workdir)]
        settings = [f"--config.{key}" for key in (f"data.path={self._data}", *SETTINGS)]
        launcher = [sys.executable, "-c", LAUNCHER, "-n", str(processes)]
        launcher += ["--devices-per-process", str(devices), "--restarts", str(self._restarts)]
        child = [sys.executable, "-c", CHILD, str(self.folder), str(seconds)]
        with self._told.open("wb") as stderr:
            return subprocess.Popen(
                [*launcher, "--", *child, *train, *settings], cwd=self._repository, stderr=stderr
            )

    def train(self, processes: int, devices: int = 1) -> "Run":
        """To its end."""
        assert self.start(processes, devices=devices).wait(timeout=240) == 0, self.told()[-3000:]
        return self

    def told(self) -> str:
        return self._told.read_text(errors="replace")

    def newest(self) -> int:
        return max(files.steps(self.workdir / "checkpoints"), default=0)

    def ids(self, number: int) -> dict[int, list[int]]:
        """Sample ids of a process by step; of a step that was done again, the last time."""
        file = self.folder / f"ids.{number}"
        lines = [line.partition(": ") for line in file.read_text().splitlines()]
        return {int(step): [int(x) for x in ids.split()] for step, _, ids in lines}

    def frames(self, number: int) -> list[list[int]]:
        """Frames that a process has read of its first camera, one for each sample, by batch."""
        lines = (self.folder / f"frames.{number}").read_text().splitlines()
        return [[int(x) for x in line.split()] for line in lines]

    def has_taken(self, step: int) -> bool:
        """Whether process 1 has the batch of a step, and one of the two saves before is there."""
        there = (self.folder / "ids.1").is_file()
        saved = max(EVERY, step - 2 * EVERY)
        return there and max(self.ids(1), default=0) >= step and self.newest() >= saved

    def has_told(self, pattern: str, times: int) -> bool:
        return len(re.findall(pattern, self.told())) >= times

    def pid(self, number: int) -> int:
        return int((self.folder / f"pid.{number}").read_text())


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Run:
    """One process with one device."""
    return Run(tmp_path_factory.mktemp("alone"), data, repository).train(1)


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Run:
    """Two processes, undisturbed."""
    return Run(tmp_path_factory.mktemp("two"), data, repository).train(2)


@pytest.mark.slow
def test_two_processes_train_to_the_parameters_of_one(alone: Run, two: Run) -> None:
    assert difference(load_params(two.workdir), load_params(alone.workdir))[0] < 1e-5


@pytest.mark.slow
def test_each_process_reads_its_part_only(alone: Run, two: Run) -> None:
    whole, parts = alone.ids(0), [two.ids(0), two.ids(1)]
    assert whole.keys() == parts[0].keys() == parts[1].keys() == set(range(1, STEPS + 1))
    for step, ids in whole.items():
        own = [part[step] for part in parts]
        assert [len(part) for part in own] == [BATCH // 2] * 2
        assert not set(own[0]) & set(own[1])
        assert own[0] + own[1] == ids
    # Also what a process has read ahead is not of the other's part.
    read = [two.frames(number) for number in (0, 1)]
    assert all(len(frames) == BATCH // 2 for part in read for frames in part)
    first, second = ({frame for frames in part for frame in frames} for part in read)
    assert min(len(first), len(second)) >= STEPS * BATCH // 2
    assert not first & second


@pytest.mark.slow
def test_only_the_first_process_tells_how_the_run_goes_on(two: Run) -> None:
    told = two.told().splitlines()
    assert any(line == "[0] 2 processes, 2 devices" for line in told)
    assert any("[0] starting from random parameters" in line for line in told)
    # Libraries warn wherever something is slow: that is not of the run.
    assert not [line for line in told if line.startswith("[1] ") and "WARNING:" not in line]


@pytest.mark.slow
def test_four_processes_go_on_with_what_two_saved(
    alone: Run, two: Run, data: Path, repository: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "four", data, repository)
    shutil.copytree(two.workdir, run.workdir)
    for step in range(2 * EVERY, STEPS + 1, EVERY):
        shutil.rmtree(run.workdir / "checkpoints" / str(step))
    run.train(4)
    assert f"resuming at step {EVERY} " in run.told()
    assert difference(load_params(run.workdir), load_params(alone.workdir))[0] < 1e-5
    parts = [run.ids(number)[STEPS] for number in range(4)]
    assert [len(part) for part in parts] == [BATCH // 4] * 4
    assert [x for part in parts for x in part] == alone.ids(0)[STEPS]


@pytest.mark.slow
def test_a_killed_and_a_stopped_process_leave_no_trace(
    two: Run, data: Path, repository: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "disturbed", data, repository, restarts=2)
    launcher = run.start(2, seconds=0.3)
    seconds = []
    for number, (trouble, step) in enumerate(((signal.SIGKILL, 3), (signal.SIGSTOP, 6)), start=1):
        wait_until(partial(run.has_told, r"\[0\] resuming at step ", number - 1))
        wait_until(partial(run.has_taken, step))
        os.kill(run.pid(1), trouble)
        start = time.monotonic()
        wait_until(partial(run.has_told, r"local.py: process 0 (was )?ended", number))
        seconds.append(time.monotonic() - start)
        wait_until(partial(run.has_told, "starting all processes again", number))
    assert launcher.wait(timeout=240) == 0, run.told()[-3000:]
    assert max(seconds) < 60
    told = run.told()
    assert "local.py: process 1 was ended by SIGKILL; still running: 0" in told
    assert "local.py: killing what has not ended: process 1" in told
    # The connection to the first may break before its heartbeats are missed.
    broken = told.count("is another process gone?")
    assert told.count("Terminating process because the JAX distributed service") >= 2 - broken
    assert "tasks are unhealthy (stopped sending heartbeats):\n[0] 1\n" in told
    assert told.count("[0] resuming at step ") == 2
    assert difference(load_params(run.workdir), load_params(two.workdir))[0] == 0
    for number in (0, 1):
        assert run.ids(number) == two.ids(number)


def run_python(script: str, repository: Path, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=repository,
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )


HANG = """
import time
from lara_jax.cluster import Watch

class Step:
    def __init__(self, seconds):
        self.end = time.monotonic() + seconds

    def is_ready(self):
        return time.monotonic() > self.end

with Watch(1.0, 4) as watch:
    watch.new_program()
    for step in (5, 6):
        watch.handing()
        time.sleep(1.5 * (step == 5))  # it is compiled
        watch.handed(step, Step(0.5))
        time.sleep(1.5)  # between steps nothing is looked at
    watch.handing()
    LAST
    time.sleep(50)
"""


@pytest.mark.parametrize("last", ["", "watch.handed(7, Step(100))"])
def test_a_step_that_never_ends_ends_the_process(repository: Path, last: str) -> None:
    """Where devices run a step while it is handed to them, and where they do so later."""
    process = run_python(HANG.replace("LAST", last), repository)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    line = "lara train: no step has finished for 1 s (config.train.hang_seconds); the last one was "
    assert told.startswith(line + "step 6. This process ends;"), told


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({cluster.NUMBER: "0"}, "LARA_PROCESS_COUNT='', LARA_PROCESS_ID='0'; allowed: HOST:PORT"),
        (
            {cluster.ADDRESS: "host:1", cluster.COUNT: "2", cluster.NUMBER: "2"},
            "LARA_PROCESS_ID is 2; allowed: 0 to LARA_PROCESS_COUNT - 1, 1",
        ),
        (
            {cluster.ADDRESS: "host", cluster.COUNT: "2", cluster.NUMBER: "1"},
            "JAX_COORDINATOR_ADDRESS='host', LARA_PROCESS_COUNT='2'",
        ),
        (
            {cluster.ADDRESS: "host:1"},
            "cannot join its cluster: Number of processes must be defined. "
            "(JAX_COORDINATOR_ADDRESS is 'host:1'",
        ),
        ({**SLURM, "SLURM_NTASKS": "two"}, "SlurmCluster'>) are wrong: invalid literal"),
    ],
)
def test_wrong_settings_are_errors(
    variables: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=re.escape(told)):
        cluster.join()


def test_a_machine_on_its_own_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.join()
    for name, value in {**SLURM, "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    cluster.join()
    assert not jax.distributed.is_initialized()


def test_a_cluster_that_jax_finds_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, int]] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    cluster.join()
    assert calls == [{"heartbeat_timeout_seconds": cluster.HEARTBEAT_SECONDS}]
    assert cluster.HEARTBEAT_SECONDS + cluster.CLOSING_SECONDS < 60


FAILING = """
import sys, time
import jax
from lara_jax import cluster

cluster.join()
with cluster.Membership():
    if jax.process_index() == 1:
        raise ValueError(ERROR)
    time.sleep(100)
"""


@pytest.mark.parametrize(
    ("error", "status", "hint"),
    [
        ("wrong data", 2, ""),
        ("UNKNOWN: Gloo all-reduce failed: reset", 1, "; is another process gone?"),
    ],
)
def test_an_error_ends_a_process_that_others_wait_for(
    repository: Path, error: str, status: int, hint: str
) -> None:
    """Without waiting for them, as JAX would: the other one sleeps."""
    script = FAILING.replace("ERROR", repr(error))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [
        run_python(
            script,
            repository,
            **{cluster.ADDRESS: address, cluster.COUNT: "2", cluster.NUMBER: str(number)},
        )
        for number in (0, 1)
    ]
    _, told = both[1].communicate(timeout=30)
    both[0].kill()
    both[0].communicate()
    assert both[1].returncode == status
    assert told.endswith(f"lara train: process 1 of 2: ValueError: {error}{hint}\n"), told
