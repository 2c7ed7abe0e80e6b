"""What a training step takes beside the jitted function: data, log, checks, everything.

    python benchmarks/loop.py --json [--rounds 5] [--steps 200] [--device-ms 50]

`lara train` of the debug recipe's last stage on made-up data, against the same jitted step over and
over on one batch that lies on the device. Both take turns in one process. The networks are a few
numbers and the step waits on the device, so that it takes as long as asked for and needs none of
the host's cores: what an accelerator is to its host. Data, optimizer, metrics, log and loop are the
real ones.
"""

import argparse
import contextlib
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import synthetic_bridge
from table import print_table

from lara_jax import sharding, train, train_step
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


def lasting(step: Any, seconds: float) -> Any:
    """A training step that takes so long on the device."""

    def wait(loss: Any) -> Any:
        time.sleep(seconds)
        return loss

    def slow(state: Any, batch: Any) -> Any:
        state, metrics = step(state, batch)
        loss = metrics["loss"]
        return state, metrics | {"loss": jax.pure_callback(wait, loss, loss)}

    return slow


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


def in_loop(recipe: Recipe, workdir: Path) -> float:
    """Milliseconds of a step of a new run: the median of its log's lines but the first."""
    train.train(recipe, workdir)
    with (workdir / "metrics.csv").open(encoding="utf-8") as stream:
        rates = [float(row["samples_per_second"]) for row in csv.DictReader(stream)][1:]
    return statistics.median(1e3 * recipe.data.batch_size / rate for rate in rates)


def run(work: Path, rounds: int, steps: int, rows: int, seconds: float) -> dict[str, list[float]]:
    """All measurements, by name."""
    train_step.init_params, train_step.stage_loss = small_params, small_loss
    train.make_train_step = lambda *args, **options: lasting(
        make_train_step(*args, **options), seconds
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
    }
    for number in range(rounds):
        before = [next(step) for _ in range(steps // TOGETHER // 2)]
        loop = in_loop(recipe, work / f"run_{number}")
        after = [next(step) for _ in range(steps // TOGETHER // 2)]
        bare = statistics.median(before + after)
        for values, value in zip(
            results.values(), (bare, loop, 100 * (loop / bare - 1)), strict=True
        ):
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
