"""The best checkpoint is told by a number that each of them has and all processes know."""

from pathlib import Path

import numpy as np
import pytest

from lara_jax.best_metric import ACTION_SCORES, IMAGINED_SCORES, SLOT_SCORES, check_best_metric
from lara_jax.config import load_recipe
from lara_jax.evals.held_out import Latents, action_scores, latent_scores

EVALUATED = ("eval.every_steps=5", "checkpoint.every_steps=10")


def check(repository: Path, name: str, *overrides: str) -> None:
    settings = [f"checkpoint.best_metric={name}", *overrides]
    check_best_metric(load_recipe(repository / "configs" / "debug.py", settings))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("", ()),
        ("loss", ("train.stages=action",)),
        ("loss_action", ()),
        ("loss_token", ()),
        ("gradient_norm", ()),
        ("eval_loss_action", EVALUATED),
        ("eval_position_m", EVALUATED),
        ("eval_mean_action_action_error", EVALUATED),
        ("eval_slot_rank", EVALUATED),
        ("eval_imagined_right", EVALUATED),
        ("eval_text_token_right", EVALUATED),
        ("eval_action_token_right", EVALUATED),
    ],
)
def test_what_a_run_has(repository: Path, name: str, overrides: tuple[str, ...]) -> None:
    check(repository, name, *overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("lss", (), r"best_metric is 'lss'; allowed in this run: loss_token, .*rate_expert$"),
        ("loss", (), "the stages weigh their losses differently"),
        ("loss_token", ("train.stages=action",), "allowed in this run: loss, loss_action"),
        ("samples_per_second", (), "not the same in all processes"),
        ("eval_slot_drift", EVALUATED, "not the same in all processes"),
        ("eval_position_m", ("eval.every_steps=0",), r"need config\.eval\.every_steps"),
        ("eval_position_m", ("train.stages=latent_1", *EVALUATED), "eval_loss_token"),
        ("eval_text_token_right", ("train.stages=latent_3", *EVALUATED), "eval_action_token_right"),
        ("eval_action_token_right", ("train.stages=action", *EVALUATED), "eval_loss_action"),
        (
            "eval_imagined_rank",
            ("model.img_next_tokens=0", "train.stages=action", *EVALUATED),
            "eval_slot_rank",
        ),
        (
            "eval_position_m",
            ("eval.every_steps=10", "checkpoint.every_steps=5"),
            r"measured every 10 steps .* saved every 5 .* multiple",
        ),
    ],
)
def test_what_it_has_not(
    repository: Path, name: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(repository, name, *overrides)


def test_the_names_are_those_of_the_evaluation() -> None:
    target, mask = np.zeros((1, 2, 7)), np.ones((1, 2), bool)
    found = {
        name
        for encoding in ("EEF_POS", "JOINT_POS")
        for name in action_scores(encoding, target, target, mask, (0.0,) * 7)
    }
    assert found == {prefix + name for prefix in ("", "mean_action_") for name in ACTION_SCORES}
    rows = np.random.default_rng(0).normal(size=(4, 3, 8))
    hidden = Latents(slots=rows, imagined=rows, seen=rows, moves=np.ones(4, bool))  # type: ignore[arg-type]
    before = {"numbers": np.arange(4), "slots": rows.astype(np.float32)}
    scores = latent_scores(hidden, np.arange(4), before)
    assert set(scores) == {*SLOT_SCORES, *IMAGINED_SCORES, "slot_drift"}
