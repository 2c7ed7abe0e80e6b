"""Tables, plots and animations of a run."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lara_jax.evals.report import format_table, loss_table, plot_losses, read_curves, save_gif

CSV = """step,stage,loss,action_loss,token_loss,learning_rate
1,explicit,4.0,1.0,3.0,0.1
2,explicit,2.0,0.5,1.5,0.1
3,latent,1.0,,0.5,0.1
4,latent,0.5,0.25,,0.1
"""


@pytest.fixture
def metrics_csv(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.csv"
    path.write_text(CSV)
    return path


def test_table_aligns_text_left_and_numbers_right() -> None:
    table = format_table(["name", "value"], [["a", 1.23456], ["longer", 12]])
    assert table.splitlines() == [
        "name    value",
        "------  -----",
        "a       1.235",
        "longer     12",
    ]


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(ValueError, match="row has 1 values"):
        format_table(["a", "b"], [[1]])


def test_curves_skip_empty_cells_and_other_columns(metrics_csv: Path) -> None:
    curves = {(curve.stage, curve.metric): curve for curve in read_curves(metrics_csv)}
    assert set(curves) == {
        (stage, metric)
        for stage in ("explicit", "latent")
        for metric in ("loss", "action_loss", "token_loss")
    }
    np.testing.assert_array_equal(curves["latent", "action_loss"].steps, [4])
    np.testing.assert_array_equal(curves["latent", "action_loss"].values, [0.25])
    (only,) = read_curves(metrics_csv, metrics=["learning_rate"])[:1]
    assert only.metric == "learning_rate"


def test_loss_table_shows_first_and_last(metrics_csv: Path) -> None:
    lines = loss_table(read_curves(metrics_csv)).splitlines()
    assert lines[0].split() == ["stage", "loss", "steps", "first", "last", "change"]
    assert lines[2].split() == ["explicit", "loss", "1-2", "4", "2", "-50", "%"]


def test_plot_is_a_picture(metrics_csv: Path, tmp_path: Path) -> None:
    plot_losses(read_curves(metrics_csv), tmp_path / "plots" / "loss.png")
    with Image.open(tmp_path / "plots" / "loss.png") as picture:
        assert picture.size[0] > 800
        assert np.asarray(picture.convert("RGB")).std() > 1


@pytest.mark.parametrize(
    ("text", "metrics", "message"),
    [
        ("step,loss\n1,2\n", None, "stage"),
        ("step,stage,loss\n", None, "no values"),
        ("step,stage,loss\n1,a,\n", None, "no values"),
        ("step,stage,speed\n1,a,3\n", None, "no values"),
        (CSV, ["accuracy"], "accuracy"),
    ],
)
def test_useless_metrics_raise(
    tmp_path: Path, text: str, metrics: list[str] | None, message: str
) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_curves(path, metrics=metrics)


def test_missing_metrics_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        read_curves(tmp_path / "metrics.csv")


def test_gif_shows_episodes_side_by_side_until_the_longest_ends(tmp_path: Path) -> None:
    red = np.zeros((8, 8, 3), np.uint8) + np.uint8([255, 0, 0])
    frames = [red // (index + 1) for index in range(5)]
    path = tmp_path / "rollout.gif"
    save_gif(path, [(frames, "long"), (frames[:2], "short"), ([], "not recorded")])
    with Image.open(path) as animation:
        assert animation.n_frames == 5 and animation.size == (512, 296)
        animation.seek(4)
        pixels = np.asarray(animation.convert("RGB")).astype(int)
    assert abs(pixels[100, 100, 0] - 51) < 12 and abs(pixels[100, 400, 0] - 127) < 12


def test_gif_without_frames_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episode has frames"):
        save_gif(tmp_path / "rollout.gif", [([], "nothing")])
