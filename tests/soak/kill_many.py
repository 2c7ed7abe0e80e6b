"""Kills a training run again and again with SIGKILL, and checks that nothing shows in the end.

    python -m tests.soak.kill_many --kills 50 --seed 0

Every second kill comes when a checkpoint is being written, the others at a random time, also while
a run starts. Between kills the same command is run again. In the end, compared with a run that was
left alone: parameters, optimizer, teacher and the rest of the state are the same to the last bit,
the rows of metrics are the same, and each sample of the data was used exactly once by the steps
that count. Prints one line of JSON, and exits with 1 if anything differs.

`--model debug` takes the networks of configs/debug.py; by default they are those of `tiny.py`.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lara_jax import checkpoint_files as files
from tests.soak import tiny

REPOSITORY = Path(__file__).resolve().parents[2]
BATCH = 4
EVERY_STEPS = 3
CLOCK = ("samples_per_second", "data_wait_fraction", "mfu", "device_memory_gb")
CHILD = """
import sys
from pathlib import Path
from lara_jax import cli
from tests.soak import tiny

model, ids, step_seconds, *arguments = sys.argv[1:]
if model == "tiny":
    tiny.use_tiny_model(setattr)
tiny.log_batches(setattr, Path(ids), float(step_seconds))
sys.exit(cli.main(arguments))
"""


class Run:
    """A run's directory, and the command that starts it or goes on with it."""

    def __init__(self, folder: Path, data: Path, *, model: str, steps: int, seconds: float) -> None:
        self.workdir, self.ids = folder / "run", folder / "ids.txt"
        self.root = self.workdir / "checkpoints"
        folder.mkdir()
        self._stderr = folder / "stderr.txt"
        self._lines_before = 0
        self._command = [
            sys.executable,
            *("-c", CHILD, model, str(self.ids), str(seconds)),
            *("train", "--config", "configs/debug.py", "--workdir", str(self.workdir)),
            f"--config.data.path={data}",
            f"--config.train.steps={steps}",
            "--config.train.stages=action",
            f"--config.data.batch_size={BATCH}",
            f"--config.checkpoint.every_steps={EVERY_STEPS}",
            "--config.log.every_steps=1",
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """Starts or goes on; standard error is kept."""
        self._lines_before = len(self._lines())
        with self._stderr.open("ab") as stderr:
            return subprocess.Popen(self._command, cwd=REPOSITORY, stderr=stderr)

    def told(self) -> str:
        """Standard error of all processes so far."""
        return self._stderr.read_text(errors="replace")

    def being_written(self) -> set[Path]:
        """Checkpoints that are being written, or were cut off."""
        return set(files.cut_off(self.root))

    def _lines(self) -> list[str]:
        return self.ids.read_text().splitlines() if self.ids.is_file() else []

    def batches(self) -> dict[int, str]:
        """Sample ids by step; of a step that was done again, the last time."""
        return _by_step(self._lines())

    def taken(self) -> int:
        """The step of the newest batch that the present process has taken; 0 for none."""
        return max(_by_step(self._lines()[self._lines_before :]), default=0)

    def newest(self) -> int:
        """The newest checkpoint."""
        return max(files.steps(self.root), default=0)

    def rows(self) -> list[dict[str, str]]:
        """The metrics without what depends on the clock."""
        with (self.workdir / "metrics.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        return [{name: x for name, x in row.items() if name not in CLOCK} for row in rows]

    def state(self) -> list[np.ndarray]:
        """All arrays of the newest checkpoint."""
        folder = files.find(self.workdir)
        items = [ocp.PyTreeCheckpointer().restore(folder / item) for item in ("params", "training")]
        return [np.asarray(leaf) for leaf in jax.tree.leaves(items)]


def _by_step(lines: list[str]) -> dict[int, str]:
    return {int(step): ids for step, _, ids in (line.partition(": ") for line in lines)}


def wait_for_save(run: Run, process: subprocess.Popen[bytes], number: int, steps: int) -> None:
    """Returns when the process writes its `number`-th checkpoint, after so many steps, or its end.

    A checkpoint that is written while this one does not get to run is not seen.
    """
    seen, most = run.being_written(), run.newest() + steps
    while number and run.taken() < most and process.poll() is None:
        new = run.being_written() - seen
        seen |= new
        number -= len(new)
        time.sleep(0.001)


def wait_until(run: Run, process: subprocess.Popen[bytes], end: float, steps: int) -> None:
    """Returns at a time of the clock, after so many steps, or when the process has ended."""
    most = run.newest() + steps
    while time.monotonic() < end and run.taken() < most and process.poll() is None:
        time.sleep(0.01)


def kill_often(run: Run, kills: int, seed: int, window: tuple[float, int]) -> dict[str, Any]:
    """Runs, and kills so many times; then lets it end.

    Args:
      run: not started yet.
      kills: how many.
      seed: of the random times.
      window: seconds and steps of a process, one of which a kill comes within.

    Returns:
      Counts.
    """
    draw = random.Random(seed)
    saving, lost = 0, []
    seconds, steps = window
    for kill in range(kills):
        started, process = time.time(), run.start()
        if kill % 2:
            number = draw.randint(1, max(1, steps // EVERY_STEPS))
            wait_for_save(run, process, number, EVERY_STEPS * number + 2)
            time.sleep(draw.uniform(0, 0.05))
        else:
            wait_until(run, process, time.monotonic() + draw.uniform(0, seconds), steps)
        if process.poll() is not None:
            raise SystemExit(f"the run ended after {kill} kills:\n{run.told()[-2000:]}")
        process.kill()
        process.wait()
        saving += any(path.stat().st_mtime >= started for path in run.being_written())
        lost.append(run.taken() - run.newest())
    if run.start().wait() != 0:
        raise SystemExit(run.told()[-2000:])
    return {
        "kills": kills,
        "kills_while_saving": saving,
        "resumed_runs": run.told().count("resuming at step"),
        "most_steps_lost": max(lost, default=0),
    }


def differences(run: Run, quiet: Run, samples: int) -> list[str]:
    """What tells a run from the undisturbed one; nothing when all is well."""
    wrong = []
    ours, theirs = run.state(), quiet.state()
    same = len(ours) == len(theirs) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(ours, theirs, strict=True)
    )
    if not same:
        wrong.append("the final states differ")
    if run.rows() != quiet.rows():
        wrong.append("the metrics differ")
    if run.batches() != quiet.batches():
        wrong.append("the steps took other samples")
    used = [x for ids in run.batches().values() for x in ids.split()]
    if not len(used) == len(set(used)) == samples:
        wrong.append(f"{len(used)} samples were used, {len(set(used))} different, not {samples}")
    return wrong


def soak(folder: Path, *, kills: int, seed: int, model: str, samples: int, seconds: float) -> Any:
    """Both runs, and what came of them."""
    # A tenth is held out; within the rest, no sample comes up a second time.
    data = tiny.write_data(folder / "data", round(1.3 * samples / tiny.EPISODE_STEPS))
    settings = {"model": model, "steps": samples // BATCH, "seconds": seconds}
    quiet = Run(folder / "quiet", data, **settings)
    start = time.monotonic()
    process = quiet.start()
    while process.poll() is None and not quiet.ids.is_file():
        time.sleep(0.01)
    startup = time.monotonic() - start
    if process.wait() != 0:
        raise SystemExit(quiet.told()[-2000:])
    whole = time.monotonic() - start
    run = Run(folder / "killed", data, **settings)
    steps = samples // BATCH // (kills + 1)  # so that the run is not over before the last kill
    counts = kill_often(run, kills, seed, (2 * startup, steps))
    return counts | {
        "steps": samples // BATCH,
        "samples": samples,
        "startup_seconds": round(startup, 1),
        "undisturbed_seconds": round(whole, 1),
        "seconds": round(time.monotonic() - start, 1),
        "differences": differences(run, quiet, samples),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command in this file's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=("tiny", "debug"), default="tiny")
    parser.add_argument("--samples", type=int, default=1200, help="a multiple of 20")
    parser.add_argument("--step-seconds", type=float, default=0.05, help="least time of a step")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "compiled"))
        found = soak(
            Path(folder),
            kills=args.kills,
            seed=args.seed,
            model=args.model,
            samples=args.samples,
            seconds=args.step_seconds,
        )
    print(json.dumps(found))
    return 1 if found["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
