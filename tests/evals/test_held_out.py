"""Held-out evaluation: which steps, what is measured, and that training does not notice."""

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax import checkpoint, train
from lara_jax.checkpoint import load_params
from lara_jax.config import load_recipe
from lara_jax.evals import held_out, run_report
from lara_jax.evals.held_out import (
    Latents,
    action_scores,
    latent_scores,
    means,
    right_tokens,
    spread,
)
from lara_jax.evals.report import sample_files
from lara_jax.losses import Sum
from tests.data_pipelines.handmade import tabletop_record, write_tabletop
from tests.soak import tiny


@pytest.mark.parametrize(("steps", "batches", "size"), [(100, 2, 4), (5, 3, 4), (3, 1, 4)])
def test_steps_are_spread_counted_once_and_always_the_same(
    steps: int, batches: int, size: int
) -> None:
    parts = list(spread(steps, batches, size))
    assert [len(numbers) for numbers, _ in parts] == [size] * len(parts)
    counted = np.concatenate([numbers[:count] for numbers, count in parts])
    assert len(set(counted)) == len(counted) == min(steps, batches * size)
    assert {counted.min(), counted.max()} == {0, steps - 1}
    again = [numbers for numbers, _ in spread(steps, batches, size)]
    np.testing.assert_array_equal(np.concatenate(again), np.concatenate([n for n, _ in parts]))


def test_the_first_rows_are_spread_too() -> None:
    (numbers, _), *_ = spread(1000, 10, 20)
    assert numbers.min() < 200 and numbers.max() > 800


