"""What a training step takes beside the jitted function: data, log, checks, everything.

    python benchmarks/loop.py --json [--rounds 5] [--steps 200] [--device-ms 50]

    idle_percent       of the loop's time, in which the device waits for the host
    overhead_percent   that a step takes longer in the loop than alone: also what the host's work
                       takes from the cores that the device is made of

`lara train` of the debug recipe's last stage on made-up data, against the same jitted step over and
over on one batch that lies on the device. Both take turns in one process. The networks are a few
numbers; a loop on the device makes the step last as long as asked for. It takes one core, and the
runtime returns while it runs, as with an accelerator: so this needs two cores, and what the host
does beside a step counts only where the next step waits for it. Data, optimizer, metrics, log and
loop are the real ones.
"""

import argparse
import contextlib
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import synthetic_bridge
from table import print_table

from lara_jax import cluster, sharding, train, train_step
from lara_jax.checkpoint import CheckpointStore
from lara_jax.config import Recipe, load_recipe
from lara_jax.optimizer import make_optimizer
from lara_jax.train_step import init_state, logical_axes, make_train_step

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "debug.py"
TOGETHER = 10  # steps timed together, and between two lines of the log


def small_params(*_: Any) -> Any:
    """A kernel for each part of the model."""
    kernel = nn.LogicallyPartitioned(jnp.ones((8, 8)), ("embed", "mlp"))
    return {part: {"kernel": kernel} for part in ("vision", "text", "action_expert")}


def small_loss(params: Any, *_: Any, **__: Any) -> tuple[jax.Array, Any]:
    """Of these."""
    loss = jnp.asarray(sum((leaf**2).mean() for leaf in jax.tree.leaves(params)))
    return loss, {"loss": loss, "by_dataset": {}}


def spin(value: jax.Array, turns: jax.Array) -> jax.Array:
    """The value, after so many turns of a loop on one core of the device."""
    return jax.lax.fori_loop(0, turns, lambda _, x: jnp.sin(x) + value, value)


def turns_for(seconds: float) -> int:
    """Turns of `spin` that last so long here."""
    turns, spun = 1000, jax.jit(spin)
    value = jnp.float32(1)
    spun(value, turns).block_until_ready()
    while True:
        start = time.perf_counter()
        spun(value, turns).block_until_ready()
        taken = time.perf_counter() - start
        if taken > seconds / 2:
            return round(turns * seconds / taken)
        turns *= 2


def lasting(step: Any, turns: int) -> Any:
    """A training step that spins so many turns."""

    def slow(state: Any, batch: Any) -> Any:
        state, metrics = step(state, batch)
        loss = metrics["loss"]
        spun = spin(loss, jnp.int32(turns))
        # The loss, in a way that needs the loop's end.
        return state, metrics | {"loss": jnp.where(jnp.isnan(spun), spun, loss)}

    return slow


class Idle(cluster.Watch):
    """When the device had nothing to do, as seen by a thread that waits for each step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._waiter = ThreadPoolExecutor(1)
        self._begun: list[float] = []
        self._done: list[Future[float]] = []

    def handing(self) -> None:
        """As of `Watch`."""
        self._begun.append(time.perf_counter())
        super().handing()

    def handed(self, step: int, result: jax.Array) -> None:
        """As of `Watch`."""
        super().handed(step, result)
        self._done.append(self._waiter.submit(_when_ready, result))

    def percent(self) -> float:
        """Of the time from the end of the second step on; the first one was compiled."""
        done = [future.result() for future in self._done][1:]
        gaps = [max(0.0, begun - end) for begun, end in zip(self._begun[2:], done, strict=False)]
        return 100 * sum(gaps) / (done[-1] - done[0])


def _when_ready(result: jax.Array) -> float:
    result.block_until_ready()
    return time.perf_counter()


def alone(recipe: Recipe, workdir: Path) -> Iterator[float]:
    """Milliseconds of the jitted step on one batch, without end."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with contextlib.closing(CheckpointStore(workdir, recipe.checkpoint)) as store:
        info, source = train.open_data(recipe, workdir, store)
    (lesson,) = train.make_lessons(recipe, info, source)
    optimizer = make_optimizer(recipe)
    init = partial(init_state, lesson.model, optimizer, recipe)
    shapes = jax.eval_shape(init, jax.random.key(0))
    shardings = train.state_shardings(mesh, shapes, logical_axes(lesson.model))
    rows = sharding.batch_sharding(mesh, lesson.spec)
    with jax.set_mesh(mesh):
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
        step = jax.jit(
            train.make_train_step(lesson.model, optimizer, lesson.stage, recipe, datasets=1),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            donate_argnums=0,
        )
        batches = lesson.batches(0)
        batch = sharding.put(next(batches), rows)
        batches.close()  # type: ignore[attr-defined]  # its threads end
    while True:
        with jax.set_mesh(mesh):
            state, _ = jax.block_until_ready(step(state, batch))
            start = time.perf_counter()
            for _ in range(TOGETHER):
                state, _ = step(state, batch)
            jax.block_until_ready(state)
        yield 1e3 * (time.perf_counter() - start) / TOGETHER


def in_loop(recipe: Recipe, workdir: Path) -> tuple[float, float]:
    """Of a new run: milliseconds of a step, the median of its log's lines but the first; idle %."""
    watches: list[Idle] = []

    def watch(*args: Any) -> Idle:
        watches.append(Idle(*args))
        return watches[-1]

    with mock.patch.object(cluster, "Watch", watch):
        train.train(recipe, workdir)
    with (workdir / "metrics.csv").open(encoding="utf-8") as stream:
        rates = [float(row["samples_per_second"]) for row in csv.DictReader(stream)][1:]
    step = statistics.median(1e3 * recipe.data.batch_size / rate for rate in rates)
    return step, watches[0].percent()


def run(work: Path, rounds: int, steps: int, rows: int, seconds: float) -> dict[str, list[float]]:
    """All measurements, by name."""
    train_step.init_params, train_step.stage_loss = small_params, small_loss
    turns = turns_for(seconds)
    train.make_train_step = lambda *args, **options: lasting(
        make_train_step(*args, **options), turns
    )
    settings = {
        "data.path": synthetic_bridge.open_or_write(work / "data", 2),
        "data.batch_size": rows,
        "train.stages": "action",
        "train.steps": steps,
        "checkpoint.every_steps": steps,
        "log.every_steps": TOGETHER,
    }
    recipe = load_recipe(RECIPE, [f"{key}={value}" for key, value in settings.items()])
    step = alone(recipe, work / "alone")
    results: dict[str, list[float]] = {
        "step_ms_alone": [],
        "step_ms_in_loop": [],
        "overhead_percent": [],
        "idle_percent": [],
    }
    for number in range(rounds):
        before = [next(step) for _ in range(steps // TOGETHER // 2)]
        loop, idle = in_loop(recipe, work / f"run_{number}")
        after = [next(step) for _ in range(steps // TOGETHER // 2)]
        bare = statistics.median(before + after)
        found = bare, loop, 100 * (loop / bare - 1), idle
        for values, value in zip(results.values(), found, strict=True):
            values.append(value)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of a run")
    parser.add_argument("--rows", type=int, default=16, help="of a batch")
    parser.add_argument("--device-ms", type=float, default=50, help="that a step takes")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="lara_benchmark_") as work:
        seconds = arguments.device_ms / 1e3
        results = run(Path(work), arguments.rounds, arguments.steps, arguments.rows, seconds)
    print_table(results, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
