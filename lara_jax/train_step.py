"""One training step as a pure function: (state, batch) -> (state, metrics).

    batch --preprocess on device--> backbone --> thoughts
        thoughts --> token cross-entropy    of what stands after the slots
                 --> visual latent L1       against the EMA teacher
                 --> flow matching          fresh noise, R draws a sample
    loss = sum of weight * total / count
    gradients of what the stage trains -> does the step count? -> optimizer -> parameters
        parameters --> teacher, moving average

The loss's divisors are counted on the whole batch before the forward pass. So a batch cut into
micro-batches has the gradient of the batch, whatever the masks, and rows that are masked out of one
loss do not dilute it. A step whose gradient is not finite or explodes changes only the counters
(`lara_jax.spikes`).

Random numbers come from the state's key folded with the step: a resumed run draws what the
undisturbed one would.

Source: arXiv 2602.01166, training objectives; the EMA teacher's momentum and interval are those of
the reference.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from lara_jax import assemble, lora, losses
from lara_jax.augment import augment
from lara_jax.batch import Batch
from lara_jax.config import AugmentConfig, Recipe
from lara_jax.curriculum import Stage
from lara_jax.image_processing import ImageConfig, preprocess
from lara_jax.models.action_expert import flow_time
from lara_jax.models.lara_vla import Inputs, LaraVLA, Thoughts
from lara_jax.models.vision_tower import VisionTower
from lara_jax.models.visual_latent import gather_block, pool_grid, update_teacher
from lara_jax.optimizer import trained_paths
from lara_jax.param_tree import flat, overlay, select
from lara_jax.spikes import judge, no_spikes

Metrics = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    Attributes:
      step: int32[], steps done.
      params: float32 tree of the model's parameters, and of low-rank factors under `lora`.
      opt_state: the optimizer's.
      teacher: float32 tree of the vision tower's moving average, or None.
      rng: random key of the run; never advanced, always folded with the step.
      spikes: what the verdict on a step rests on.
      ema: float32 tree of the moving average of what some stage trains, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    teacher: Any
    rng: jax.Array
    spikes: Any = None
    ema: Any = None


def init_params(model: LaraVLA, rng: jax.Array) -> Any:
    """Random float32 parameters, boxed with their logical axis names; data does not matter."""
    merge = model.config.vision.merge_size
    tokens = jnp.zeros((1, 1), jnp.int32)
    inputs = Inputs(
        patches=jnp.zeros((1, 1, merge**2, model.config.vision.patch_values)),
        view_mask=jnp.ones((1, 1), bool),
        prefix_ids=tokens,
        prefix_mask=tokens == 0,
        suffix_ids=tokens,
        suffix_mask=tokens == 0,
    )
    return model.init(rng, inputs, (merge, merge), method="init_all")["params"]


def logical_axes(model: LaraVLA) -> Any:
    """The logical axis names of every parameter: a tree of `PartitionSpec`s of names."""
    return nn.get_partition_spec(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))


def init_state(
    model: LaraVLA,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    rng: jax.Array,
) -> TrainState:
    """The state before the first step: random parameters, teacher and average equal to them."""
    init_key, run_key = jax.random.split(rng)
    boxed = init_params(model, init_key)
    params = nn.unbox(boxed)
    if recipe.lora.rank:
        key, axes = jax.random.fold_in(init_key, 1), nn.get_partition_spec(boxed)
        params |= {lora.LORA: lora.init_factors(params, axes, recipe.lora, key)}
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        teacher=None,
        rng=run_key,
        spikes=no_spikes(),
    )
    return started_from(params, state, recipe)


def started_from(params: Any, state: TrainState, recipe: Recipe) -> TrainState:
    """The state with these parameters, and a teacher and an average that equal them.

    All are copies, since a step updates each in place, in its own memory.
    """
    trained = select(params, trained_paths(recipe, params, recipe.stages))
    teacher = params["vision"] if recipe.teacher.enabled else None
    return dataclasses.replace(
        state,
        params=params,
        teacher=jax.tree.map(jnp.copy, teacher),
        ema=jax.tree.map(jnp.copy, trained) if recipe.ema.decay else None,
    )


def acting_params(params: Any, ema: Any, recipe: Recipe) -> Any:
    """What a run's parameters act with: their average where there is one, factors merged in."""
    return lora.merged(params if ema is None else overlay(params, ema), recipe.lora.scale)


def model_inputs(batch: Batch, images: ImageConfig) -> tuple[Inputs, tuple[int, int]]:
    """What the backbone reads of a batch, and the patch grid of its frames."""
    inputs = Inputs(
        patches=preprocess(batch.images, images),
        view_mask=batch.view_mask,
        prefix_ids=batch.prefix_ids,
        prefix_mask=batch.prefix_mask,
        suffix_ids=batch.suffix_ids,
        suffix_mask=batch.suffix_mask,
    )
    height, width = batch.images.shape[2:4]
    return inputs, images.grid((height, width))


