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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from data_pipelines.loader import Loader, Position
from data_pipelines.mixture import MixtureSource
from lara_jax import assemble, cluster, sharding
from lara_jax.batch import Batch
from lara_jax.best_metric import check_best_metric
from lara_jax.checkpoint import (
    CheckpointStore,
    RunInfo,
    load_factors,
    load_info,
    restore_params,
)
from lara_jax.config import Recipe, load_recipe, recipe_changes, split_overrides
from lara_jax.curriculum import Stage, silent_share, spans, stage_of
from lara_jax.data import (
    fast_tokenizer,
    make_loader,
    open_mixture,
    stage_source,
    statistics_from_dict,
    statistics_of,
    statistics_to_dict,
)
from lara_jax.evals.held_out import HeldOut
from lara_jax.flops import step_flops
from lara_jax.lora import LORA, factor_axes, merged
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import make_optimizer, trained_paths
from lara_jax.preemption import stop_requests
from lara_jax.run_log import Log
from lara_jax.spikes import SkipReport, resumed
from lara_jax.tokenizers.fast import FastTokenizer
from lara_jax.train_step import (
    TrainState,
    init_state,
    logical_axes,
    make_train_step,
    started_from,
)


def main(argv: Sequence[str]) -> int:
    """`lara train --config FILE --workdir DIR [--config.section.key=value ...]`."""
    parser = argparse.ArgumentParser(prog="lara train", allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="where the run lives")
    args, rest = parser.parse_known_args(argv)
    recipe = load_recipe(args.config, split_overrides(rest))
    cluster.join()
    with cluster.Membership():
        done = int(train(recipe, Path(args.workdir)).step)
    if done < recipe.train.steps:
        cluster.say(
            f"stopped at step {done} of {recipe.train.steps}; the same command goes on from there"
        )
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
      SaveFailed: a checkpoint or another file could not be written; those before it are whole.
      FloatingPointError: too many steps in a row had to be skipped; a checkpoint was saved.
    """
    check_best_metric(recipe)
    mesh = sharding.make_mesh(recipe.mesh.data, recipe.mesh.fsdp, recipe.mesh.tensor)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(contextlib.closing(CheckpointStore(workdir, recipe.checkpoint)))
        store.set_damaged_aside(recipe.checkpoint.on_damage)
        info, source = open_data(recipe, workdir, store)
        lessons = make_lessons(recipe, info, source, host=sharding.reader(mesh))
        exam = open_mixture(recipe, recipe.data.eval_split) if recipe.eval.every_steps else None

        model, optimizer = lessons[0].model, make_optimizer(recipe)
        init = partial(init_state, model, optimizer, recipe)
        shapes = jax.eval_shape(init, jax.random.key(recipe.seed))
        shardings = state_shardings(mesh, shapes, logical_axes(model))

        asked_to_stop = stack.enter_context(stop_requests(recipe.checkpoint.preemption_notice))
        stack.enter_context(jax.set_mesh(mesh))
        state = first_state(recipe, store, init, shapes, shardings)
        step = int(state.step)
        # Batches taken from the stream less steps done: not 0 once the batch size has changed.
        ahead = stream_step(recipe, info) - step
        log = stack.enter_context(contextlib.closing(Log(recipe, workdir, step)))
        watch = stack.enter_context(cluster.Watch(recipe.train.hang_seconds, step))
        for lesson in lessons:
            names = [s.name for s in lesson.loader.source.sources]
            skips = SkipReport(names, recipe.spike)
            rows = sharding.batch_sharding(mesh, lesson.spec, recipe.train.accumulate_steps)
            train_step = jax.jit(
                make_train_step(lesson.model, optimizer, lesson.stage, recipe, datasets=len(names)),
                in_shardings=(shardings, rows),
                out_shardings=(shardings, sharding.replicated(mesh)),
                donate_argnums=0,
            )
            watch.new_program()
            held_out = None
            if exam is not None:
                parts = lesson.stage, lesson.model, lesson.loader
                own_exam = stage_source(exam, lesson.stage)
                held_out = HeldOut(recipe, *parts, own_exam, shardings, workdir)
            trained = trained_paths(recipe, shapes.params, [lesson.stage])
            config = lesson.model.config
            flops = step_flops(recipe, config, lesson.stage, lesson.spec, trained=trained).model
            batches = lesson.batches(step, ahead)
            for batch in log.batches(batches, datasets=names, step_flops=flops):
                placed = sharding.put(batch, rows)
                watch.handing()
                state, metrics = train_step(state, placed)
                step += 1
                watch.handed(step, metrics["loss"])
                skips.follow(step, metrics.pop("verdict"), batch)
                stops = asked_to_stop(step) or skips.too_many
                last = step == recipe.train.steps or stops
                save = last or step % recipe.checkpoint.every_steps == 0
                log.advance(metrics)
                store.check()
                evaluate = held_out and held_out.due(step, lesson.end)
                if evaluate and stops:
                    # There may be no time.
                    cluster.say(f"the evaluation of step {step} is left out")
                    evaluate = False
                # A row is of one stage.
                ends = step == lesson.end
                if save or evaluate or ends or step % recipe.log.every_steps == 0:
                    values = log.write(step, lesson.stage, metrics)
                if held_out and evaluate:
                    with log.paused():
                        scores = held_out(step, state)
                    values |= log.write_evaluation(step, lesson.stage, scores)
                if save:
                    at = lesson.loader.position(step + ahead)
                    info = dataclasses.replace(
                        info, samples=at.samples, stream=at.fingerprint, metrics=values
                    )
                    store.save(step, state, info)
                if last:
                    skips.finish()
                    store.wait()  # while another SIGTERM still does no harm
                    skips.stop_if_too_many(step)
                    return state
            skips.finish()
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
        if step >= self.end:
            return
        loader = self.loader
        if self.stage.anneal:
            share = partial(silent_share, self.stage, self.start + ahead, self.end + ahead)
            loader = dataclasses.replace(loader, silent_share=share)
        yield from islice(loader.iterate(step + ahead), self.end - step)


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
            cluster.say(f"changed since the checkpoint: {change}")
        stage = stage_of(recipe.stages, recipe.train.steps, min(step, recipe.train.steps))
        stream = stage_source(source, stage).fingerprint
        Position(saved.samples, saved.stream).check(
            stream, allow_changed=recipe.data.allow_changed_stream
        )
        return dataclasses.replace(saved, recipe=recipe, stream=stream), source
    statistics, tokenizer = statistics_of(source), assemble.load_recipe_tokenizer(recipe)
    fast = earlier_fast_tokenizer(recipe) or fast_tokenizer(
        recipe, source, statistics, tokenizer.action_range
    )
    info = RunInfo(
        recipe=recipe,
        statistics=statistics_to_dict(statistics),
        tokenizer=assemble.tokenizer_to_text(tokenizer, fast),
        stream=source.fingerprint,
    )
    return info, source


def earlier_fast_tokenizer(recipe: Recipe) -> FastTokenizer | None:
    """That of the run whose parameters a run starts from: they know its tokens and no others.

    Returns:
      None where that run had none, where the recipe names one, and for chunks of another shape.
    """
    wanted = any(stage.discrete_actions for stage in recipe.stages)
    if not (wanted and recipe.init.path) or recipe.tokenizer.fast_path:
        return None
    files = load_info(recipe.init.path).tokenizer
    if not assemble.has_fast(files):
        return None
    fast = assemble.fast_from_text(files)
    own = fast.action_horizon, fast.action_dim  # None for any
    asked = recipe.model.action_horizon, recipe.model.action_dim
    if any(size not in (None, want) for size, want in zip(own, asked, strict=True)):
        cluster.say(
            f"the action tokens of {recipe.init.path} are for chunks of {own} and not used: "
            f"a new FAST tokenizer is fitted to chunks of {asked}"
        )
        return None
    cluster.say(f"action tokens are those of {recipe.init.path}")
    return fast


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


def make_lessons(
    recipe: Recipe, info: RunInfo, source: MixtureSource, *, host: tuple[int, int] = (0, 1)
) -> list[Lesson]:
    """The stages in order, each with its model, its data and the shapes of its batches.

    Args:
      recipe: the run's settings.
      info: statistics and tokenizers.
      source: of the samples.
      host: which part of each batch is read here, of how many.
    """
    tokenizer = assemble.tokenizer_from_text(info.tokenizer)
    statistics = statistics_from_dict(info.statistics)
    alike = source.sources[0]
    frames: dict[str, Any] = {"views": len(alike.views), "image_size": alike.size}
    action_tokens = None
    if any(stage.discrete_actions for stage in recipe.stages):
        fast = assemble.fast_from_text(info.tokenizer)
        action_tokens = assemble.ActionTokens(fast, tokenizer.action_range)
    lessons: list[Lesson] = []
    divided = spans(recipe.stages, recipe.train.steps)
    for stage in recipe.stages:
        if stage not in [one for one, _, _ in divided]:
            cluster.say(f"stage {stage.name!r} gets none of the {recipe.train.steps} steps")
    for stage, start, end in divided:
        before = max(1, lessons[-1].stage.reasoning_stage) if lessons else 0
        spoken_stage = before if before < stage.reasoning_stage else 0
        prompt = assemble.prompt_builder(
            recipe, tokenizer, stage, spoken_stage=spoken_stage, **frames
        )
        config = assemble.model_config(recipe, tokenizer, latent_slots=prompt.latent_slots)
        lessons.append(
            Lesson(
                stage=stage,
                start=start,
                end=end,
                model=LaraVLA(config),
                loader=make_loader(
                    recipe,
                    stage_source(source, stage),
                    statistics,
                    prompt,
                    host=host,
                    action_tokens=action_tokens if stage.discrete_actions else None,
                ),
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
    if LORA in shapes.params:
        axes = axes | {LORA: factor_axes(axes, shapes.params[LORA])}
    params = sharding.shard_tree(mesh, axes, shapes.params)
    like = partial(sharding.shard_like, mesh)
    return shapes.replace(
        step=sharding.replicated(mesh),
        params=params,
        opt_state=like(shapes.opt_state, shapes.params, params),
        teacher=like(shapes.teacher, shapes.params["vision"], params["vision"]),
        rng=sharding.replicated(mesh),
        spikes=jax.tree.map(lambda _: sharding.replicated(mesh), shapes.spikes),
        ema=like(shapes.ema, shapes.params, params),
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
        cluster.say(f"resuming at step {step} from {store.folder(step)}")
        state = store.restore(abstract, step)
        return state.replace(spikes=resumed(state.spikes, recipe.spike))
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(recipe.seed))
    source = recipe.init.path if step is None else store.folder(step)
    if not source:
        cluster.say("starting from random parameters")
        return state
    cluster.say(f"starting from the parameters of {source}")
    networks = {name: tree for name, tree in abstract.params.items() if name != LORA}
    params = restore_params(source, networks)
    if factors := load_factors(source):
        cluster.say("its low-rank factors are merged into the kernels")
        where = {name: shardings.params[name] for name in networks}
        merge = jax.jit(merged, static_argnums=1, out_shardings=where)
        params = merge(params | {LORA: factors}, load_info(source).recipe.lora.scale)
    return started_from(state.params | params, state, recipe)
