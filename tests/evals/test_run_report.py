"""The page of a run, from a directory written by hand."""

import re
from pathlib import Path

import numpy as np
import pytest

from lara_jax.evals.report import read_scores
from lara_jax.evals.run_report import action_section, main, sample_section, slot_section
from lara_jax.metrics import MetricsWriter

SCORES = {
    "position_m": 0.012,
    "mean_action_position_m": 0.034,
    "loss_action": 1.5,
    "slot_rank": 2.25,
    "slot_cosine": 0.5,
}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Two stages of four steps; the second acts, and was looked at."""
    run = tmp_path / "my_run"
    writer = MetricsWriter(run, start_step=0, steps=4)
    for step, stage in enumerate(("explicit", "explicit", "action", "action"), start=1):
        writer.write(step, stage, {"loss": 1 / step, "samples_per_second": 5.0})
        writer.write_scores("datasets", step, stage, {("<set>", "loss_token"): 1.0 * step})
    writer.write_scores("eval", 2, "action", {("<set>", m): 9 * v for m, v in SCORES.items()})
    writer.write_scores("eval", 4, "action", {("<set>", m): v for m, v in SCORES.items()})
    writer.close()
    folder = run / "eval" / "action" / "set"
    folder.mkdir(parents=True)
    np.savez(folder / "2.npz", numbers=np.arange(3))
    np.savez(folder / "4.npz", **samples())
    return run


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "numbers": np.arange(3),
        "predicted": rng.normal(size=(3, 4, 7)),
        "target": rng.normal(size=(3, 4, 7)),
        "mask": np.array([[True] * 4, [True, True, False, False], [True] * 4]),
        "words": np.array(["pick <it>", "put it", "stop"]),
        "frames": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
        "next_frames": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
        "nearest_frames": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
        "right": np.array([True, False, True]),
    }


def test_the_page_is_one_file_that_shows_everything(
    workdir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = workdir / "page.html"
    assert main(["--workdir", str(workdir), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert "my_run, step 4" in page
    for heading in ("Training", "Training, by dataset", "Held-out action error"):
        assert f"<h2>{heading}</h2>" in page
    assert "set, action, step 4" in page and "step 2</h2>" not in page
    assert "&lt;set&gt;" in page and "<set>" not in page
    assert "pick &lt;it&gt;" in page
    links = re.findall(r"(?:src|href)=[\"'](?!data:)[^\"']*", page)
    assert not links and "<script" not in page


def test_what_a_run_has_not_written_is_left_out(workdir: Path) -> None:
    for name in ("datasets.csv", "eval.csv"):
        (workdir / name).unlink()
    assert main(["--workdir", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    assert "by dataset" not in page and "Latent thoughts" not in page


def test_settings_that_cannot_be_read_are_said_so(workdir: Path) -> None:
    folder = workdir / "checkpoints" / "4"
    folder.mkdir(parents=True)
    (folder / "_CHECKPOINT_METADATA").touch()  # complete, and everything in it is missing
    assert main(["--workdir", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    assert "The settings could not be read: " in page and f"{folder} is damaged" in page


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics"):
        main(["--workdir", str(tmp_path)])


def numbers(html: str) -> list[str]:
    return re.findall(r'<td class="n">([^<]*)</td>', html)


def test_action_error_is_the_last_one_in_people_s_units(workdir: Path) -> None:
    _, shown = action_section(read_scores(workdir / "eval.csv"))
    assert numbers(shown) == ["4", "12", "34"]
    assert "position error, mm" in shown


def test_slots_stand_beside_the_papers_ranks(workdir: Path) -> None:
    shown = "".join(slot_section(read_scores(workdir / "eval.csv")))
    assert numbers(shown) == ["4", "2.25", "0.5", "6.76", "5.1"]
    assert list(slot_section({})) == []


def test_a_chunk_is_drawn_up_to_the_end_of_its_episode() -> None:
    drawn = "".join(sample_section(samples()))
    lengths = [len(points.split()) for points in re.findall(r'points="([^"]*)"', drawn)]
    assert lengths == [4] * 14 + [2] * 14 + [4] * 14


def test_an_imagined_frame_stands_beside_the_nearest_one() -> None:
    drawn = "".join(sample_section(samples()))
    pictures = re.findall(r'src="([^"]*)"', drawn)
    assert len(set(pictures)) == 9  # now, next, nearest
    captions = re.findall(r"<figcaption>([^<]*)", drawn)
    own, other = "imagined: its own next", "imagined: another step's next"
    assert captions == ["now", "next", own, "now", "next", other, "now", "next", own]
