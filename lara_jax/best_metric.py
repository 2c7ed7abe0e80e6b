"""Which numbers of a run may say which of its checkpoints is the best (`checkpoint.best_metric`).

Such a number is in every checkpoint that could be the best, and is the same in every process: each
decides for itself what it keeps. It is compared across stages, so `loss` is one only where all
stages weigh their losses alike. A single loss may still change its meaning (in later stages less
text is left for `loss_token`): one that only the last stage has, as `loss_action` in the paper's
curriculum, chooses among that stage's checkpoints.
"""

import dataclasses

from lara_jax.config import Recipe
from lara_jax.curriculum import spans
from lara_jax.evals.offline import ActionError
from lara_jax.metrics import COLUMNS, MEASURED

# What held-out evaluation makes of an acting stage (`lara_jax.evals.held_out`), by action space.
ACTION_SCORES = (*(entry.name for entry in dataclasses.fields(ActionError)), "action_error")
# Of its thoughts; not `slot_drift`: only the first process has the samples of the time before.
SLOT_SCORES = ("slot_rank", "slot_cosine")
IMAGINED_SCORES = ("imagined_rank", "imagined_right")


def check_best_metric(recipe: Recipe) -> None:
    """Refuses a `checkpoint.best_metric` that cannot tell the run's checkpoints apart.

    Raises:
      ValueError: no stage has it, stages mean different things by it, processes have different
        values of it, or checkpoints are saved without it.
    """
    name, every = recipe.checkpoint.best_metric, recipe.eval.every_steps
    if not name:
        return
    trained, evaluated = _trained(recipe), _evaluated(recipe) if every else []
    given = f"config.checkpoint.best_metric is {name!r}"
    if name in evaluated and recipe.checkpoint.every_steps % every:
        raise ValueError(
            f"{given}, which is measured every {every} steps (config.eval.every_steps), but "
            f"checkpoints are saved every {recipe.checkpoint.every_steps} "
            "(config.checkpoint.every_steps): make the second a multiple of the first"
        )
    if name in (*trained, *evaluated):
        return
    why = ""
    if name == "loss":
        why = "; the stages weigh their losses differently, so that `loss` is not the same in all"
    elif name in (*MEASURED, "eval_slot_drift"):
        why = "; that one is not the same in all processes"
    elif name.startswith("eval_") and not every:
        why = "; held-out numbers need config.eval.every_steps"
    raise ValueError(f"{given}; allowed in this run: {', '.join((*trained, *evaluated))}{why}")


def _trained(recipe: Recipe) -> list[str]:
    """Columns of `metrics.csv` that a stage of the run fills, and that can be compared."""
    stages = [stage for stage, _, _ in spans(recipe.stages, recipe.train.steps)]
    weights = {(stage.token_weight, stage.visual_weight, stage.action_weight) for stage in stages}
    absent = {
        f"loss_{part}"
        for part in ("token", "visual", "action")
        if not any(getattr(stage, f"{part}_weight") for stage in stages)
    }
    if len(weights) > 1:
        absent.add("loss")
    return [name for name in COLUMNS[2:] if name not in (*MEASURED, *absent)]


def _evaluated(recipe: Recipe) -> list[str]:
    """Names of what held-out evaluation can find, as checkpoints have them."""
    names = [name for name in _trained(recipe) if name.startswith("loss_")]
    stages = [stage for stage, _, _ in spans(recipe.stages, recipe.train.steps)]
    if any(stage.token_weight and 1 <= stage.reasoning_stage <= 3 for stage in stages):
        names.append("text_token_right")
    if any(stage.discrete_actions for stage in stages):
        names.append("action_token_right")
    if "loss_action" in names:
        names += [prefix + name for prefix in ("", "mean_action_") for name in ACTION_SCORES]
    if recipe.model.latent_slots:
        names += SLOT_SCORES
    if recipe.teacher.enabled and recipe.model.img_next_tokens:
        names += IMAGINED_SCORES
    return [f"eval_{name}" for name in names]
