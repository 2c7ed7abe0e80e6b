"""What a checkpoint costs: how long a save holds the loop up, and how long disk and checks take.

    python benchmarks/checkpoint.py --json [--gigabytes 1] [--folder DIR]

At the debug size, `lara train` itself runs on made-up data and every save of it is timed, next to
the time of a step. At the size asked for, a state of random numbers (parameters and two moments of
Adam) is saved, checked and restored for several rounds; the floors are a copy of the same numbers
in memory, and a plain file of them, written and flushed.

A save holds the loop up until the state has been copied from the device; the files are written
while the run goes on. Orbax waits for an earlier save that still runs: rounds wait themselves, so
that this does not count.
"""

import argparse
import contextlib
import csv
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import synthetic_bridge
from table import print_table

from lara_jax import checkpoint_files as files
from lara_jax import train
from lara_jax.checkpoint import CheckpointStore, RunInfo
from lara_jax.config import CheckpointConfig, Recipe, load_recipe
from lara_jax.sharding import make_mesh, replicated

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "debug.py"
ARRAYS = 16  # of the large state's parameters
FIRST_SAVES = 1  # of a process, which set things up and are not counted
Results = defaultdict[str, list[float]]


@flax.struct.dataclass
class State:
    """Parameters and an optimizer's moments: a train state without the rest."""

    params: Any
    opt_state: Any


@contextlib.contextmanager
def timed(results: Results, name: str, unit_seconds: float = 1.0) -> Iterator[None]:
    """Adds the time that is spent inside, in units of so many seconds."""
    start = time.perf_counter()
    yield
    results[name].append((time.perf_counter() - start) / unit_seconds)


def debug_size(results: Results, work: Path, steps: int, every_steps: int) -> None:
    """A short run of the debug recipe, with its saves timed."""
    data = synthetic_bridge.open_or_write(work / "data", 2)
    recipe = load_recipe(
        RECIPE,
        [
            f"data.path={data}",
            "train.stages=action",
            f"train.steps={steps}",
            f"checkpoint.every_steps={every_steps}",
            f"log.every_steps={every_steps}",
        ],
    )
    save, saves = CheckpointStore.save, Results(list)

    def timed_save(self: CheckpointStore, step: int, state: Any, info: RunInfo) -> None:
        self.wait()
        with timed(saves, "blocking", 1e-3):
            save(self, step, state, info)
        with timed(saves, "files", 1e-3):
            self.wait()

    CheckpointStore.save = timed_save  # type: ignore[method-assign]
    try:
        train.train(recipe, work / "debug")
    finally:
        CheckpointStore.save = save  # type: ignore[method-assign]
    results["save_blocking_ms_debug"] = saves["blocking"][FIRST_SAVES:]
    results["save_files_ms_debug"] = saves["files"][FIRST_SAVES:]
    results["step_ms_debug"] = step_milliseconds(work / "debug", recipe)
    results["save_blocking_steps_debug"] = [
        blocking / statistics.median(results["step_ms_debug"])
        for blocking in results["save_blocking_ms_debug"]
    ]


def step_milliseconds(workdir: Path, recipe: Recipe) -> list[float]:
    """Time of a step, by the rows of a run's metrics."""
    with (workdir / "metrics.csv").open() as stream:
        rates = [row["samples_per_second"] for row in csv.DictReader(stream)]
    return [1e3 * recipe.data.batch_size / float(rate) for rate in rates[1:] if rate]


def large_state(gigabytes: float) -> State:
    """Random float32 numbers, a third of them parameters; 1 GB is 1e9 bytes."""
    numbers = int(gigabytes * 1e9 / 4 / 3 / ARRAYS / 1024) * 1024
    generator = np.random.default_rng(0)

    def tree() -> dict[str, jax.Array]:
        return {
            f"array_{n}": jnp.asarray(generator.standard_normal((1024, numbers // 1024), "f4"))
            for n in range(ARRAYS)
        }

    return State(params=tree(), opt_state={"mu": tree(), "nu": tree()})


def large_size(results: Results, work: Path, gigabytes: float, rounds: int) -> None:
    """A large state saved, checked and restored."""
    state = jax.block_until_ready(large_state(gigabytes))
    recipe = load_recipe(RECIPE)
    info = RunInfo(recipe=recipe, statistics={}, tokenizer={})
    name = f"{gigabytes:g}gb"
    everywhere = replicated(make_mesh(devices=jax.devices()[:1]))
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state
    )
    for number in range(rounds + FIRST_SAVES):
        found = Results(list)
        with timed(found, f"copy_in_memory_ms_{name}", 1e-3):
            copies = [np.array(leaf) for leaf in jax.tree.leaves(state)]
        with timed(found, f"plain_file_seconds_{name}"):
            write_plain(work / "plain", copies)
        del copies
        keep_one = CheckpointConfig(keep=1)
        with contextlib.closing(CheckpointStore(work / "large", keep_one)) as store:
            with timed(found, f"save_blocking_ms_{name}", 1e-3):
                store.save(number, state, info)
            with timed(found, f"save_files_seconds_{name}"):
                store.wait()
            with timed(found, f"check_seconds_{name}"):
                assert not files.damage(store.folder(number))
            store.set_damaged_aside()
            with timed(found, f"restore_seconds_{name}"):
                jax.block_until_ready(store.restore(wanted, number))
            found[f"checkpoint_gb_{name}"].append(files.size_bytes(store.folder(number)) / 1e9)
        if number >= FIRST_SAVES:
            for key, values in found.items():
                results[key] += values


def write_plain(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """One file, on the disk when this returns."""
    with path.open("wb") as stream:
        for array in arrays:
            stream.write(array.data)
        stream.flush()
        os.fsync(stream.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the large state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=36, help="of the debug run; 0 for none")
    parser.add_argument("--every-steps", type=int, default=6, help="between its saves")
    parser.add_argument("--folder", type=Path, help="a disk to measure; the temporary one else")
    arguments = parser.parse_args(argv)
    results = Results(list)
    with tempfile.TemporaryDirectory(prefix="lara_benchmark_", dir=arguments.folder) as work:
        large_size(results, Path(work), arguments.gigabytes, arguments.rounds)
        if arguments.steps:
            debug_size(results, Path(work), arguments.steps, arguments.every_steps)
    print_table(results, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