def make_train_step(
    model: LaraVLA,
    optimizer: optax.GradientTransformation,
    stage: Stage,
    recipe: Recipe,
    *,
    datasets: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step of one stage of the curriculum; jit it once.

    Args:
      model: with the stage's number of slots.
      optimizer: of the whole run.
      stage: loss weights and what trains.
      recipe: the rest.
      datasets: of the mixture.

    Returns:
      a pure function; its metrics are `loss`, `loss_<name>` of each loss with a weight,
      `gradient_norm`, `skipped` (steps of the run), `verdict` (for `SkipReport`), and `by_dataset`:
      of each loss what `losses.by_dataset` returns, zero in a step that does not count.
    """
    pieces = recipe.train.accumulate_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        flow_key, dropout_key, image_key = jax.random.split(
            jax.random.fold_in(state.rng, state.step), 3
        )
        batch = augmented(batch, image_key, recipe.augment)
        draws = flow_draws(flow_key, batch, model.config.expert.noise_draws)
        divisors = divisors_of(batch, model)

        # Only what the stage trains is differentiated: the rest has no gradient to hold.
        trained = select(state.params, trained_paths(recipe, state.params, [stage]))

        def piece_loss(trained: Any, *args: Any) -> tuple[jax.Array, Metrics]:
            params = overlay(state.params, trained)
            return stage_loss(params, state.teacher, *args, datasets=datasets)

        def micro_gradient(batch: Batch, draws: FlowDraws, piece: jax.Array) -> Any:
            dropout = jax.random.fold_in(dropout_key, piece)
            gradient = jax.grad(piece_loss, has_aux=True)
            return gradient(trained, batch, draws, dropout, divisors, model, stage, recipe)

        gradients, metrics = accumulate(micro_gradient, (batch, draws), pieces)
        norm = optax.tree.norm(gradients)
        counts, spikes, verdict = judge(
            state.spikes,
            metrics["loss"],
            norm,
            stage.name,
            recipe.spike,
            recipe.optimizer.clip_norm,
        )
        new = updated(state, trained, gradients, counts, optimizer, recipe)
        new = dataclasses.replace(new, step=state.step + 1, spikes=spikes)
        parts = jax.tree.map(lambda x: jnp.where(counts, x, 0), metrics["by_dataset"])
        return new, metrics | {
            "by_dataset": parts,
            "gradient_norm": norm,
            "skipped": spikes.skipped,
            "verdict": verdict,
        }

    return train_step


def updated(
    state: TrainState,
    trained: Any,
    gradients: Any,
    counts: jax.Array,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> TrainState:
    """The state after a step that counts, and the same state after one that does not.

    Args:
      state: before the step.
      trained: what the stage trains, a part of the parameters.     gradients: of just that.
      counts: bool[].
      optimizer: of the run.
      recipe: for the teacher and the moving average.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, step=state.step)
    params = overlay(state.params, optax.apply_updates(trained, updates))
    moved = {
        "params": params,
        "opt_state": opt_state,
        "teacher": moved_teacher(state.teacher, params, state.step + 1, recipe),
        "ema": moved_average(state.ema, params, recipe.ema.decay),
    }
    before = {name: getattr(state, name) for name in moved}
    kept = jax.tree.map(lambda new, old: jnp.where(counts, new, old), moved, before)
    return dataclasses.replace(state, **kept)


def augmented(batch: Batch, key: jax.Array, config: AugmentConfig) -> Batch:
    """The batch with cropped and recoloured frames."""
    images, next_images = augment(batch.images, batch.next_images, batch.view_mask, key, config)
    return dataclasses.replace(batch, images=images, next_images=next_images)


@flax.struct.dataclass
class FlowDraws:
    """Noise float32[B, R, C, A] and flow times float32[B, R] of R draws per sample."""

    noise: jax.Array
    time: jax.Array


def flow_draws(key: jax.Array, batch: Batch, draws: int) -> FlowDraws:
    """Fresh noise and times for every sample of the batch."""
    noise_key, time_key = jax.random.split(key)
    rows, *chunk = batch.actions.shape
    noise = jax.random.normal(noise_key, (rows, draws, *chunk))
    return FlowDraws(noise, flow_time(time_key, (rows, draws)))


def divisors_of(batch: Batch, model: LaraVLA) -> dict[str, jax.Array]:
    """What the batch's three losses are divided by."""
    cfg = model.config
    return losses.counts(
        batch,
        visual_numbers=cfg.img_next_tokens * cfg.text.width,
        noise_draws=cfg.expert.noise_draws,
    )


