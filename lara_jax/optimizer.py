"""AdamW over what trains: a rate for each part of the model, a schedule for each stage, groups.

    a parameter's path --> part: which stages train it, its peak rate
                       --> group: factors on rate and decay, or frozen for good

    gradients of what the stage trains -> clip by global norm -> Adam -> decay -> rate

A pretrained backbone wants small steps, a fresh action expert large ones, so every parameter
belongs to a part with its own rate. Within a stage all rates follow one curve f, in proportion::

    rate(part, n) = rate(part) f(n)        f   1 |   .-.
                                                 |  /   `-.      warm-up: n / w
    f ends at final_rate / base_rate             | /       `-._  then half a cosine
                                               0 +------------- n of the stage's steps

What no stage trains has no moments. What one stage trains and another does not keeps its moments
through the other, untouched: the optimizer's state has one shape for the whole run.

Source: the reference's optimizer groups and `cosine_with_min_lr` schedule (its minimum is a
proportion of the base rate); arXiv 2602.01166.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lara_jax.config import Recipe
from lara_jax.curriculum import Stage, spans
from lara_jax.lora import LORA, adapted
from lara_jax.optimizer_config import OptimizerConfig, ParameterGroup
from lara_jax.param_tree import check_patterns, flat, matches, nested, select

# Part of every network, the first name of a parameter's path.
PARTS = {"vision": "backbone", "text": "backbone", "action_expert": "expert"}

TRAINED = {
    "backbone": ("backbone",),
    "action_only": ("expert",),
    "full": ("backbone", "expert"),
}

# The two moments between steps, by `OptimizerConfig.moments`.
MOMENT_DTYPES = {
    "float32": (jnp.float32, jnp.float32),
    "bfloat16_first": (jnp.bfloat16, jnp.float32),
    "bfloat16": (jnp.bfloat16, jnp.bfloat16),
}

Schedule = Callable[[Any], Any]


def part_of(path: str) -> str:
    """The part of a parameter; that of its kernel for a low-rank factor.

    Raises:
      ValueError: a network that `PARTS` does not know.
    """
    network = path.removeprefix(f"{LORA}/").partition("/")[0]
    if network not in PARTS:
        raise ValueError(f"no learning rate for parameters under {network!r}; known: {list(PARTS)}")
    return PARTS[network]


def trained_paths(recipe: Recipe, params: Mapping[str, Any], stages: Sequence[Stage]) -> set[str]:
    """Paths of the parameters that some of these stages trains.

    Args:
      recipe: with the groups that freeze.
      params: the networks' and the low-rank factors; only its paths are read.
      stages: one or more of the recipe's.

    Raises:
      ValueError: a group's pattern matches nothing, a stage trains nothing.
    """
    paths = list(flat(params))
    groups = recipe.optimizer.groups
    for group in groups:
        check_patterns(f"optimizer.groups, {group.name!r}", group.patterns, paths)
    by_factors = adapted(params)
    movable = [
        path
        for path in paths
        if path.partition("/")[0] not in by_factors and not _group(groups, path).freeze
    ]
    trained: set[str] = set()
    for stage in stages:
        own = {path for path in movable if part_of(path) in TRAINED[stage.trains]}
        if not own:
            raise ValueError(
                f"stage {stage.name!r} trains {stage.trains!r}, but optimizer.groups freeze all "
                "of it"
            )
        trained |= own
    return trained


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


def make_optimizer(recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a whole run.

    Its `init` takes all parameters. Its `update(gradients, state, params, step=n)` takes the
    gradients of what the stage of step n trains, a part of the tree, and returns updates of just
    these: the rates follow the run's step, so a step that is skipped does not delay them.
    """
    config = recipe.optimizer
    rates = learning_rates(config, recipe.stages, recipe.train.steps)
    clip = optax.clip_by_global_norm(config.clip_norm)
    adam = _adam(config)

    def init(params: Any) -> dict[str, optax.OptState]:
        trained = select(params, trained_paths(recipe, params, recipe.stages))
        return {part: adam.init(tree) for part, tree in _by_part(trained).items()}

    def update(
        gradients: Any, state: Any, params: Any = None, *, step: jax.Array, **_: Any
    ) -> tuple[Any, Any]:
        gradients, _ = clip.update(gradients, optax.EmptyState())
        values = flat(params)
        updates, state = {}, dict(state)
        for part, tree in _by_part(gradients).items():
            directions, state[part] = adam.update(tree, state[part])
            rate = rates[part](step)
            for path, direction in flat(directions).items():
                group = _group(config.groups, path)
                decay = config.weight_decay * group.decay_factor
                updates[path] = -(rate * group.rate_factor) * (direction + decay * values[path])
        return nested(updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam that computes in float32 and keeps its moments as the config says."""
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
    first, second = MOMENT_DTYPES[config.moments]

    def cast(state: Any, mu: Any, nu: Any) -> Any:
        return state._replace(
            mu=jax.tree.map(lambda x: x.astype(mu), state.mu),
            nu=jax.tree.map(lambda x: x.astype(nu), state.nu),
        )

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = cast(state, jnp.float32, jnp.float32)
        directions, state = adam.update(gradients, state, params)
        return directions, cast(state, first, second)

    return optax.GradientTransformation(
        lambda params: cast(adam.init(params), first, second), update
    )


def _group(groups: Sequence[ParameterGroup], path: str) -> ParameterGroup:
    """The first group with the parameter, or with the kernel of a factor; else a neutral one."""
    kernel = path.removeprefix(f"{LORA}/").rpartition("/")[0] if path.startswith(LORA) else path
    for group in groups:
        if matches(path, group.patterns) or matches(kernel, group.patterns):
            return group
    return ParameterGroup(name="rest", patterns=("*",))


def _by_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree's parts, each as a part of the tree; one without parameters is left out."""
    leaves: dict[str, dict[str, Any]] = {}
    for path, leaf in flat(tree).items():
        leaves.setdefault(part_of(path), {})[path] = leaf
    return {part: nested(some) for part, some in leaves.items()}
