"""`lara train`: recipe -> data -> shapes -> shardings -> state -> loop.

    lara train --config configs/debug.py --workdir runs/debug --config.train.steps=200

Run the same command again and it resumes by itself: the newest complete checkpoint of the work
directory holds everything, and batch n is a function of (seed, n). Where a run starts, in order:

1. its own newest checkpoint;
2. the parameters at `config.init.path`: an earlier run, or imported weights;
3. random parameters.
"""

import argparse
import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from data_pipelines.loader import Loader, Position
from data_pipelines.mixture import MixtureSource
from lara_jax import assemble, sharding
from lara_jax.batch import Batch
from lara_jax.checkpoint import CheckpointStore, RunInfo, load_info, restore_params
from lara_jax.config import Recipe, load_recipe, recipe_changes, split_overrides
from lara_jax.curriculum import Stage, spans
from lara_jax.data import (
    make_loader,
    open_mixture,
    statistics_from_dict,
    statistics_of,
    statistics_to_dict,
)
from lara_jax.metrics import MetricsWriter, check_finite
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import learning_rates, make_optimizer
from lara_jax.train_step import TrainState, init_state, logical_axes, make_train_step


def main(argv: Sequence[str]) -> int:
    """`lara train --config FILE --workdir DIR [--config.section.key=value ...]`."""
    parser = argparse.ArgumentParser(prog="lara train", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives")
    args, rest = parser.parse_known_args(argv)
    recipe = load_recipe(args.config, split_overrides(rest))
    done = int(train(recipe, Path(args.workdir)).step)
    if done < recipe.train.steps:
        _say(f"stopped at step {done} of {recipe.train.steps}; the same command goes on from there")
        return 1
    return 0


def train(recipe: Recipe, workdir: Path) -> TrainState:
    """Trains until `train.steps`, or until SIGTERM asks to stop.

    Args:
      recipe: the run's settings.
      workdir: its directory.

    Returns:
      The last state, which is also the newest checkpoint.

    Raises:
      ValueError: the recipe does not fit the data or the devices.
      FloatingPointError: a metric is not finite.
    """
    mesh = sharding.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    with contextlib.ExitStack() as stack:
        keep = recipe.checkpoint.keep
        store = stack.enter_context(contextlib.closing(CheckpointStore(workdir, keep=keep)))
        info, source = open_data(recipe, workdir, store)
        lessons = make_lessons(recipe, info, source)

        model, optimizer = lessons[0].model, make_optimizer(recipe)
        init = partial(init_state, model, optimizer, teacher=recipe.teacher.enabled)
        shapes = jax.eval_shape(init, jax.random.key(recipe.seed))
        shardings = state_shardings(mesh, shapes, logical_axes(model))

        asked_to_stop = stack.enter_context(_sigterm())
        stack.enter_context(jax.set_mesh(mesh))
        state = first_state(recipe, store, init, shapes, shardings)
        step = int(state.step)
        # Batches taken from the stream less steps done: not 0 once the batch size has changed.
        ahead = stream_step(recipe, info) - step
        log = stack.enter_context(contextlib.closing(Log(recipe, workdir, step)))
        for lesson in lessons:
            rows = sharding.batch_sharding(mesh, lesson.spec, recipe.train.accumulate_steps)
            train_step = jax.jit(
                make_train_step(lesson.model, optimizer, lesson.stage, recipe),
                in_shardings=(shardings, rows),
                out_shardings=(shardings, sharding.replicated(mesh)),
                donate_argnums=0,
            )
            for batch in lesson.batches(step, ahead):
                state, metrics = train_step(state, sharding.put(batch, rows))
                step += 1
                last = step == recipe.train.steps or asked_to_stop()
                save = last or step % recipe.checkpoint.every_steps == 0
                log.advance(recipe.data.batch_size)
                if save or step % recipe.log.every_steps == 0:
                    log.write(step, lesson.stage, metrics, batch)
                if save:
                    taken = lesson.loader.position(step + ahead)
                    store.save(step, state, dataclasses.replace(info, samples=taken.samples))
                if last:
                    return state
        return state


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A stage of the curriculum and what it needs, for steps `start` to `end` - 1 of the run."""

    stage: Stage
    start: int
    end: int
    model: LaraVLA
    loader: Loader
    spec: Batch

    def batches(self, step: int, ahead: int = 0) -> Iterator[Batch]:
        """The batches of its steps from `step` on; none when the run is past it.

        Args:
          step: of the run.
          ahead: number of the batch that step 0 would have had.
        """
        if step < self.end:
            yield from islice(self.loader.iterate(step + ahead), self.end - step)


def open_data(
    recipe: Recipe, workdir: Path, store: CheckpointStore
) -> tuple[RunInfo, MixtureSource]:
    """The stream of steps, and what checkpoints hold about it.

    A run that resumes keeps the statistics and the tokenizer it started with: they are part of
    the model. It goes on in the same stream, at the sample after the last one it took.
    """
    source = open_mixture(recipe, recipe.data.split)
    step = store.latest()
    if step is not None and store.has_training(step):
        saved = load_info(workdir, step)
        _refuse_another_model(workdir, saved, recipe, source)
        for change in recipe_changes(saved.recipe, recipe):
            _say(f"changed since the checkpoint: {change}")
        Position(saved.samples, saved.stream).check(
            source.fingerprint, allow_changed=recipe.data.allow_changed_stream
        )
        return dataclasses.replace(saved, recipe=recipe, stream=source.fingerprint), source
    info = RunInfo(
        recipe=recipe,
        statistics=statistics_to_dict(statistics_of(source)),
        tokenizer=assemble.tokenizer_to_text(assemble.load_recipe_tokenizer(recipe)),
        stream=source.fingerprint,
    )
    return info, source


def stream_step(recipe: Recipe, info: RunInfo) -> int:
    """How many batches of the recipe's size the run has taken from its stream."""
    return Position(info.samples, info.stream).steps(recipe.data.batch_size)


def _refuse_another_model(
    workdir: Path, saved: RunInfo, recipe: Recipe, source: MixtureSource
) -> None:
    """A run cannot go on with other datasets or another tokenizer.

    Raises:
      ValueError: a data set or the tokenizer is not that of the checkpoint.
    """
    names = sorted(s.name for s in source.sources)
    pairs = (
        ("config.data.path", ", ".join(sorted(saved.statistics)), ", ".join(names)),
        ("config.tokenizer.path", saved.recipe.tokenizer.path, recipe.tokenizer.path),
    )
    for key, before, now in pairs:
        if before != now:
            raise ValueError(
                f"{key}: the run in {workdir} was started with {before!r}, not {now!r}; take "
                "another --workdir, and config.init.path to start from this run's parameters"
            )


def make_lessons(recipe: Recipe, info: RunInfo, source: MixtureSource) -> list[Lesson]:
    """The stages in order, each with its model, its data and the shapes of its batches."""
    tokenizer = assemble.tokenizer_from_text(info.tokenizer)
    statistics = statistics_from_dict(info.statistics)
    alike = source.sources[0]
    frames: dict[str, Any] = {"views": len(alike.views), "image_size": alike.size}
    host = (jax.process_index(), jax.process_count())
    lessons = []
    for stage, start, end in spans(recipe.stages, recipe.train.steps):
        prompt = assemble.prompt_builder(recipe, tokenizer, stage, **frames)
        config = assemble.model_config(recipe, tokenizer, latent_slots=prompt.latent_slots)
        lessons.append(
            Lesson(
                stage=stage,
                start=start,
                end=end,
                model=LaraVLA(config),
                loader=make_loader(recipe, source, statistics, prompt, host=host),
                spec=assemble.batch_spec(recipe, stage, **frames),
            )
        )
    return lessons


def state_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Where every array of the state lives.

    Args:
      mesh: the devices.
      shapes: the abstract state.
      axes: logical axis names of every parameter.

    Returns:
      A `TrainState` of shardings.
    """
    params = sharding.shard_tree(mesh, axes, shapes.params)
    like = partial(sharding.shard_like, mesh)
    return shapes.replace(
        step=sharding.replicated(mesh),
        params=params,
        opt_state=like(shapes.opt_state, shapes.params, params),
        teacher=like(shapes.teacher, shapes.params["vision"], params["vision"]),
        rng=sharding.replicated(mesh),
    )


def first_state(
    recipe: Recipe,
    store: CheckpointStore,
    init: Callable[[jax.Array], TrainState],
    shapes: TrainState,
    shardings: TrainState,
) -> TrainState:
    """The state a run starts from, in the order of this file's first lines."""
    abstract = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
    step = store.latest()
    if step is not None and store.has_training(step):
        _say(f"resuming at step {step} from {store.folder(step)}")
        return store.restore(abstract, step)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(recipe.seed))
    source = recipe.init.path if step is None else store.folder(step)
    if not source:
        _say("starting from random parameters")
        return state
    _say(f"starting from the parameters of {source}")
    params = restore_params(source, abstract.params)
    # A copy: the teacher and the student are updated in place, each in its own memory.
    teacher = None if state.teacher is None else jax.tree.map(jnp.copy, params["vision"])
    return state.replace(params=params, teacher=teacher)


class Log:
    """Metrics of the run with learning rates and throughput."""

    def __init__(self, recipe: Recipe, workdir: Path, step: int) -> None:
        self._rates = learning_rates(recipe.optimizer, recipe.stages, recipe.train.steps)
        self._writer = MetricsWriter(workdir, start_step=step, steps=recipe.train.steps)
        self._samples, self._since = 0, time.monotonic()

    def advance(self, samples: int) -> None:
        """Counts a step."""
        self._samples += samples
        self._writer.advance()

    def write(self, step: int, stage: Stage, metrics: dict[str, jax.Array], batch: Batch) -> None:
        """Fetches the metrics from the devices, checks them and writes a row."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values, batch.sample_id)
        now = time.monotonic()
        rates = {f"rate_{part}": float(rate(step - 1)) for part, rate in self._rates.items()}
        speed = {"samples_per_second": self._samples / (now - self._since)}
        self._samples, self._since = 0, now
        self._writer.write(step, stage.name, values | rates | speed)

    def close(self) -> None:
        self._writer.close()


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM only sets a flag; yields the function that reads it."""
    flags: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: flags.append(number))
    try:
        yield lambda: bool(flags)
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