def test_a_split_without_steps_is_refused_before_anything_is_trained(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.use_tiny_model(monkeypatch.setattr)
    records = [tabletop_record(seed, 5) for seed in range(3)]
    records[-1]["steps/language_instruction"] = [b""] * 5
    data = write_tabletop(tmp_path / "data" / "lara_tabletop", records)
    settings = [
        f"data.path={data}", "data.filters=no_language", "data.split=train[:-1]",
        "data.eval_split=train[-1:]", "data.batch_size=4", "train.steps=2", "train.stages=action",
        "eval.every_steps=1",
    ]  # fmt: skip
    recipe = load_recipe(repository / "configs/debug.py", settings)
    with pytest.raises(ValueError, match=r"is left to evaluate, 5 being left out by no_lang"):
        train.train(recipe, tmp_path / "run")


def test_a_loss_that_counts_nothing_is_left_out() -> None:
    sums = {
        "loss_token": Sum(np.array([3.0, 1.0]), np.array([2, 2])),
        "loss_visual": Sum(np.zeros(2), np.zeros(2)),
    }
    assert means(sums) == {"loss_token": 1.0}


def test_right_tokens_are_counted_by_kind() -> None:
    ids = jnp.array([[1, 6, 7, 3], [2, 5, 0, 0]])
    said = jnp.array([[1, 6, 5, 3], [1, 5, 0, 0]])
    counts = jnp.array([[False, True, True, True], [True, True, False, False]])
    batch: Any = SimpleNamespace(suffix_ids=ids, loss_mask=counts)
    found = right_tokens(jax.nn.one_hot(said, 8), batch, (5, 8))
    text, action = found["text_token_right"], found["action_token_right"]
    assert text.totals.tolist() == [1, 0] and text.counts.tolist() == [1, 1]
    assert action.totals.tolist() == [1, 1] and action.counts.tolist() == [2, 1]
    assert means(found) == {"text_token_right": 0.5, "action_token_right": pytest.approx(2 / 3)}


def test_action_errors_are_physical_and_beside_the_mean_action() -> None:
    target = np.zeros((1, 2, 7))
    target[..., 6] = 1  # open
    predicted = target + np.array([0.01, 0.01, 0.01, 0.2, 0.2, 0.2, 0])
    predicted[0, 1] += 100  # past the end
    found = action_scores(
        "EEF_POS", predicted, target, np.array([[True, False]]), (0.03, 0, 0, 0, 0, 0, 0.2)
    )
    assert found == {
        "position_m": pytest.approx(0.01),
        "rotation_rad": pytest.approx(0.2),
        "gripper_accuracy": 1.0,
        "mean_action_position_m": pytest.approx(0.01),
        "mean_action_rotation_rad": 0.0,
        "mean_action_gripper_accuracy": 0.0,
    }


def test_other_action_spaces_have_one_error() -> None:
    target = np.zeros((1, 2, 2))
    mask = np.array([[True, False]])
    predicted = target + np.array([[1, 3], [9, 9]])
    found = action_scores("NAV_2D", predicted, target, mask, (0.5, 0.5))
    assert found == {"action_error": 2.0, "mean_action_action_error": 0.5}


def latents_of(slots: np.ndarray, imagined: np.ndarray | None = None) -> Any:
    moves = np.array([True] * (len(slots) - 1) + [False])
    seen = None if imagined is None else np.arange(len(slots))[:, None, None] * np.ones((1, 1, 2))
    return Latents(slots=slots, imagined=imagined, seen=seen, moves=moves)


def test_latent_scores_say_what_can_be_said() -> None:
    rng = np.random.default_rng(0)
    slots, numbers = rng.normal(size=(4, 3, 8)), np.arange(4)
    assert set(latent_scores(latents_of(slots), numbers, None)) == {"slot_rank", "slot_cosine"}
    assert latent_scores(latents_of(slots[:, :0]), numbers, None) == {}
    before = {"numbers": numbers, "slots": slots.astype(np.float32)}
    assert latent_scores(latents_of(slots), numbers, before)["slot_drift"] == pytest.approx(0)
    # Other rows, or another number of slots, cannot be compared.
    assert "slot_drift" not in latent_scores(latents_of(slots), numbers + 1, before)
    assert "slot_drift" not in latent_scores(latents_of(slots[:, :2]), numbers, before)


def test_rows_without_a_next_frame_imagine_nothing() -> None:
    """Of three rows that move, two are nearest to their own next frame; the fourth is left out."""
    imagined = np.array([0.1, 1.1, 0.2, 2.0])[:, None, None] * np.ones((1, 1, 2))
    found = latent_scores(latents_of(np.zeros((4, 0, 8)), imagined), np.arange(4), None)
    assert found["imagined_right"] == pytest.approx(2 / 3)


class Steps:
    """A source whose frames of step n are all 10 n, and 10 n + 1 next."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        image = np.full((1, 2, 2, 3), 10 * number, np.uint8)
        return {"images": image, "next_images": image + 1, "instruction": f"step {number}"}


def test_pictures_show_the_next_frame_that_is_nearest_to_the_imagined_one() -> None:
    """Row 2 imagines what row 0 sees next; row 3 does not move."""
    imagined = np.array([0.1, 1.1, 0.2, 2.0])[:, None, None] * np.ones((1, 1, 2))
    hidden = latents_of(np.zeros((4, 1, 8)), imagined)
    found = held_out._pictures(Steps(), np.array([5, 6, 7, 8]), hidden)  # type: ignore[arg-type]
    assert found["right"].tolist() == [True, True, False]
    assert found["frames"][:, 0, 0, 0].tolist() == [50, 60, 70]
    assert found["next_frames"][:, 0, 0, 0].tolist() == [51, 61, 71]
    assert found["nearest_frames"][:, 0, 0, 0].tolist() == [51, 61, 51]
    assert found["words"].tolist() == ["step 5", "step 6", "step 7"]


def test_the_newest_samples_stay_and_void_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        held_out._save(tmp_path, step, {"numbers": np.array([step])}, keep=2)
    assert list(sample_files(tmp_path)) == [20, 30]
    before = held_out._before(tmp_path, 30)
    assert before is not None and before["numbers"] == [20]
    held_out._save(tmp_path, 25, {"numbers": np.array([25])}, keep=2)  # resumed from before 30
    assert list(sample_files(tmp_path)) == [20, 25]
    assert held_out._before(tmp_path, 20) is None


@pytest.mark.parametrize(("eval_steps", "checkpoint_steps"), [(1, 2), (10, 10), (30, 20), (7, 20)])
def test_enough_samples_stay_for_a_run_that_goes_back(
    tmp_path: Path, eval_steps: int, checkpoint_steps: int
) -> None:
    """Killed at any step, it finds what came before its next evaluation."""
    keep = held_out.files_to_keep(eval_steps, checkpoint_steps)
    for step in range(eval_steps, 20 * eval_steps, eval_steps):
        held_out._save(tmp_path, step, {"numbers": np.array([step])}, keep=keep)
        # The checkpoint of the newest multiple may not be whole yet.
        resumed = max(0, step // checkpoint_steps - 1) * checkpoint_steps
        following = (resumed // eval_steps + 1) * eval_steps
        before = held_out._before(tmp_path, following)
        expected = following - eval_steps
        assert expected == 0 or (before is not None and before["numbers"] == [expected])


def eval_rows(workdir: Path) -> list[dict[str, str]]:
    with (workdir / "eval.csv").open() as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_training_does_not_notice(repository: Path, tmp_path: Path) -> None:
    """The end of a run with evaluation is that of the run without, to the last bit."""
    data = write_tabletop(tmp_path / "data" / "lara_tabletop")
    overrides = [
        f"data.path={data}", "data.eval_split=train[-1:]", "data.split=train[:-1]",
        "data.batch_size=4", "train.steps=4", "train.stages=action",
        "stages.action.trains=action_only", "model.dropout=0.2",  # quick to compile
        "checkpoint.every_steps=2", "log.every_steps=1", "eval.batches=2",
    ]  # fmt: skip

    def run(workdir: Path, every_steps: int) -> str:
        settings = [*overrides, f"eval.every_steps={every_steps}"]
        train.train(load_recipe(repository / "configs/debug.py", settings), workdir)
        return checkpoint.digest(load_params(workdir))

    compiled = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    try:
        plain = run(tmp_path / "run", 0)
        assert eval_rows(tmp_path / "run") == []
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        assert run(tmp_path / "run", 1) == plain
    finally:
        jax.config.update("jax_compilation_cache_dir", compiled)

    rows = eval_rows(tmp_path / "run")
    assert {row["stage"] for row in rows} == {"action"}
    assert {row["dataset"] for row in rows} == {"lara_tabletop"}
    found = {(int(row["step"]), row["metric"]): float(row["value"]) for row in rows}
    for metric in ("loss_action", "position_m", "rotation_rad", "slot_rank", "imagined_right"):
        assert all(np.isfinite(found[step, metric]) for step in (3, 4)), metric
    assert found[3, "loss_action"] != found[4, "loss_action"]
    # The same steps and the same noise; the backbone rests in this stage, and so do the thoughts.
    assert found[3, "mean_action_position_m"] == found[4, "mean_action_position_m"]
    assert found[3, "slot_rank"] == found[4, "slot_rank"]
    assert found[4, "slot_drift"] == pytest.approx(0)

    assert run_report.main(["--workdir", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("Held-out action error", "Latent thoughts", "Imagined next frames", "6.76"):
        assert words in page