def stage_loss(
    params: Any,
    teacher: Any,
    batch: Batch,
    draws: FlowDraws,
    dropout: jax.Array,
    divisors: dict[str, jax.Array],
    model: LaraVLA,
    stage: Stage,
    recipe: Recipe,
    *,
    datasets: int = 1,
) -> tuple[jax.Array, Metrics]:
    """The weighted loss of a stage on a batch or a piece of one.

    Returns:
      the loss, and metrics `loss`, `loss_<name>` and `by_dataset`; pieces of a batch add up to the
      batch's values.
    """
    _, sums = loss_sums(params, teacher, batch, draws, dropout, model, stage, recipe)
    weights = {
        "token": stage.token_weight,
        "visual": stage.visual_weight,
        "action": stage.action_weight,
    }
    means = {name: s.total / jnp.maximum(divisors[name], 1) for name, s in sums.items()}
    loss = sum((weights[name] * mean for name, mean in means.items()), jnp.zeros(()))
    metrics: Metrics = {"loss": loss} | {f"loss_{name}": mean for name, mean in means.items()}
    parts = {name: losses.by_dataset(s, batch, datasets) for name, s in sums.items()}
    return loss, metrics | {"by_dataset": parts}


def loss_sums(
    params: Any,
    teacher: Any,
    batch: Batch,
    draws: FlowDraws,
    dropout: jax.Array | None,
    model: LaraVLA,
    stage: Stage,
    recipe: Recipe,
) -> tuple[Thoughts, dict[str, losses.Sum]]:
    """The thoughts about a batch, and each loss that has a weight in the stage.

    Args:
      dropout: random key; None for none, as in evaluation.
    """
    apply = partial(lora.apply, model, params, recipe.lora.scale)
    images = assemble.image_config(recipe)
    thoughts: Thoughts = apply(*model_inputs(batch, images))
    sums: dict[str, losses.Sum] = {}
    if stage.token_weight:
        sums["token"] = losses.token_loss(thoughts.logits, batch.suffix_ids, batch.loss_mask)
    if stage.visual_weight:
        imagined = gather_block(thoughts.hidden, thoughts.img_next, model.config.img_next_tokens)
        target = teacher_target(teacher, batch, model, recipe)
        sums["visual"] = losses.visual_loss(imagined, target, batch.next_mask[:, 0])
    if stage.action_weight:
        time = draws.time[:, :, None, None]
        actions = batch.actions[:, None]
        noisy = (1 - time) * draws.noise + time * actions
        bucket = (draws.time * model.config.expert.time_buckets).astype(jnp.int32)
        velocity = apply(
            thoughts,
            batch.state,
            noisy,
            bucket,
            train=dropout is not None,
            method="act_velocity",
            rngs={} if dropout is None else {"dropout": dropout},
        )
        sums["action"] = losses.action_loss(velocity, actions - draws.noise, batch.action_mask)
    return thoughts, sums


def teacher_target(teacher: Any, batch: Batch, model: LaraVLA, recipe: Recipe) -> jax.Array:
    """The teacher's pooled features of the primary view's next frame: float[B, Q, D]."""
    cfg = model.config
    images = assemble.image_config(recipe)
    if recipe.teacher.resize_px:
        height, width = recipe.teacher.resize_px
        images = dataclasses.replace(images, resize_px=(height, width))
    frames = batch.next_images[:, 0]
    grid = images.grid((frames.shape[1], frames.shape[2]))
    tower = VisionTower(cfg.vision, jnp.dtype(cfg.dtype), cfg.remat, cfg.attention)
    features = tower.apply({"params": teacher}, preprocess(frames, images), grid).embeds
    merged = cfg.vision.merged(grid)
    return jax.lax.stop_gradient(pool_grid(features, merged, cfg.img_next_tokens))


def moved_teacher(teacher: Any, params: Any, step: jax.Array, recipe: Recipe) -> Any:
    """The teacher after `step` steps: it moves at every `every_steps`-th."""
    if teacher is None:
        return None
    due = step % recipe.teacher.every_steps == 0
    student = lora.merged(params, recipe.lora.scale)["vision"]
    moved = update_teacher(teacher, student, recipe.teacher.momentum)
    return jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, teacher)


def moved_average(average: Any, params: Any, decay: float) -> Any:
    """decay * average + (1 - decay) * parameters, of what the average holds."""
    if average is None:
        return None
    own = select(params, flat(average))
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, own)


def accumulate(function: Callable[..., Any], rows: tuple[Any, ...], pieces: int) -> Any:
    """Sums `function(*piece, number)` over `pieces` equal pieces of `rows`, one after the other.

    Piece i takes the rows i, i + pieces, ...: every device keeps its own rows, none moves.

    Args:
      function: takes a piece of each tree of `rows` and the piece's number, returns a tree of sums.
      rows: trees whose leaves share the leading axis, a multiple of `pieces`.
      pieces: 1 calls the function as it is.
    """
    if pieces == 1:
        return function(*rows, jnp.zeros((), jnp.int32))

    def strided(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)

    def body(total: Any, piece: Any) -> tuple[Any, None]:
        part, number = piece
        return jax.tree.map(jnp.add, total, function(*part, number)), None

    cut = (jax.tree.map(strided, rows), jnp.arange(pieces))
    shapes = jax.eval_shape(
        function, *jax.tree.map(lambda x: x[0], cut)[0], jnp.zeros((), jnp.int32)
    )
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zero, cut)[0]
