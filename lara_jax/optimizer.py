"""AdamW with a learning rate for each part of the model and one schedule for each stage.

    gradients -> 0 where a stage does not train -> clip by global norm -> Adam -> decay -> rate

A pretrained backbone wants small steps, a fresh action expert large ones, so every parameter
belongs to a part with its own rate. Within a stage all rates follow one curve f, in proportion::

    rate(part, n) = rate(part) f(n)        f   1 |   .-.
                                                 |  /   `-.      warm-up: n / w
    f ends at final_rate / base_rate             | /       `-._  then half a cosine
                                               0 +------------- n of the stage's steps

A part that a stage does not train has gradient, rate and so weight decay 0 there.

Source: the reference's optimizer groups and `cosine_with_min_lr` schedule (its minimum is a
proportion of the base rate); arXiv 2602.01166.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lara_jax.config import OptimizerConfig, Recipe
from lara_jax.curriculum import Stage, spans

# Part of every top-level name of the parameter tree.
PARTS = {"vision": "backbone", "text": "backbone", "action_expert": "expert"}

TRAINED = {
    "backbone": ("backbone",),
    "action_only": ("expert",),
    "full": ("backbone", "expert"),
}

Schedule = Callable[[Any], Any]


def part_labels(params: Any) -> Any:
    """The same tree with the name of its part in place of each parameter.

    Raises:
      ValueError: a top-level name that `PARTS` does not know.
    """
    unknown = sorted(set(params) - set(PARTS))
    if unknown:
        raise ValueError(f"no learning rate for parameters under {unknown}; known: {list(PARTS)}")
    return {name: jax.tree.map(lambda _, n=name: PARTS[n], tree) for name, tree in params.items()}


def warmup_cosine(steps: int, warmup_fraction: float, floor: float) -> Schedule:
    """f(n): linear from 0 over ceil(steps * warmup_fraction) steps, then half a cosine to `floor`.

    Args:
      steps: of the stage.
      warmup_fraction: 0 to 1.
      floor: f at the stage's end, 0 to 1.

    Source: `transformers.optimization.get_cosine_with_min_lr_schedule_with_warmup`.
    """
    warmup = math.ceil(steps * warmup_fraction)

    def curve(n: Any) -> Any:
        n = jnp.asarray(n, jnp.float32)
        progress = jnp.clip((n - warmup) / max(1, steps - warmup), 0.0, 1.0)
        cosine = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(n < warmup, n / max(1, warmup), cosine)

    return curve


def learning_rates(
    config: OptimizerConfig, stages: Sequence[Stage], steps: int
) -> dict[str, Schedule]:
    """The learning rate of each part as a function of the run's step."""
    peaks = {"backbone": config.backbone_rate, "expert": config.expert_rate}
    floor = config.final_rate / config.base_rate

    def rate(part: str) -> Schedule:
        curves, ends = [], []
        for stage, start, end in spans(stages, steps):
            peak = peaks[part] if part in TRAINED[stage.trains] else 0.0
            curve = warmup_cosine(end - start, config.warmup_fraction, floor)
            curves.append(lambda n, peak=peak, curve=curve: peak * curve(n))
            ends.append(end)
        return optax.join_schedules(curves, ends[:-1])

    return {part: rate(part) for part in peaks}


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """The optimizer of a whole run: rates and what trains follow from its own step counter."""
    config, steps = recipe.optimizer, recipe.train.steps
    rates = learning_rates(config, recipe.stages, steps)

    def per_part(schedule: Callable[[str], Schedule]) -> optax.GradientTransformation:
        scales = {part: optax.scale_by_schedule(schedule(part)) for part in rates}
        return optax.multi_transform(scales, part_labels)

    return optax.chain(
        per_part(lambda part: _trains(part, recipe.stages, steps)),
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay),
        per_part(lambda part: lambda n: -rates[part](n)),
    )


def _trains(part: str, stages: Sequence[Stage], steps: int) -> Schedule:
    """1 in the stages that train the part, else 0."""
    spanned = spans(stages, steps)
    values = [
        optax.constant_schedule(float(part in TRAINED[stage.trains])) for stage, _, _ in spanned
    ]
    return optax.join_schedules(values, [end for _, _, end in spanned[:-1]])
