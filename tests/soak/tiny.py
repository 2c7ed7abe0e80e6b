"""`lara train` with a model of 300 numbers, and trouble on demand.

Data, batches, optimizer, teacher, checkpoints and loop are the real ones; only the networks are
replaced, by a loss that compiles in a moment and still depends on the samples of a batch, on their
order, and on the random numbers of the step: whoever repeats, leaves out or exchanges a sample ends
with other parameters.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax import checkpoint_files, losses, train, train_step
from lara_jax.batch import Batch
from lara_jax.curriculum import Stage
from tests.data_pipelines.handmade import tabletop_record, write_tabletop

SetAttribute = Callable[[Any, str, Any], None]
EPISODE_STEPS = 20
BOX = np.array([0.1, 0.2, 0.8, 0.9], np.float32)


def write_data(path: Path, episodes: int) -> Path:
    """A data set of `episodes` times 20 steps, in shards of ten episodes."""
    records = [tabletop_record(seed, EPISODE_STEPS) for seed in range(episodes)]
    for record in records:
        record["steps/reasoning/boxes"] = np.tile(BOX, (EPISODE_STEPS, 2, 1))
    shards = [records[start : start + 10] for start in range(0, episodes, 10)]
    return write_tabletop(path, *shards)


def use_tiny_model(set_attribute: SetAttribute) -> None:
    """Replaces the networks; what tests and scripts set attributes with is given."""
    set_attribute(train_step, "init_params", init_params)
    set_attribute(train_step, "stage_loss", stage_loss)


def init_params(model: Any, rng: jax.Array) -> Any:
    """A kernel for each part of the model."""
    del model

    def kernel(number: int) -> Any:
        value = jax.random.normal(jax.random.fold_in(rng, number), (8, 12))
        return {"kernel": nn.LogicallyPartitioned(value, ("embed", "mlp"))}

    return {"vision": kernel(0), "text": kernel(1), "action_expert": kernel(2)}


def stage_loss(
    params: Any,
    teacher: Any,
    batch: Batch,
    draws: Any,
    dropout: Any,
    divisors: Any,
    model: Any,
    stage: Stage,
    recipe: Any,
    *,
    datasets: int,
) -> tuple[jax.Array, Any]:
    """The distance of all parameters from what samples and noise say, called what the stage has."""
    del dropout, divisors, model, recipe
    place = jnp.arange(1.0, 1 + len(batch.sample_id)) * jnp.sin(1.0 * batch.sample_id)
    goal = place.mean() + batch.actions.mean() + draws.noise.mean()
    if teacher is not None:
        goal += teacher["kernel"].mean()
    loss = jnp.asarray(sum(jnp.mean((leaf - goal) ** 2) for leaf in jax.tree.leaves(params)))
    name = "action" if stage.action_weight else "token"
    rows = losses.Sum(jnp.full(batch.size, loss), jnp.ones(batch.size))
    parts = {name: losses.by_dataset(rows, batch, datasets)}
    return loss, {"loss": loss, f"loss_{name}": loss, "by_dataset": parts}


def at_step(set_attribute: SetAttribute, number: int, trouble: Callable[[], None]) -> None:
    """Something happens on the device in the middle of a step, and the step takes half a second."""
    real = train.make_train_step

    def happens(step: jax.Array) -> None:
        if int(step) + 1 == number:
            trouble()
            time.sleep(0.5)

    def make(*args: Any, **options: Any) -> Any:
        step = real(*args, **options)

        def troubled(state: Any, batch: Batch) -> Any:
            jax.debug.callback(happens, state.step)
            return step(state, batch)

        return troubled

    set_attribute(train, "make_train_step", make)


def in_save(set_attribute: SetAttribute, number: int, trouble: Callable[[], None]) -> None:
    """Something happens when a checkpoint's files are written and it has no name yet."""
    real = checkpoint_files.write_checksums

    def write(folder: Path) -> None:
        if folder.name.startswith(f"{number}."):
            trouble()
            time.sleep(0.5)
        real(folder)

    set_attribute(checkpoint_files, "write_checksums", write)


def log_batches(set_attribute: SetAttribute, path: Path, step_seconds: float) -> None:
    """Adds a line to a file for each batch that the loop takes: the step's number, sample ids.

    Args:
      set_attribute: see `use_tiny_model`.
      path: of the file.
      step_seconds: how long to wait before each batch.
    """
    real = train.Lesson.batches

    def batches(self: train.Lesson, step: int, ahead: int = 0) -> Iterator[Batch]:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with contextlib.closing(real(self, step, ahead)) as found:  # type: ignore[type-var]
            for number, batch in enumerate(found, start=step + 1):
                time.sleep(step_seconds)
                ids = " ".join(map(str, batch.sample_id.tolist()))
                os.write(file, f"{number}: {ids}\n".encode())
                yield batch
        os.close(file)

    set_attribute(train.Lesson, "batches", batches)
