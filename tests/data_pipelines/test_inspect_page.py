"""The page: parses, needs nothing else, escapes text, shows what the index holds."""

import base64
import io
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.catalog import Part
from data_pipelines.index.build import build_index
from data_pipelines.index.format import FLAGS
from data_pipelines.inspect_figures import (
    BINS,
    BOTTOM,
    BOX_COLOURS,
    FRAME_PX,
    LEFT,
    POINTS,
    RIGHT,
    TOP,
    curve,
    frame,
    histogram,
)
from data_pipelines.inspect_page import main, write_page
from data_pipelines.statistics import index_statistics
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines import made_index
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)

VOID = {"img", "meta", "br"}


def pixels_of(uri: str) -> np.ndarray:
    """A data URI's picture, decoded."""
    uri = uri.removeprefix('<img src="').split('"')[0]
    kind, data = uri.split(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == f"data:image/{image.format.lower()}"
    return np.asarray(image.convert("RGB"))


class Page(HTMLParser):
    """A page taken apart; tags must be closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.texts: list[str] = []
        self.plots = 0
        self.pictures: list[np.ndarray] = []
        self.tables: list[list[list[str]]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values: Mapping[str, str] = dict(attrs)
        assert tag not in ("script", "link", "iframe") and "href" not in values
        if tag == "img":
            self.pictures.append(pixels_of(values["src"]))
        else:
            assert "src" not in values
        self.plots += tag == "svg"
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open_tags and self.open_tags[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def test_the_page_of_a_dataset(tmp_path: Path) -> None:
    pause = FLAGS["pause"]
    index = made_index.write(
        tmp_path / "index",
        (6, 4, 5),
        flags=[pause] * 2 + [0] * 13,
        annotation=Annotation("grasp <i>it</i>", ((0.1, 0.2, 0.5, 0.9),), "Move forward."),
        frames=True,
    )
    out = tmp_path / "pages" / "page.html"
    write_page([Part(index=index)], out, filters=["pause"], episodes=2)
    page = Page(out)
    facts = {row[0]: row[1] for row in page.tables[0]}
    assert facts["control rate"] == "5 Hz" and facts["robot"] == "a robot"
    assert facts["cameras"] == "image (primary), encoded, 16x24 px (height x width)"
    counts = {row[0]: row[1:] for row in page.tables[1]}
    assert counts["flagged pause"] == ["2", "left out"]
    assert counts["flagged failed"] == ["0", ""]
    assert counts["steps left (filters: pause)"][0] == "13"
    statistics = index_statistics(index, filters=["pause"])
    action = page.tables[2]
    assert action[0] == ["action", "normalised by", "min", "max", "mean", "std", "q01", "q99"]
    assert action[1][:3] == ["dx", "q99", f"{statistics.action.min[0]:.5g}"]
    assert [len(table) for table in page.tables[2:4]] == [1 + 7, 1 + 8]
    assert page.tables[4][1] == ["put the <b>cup</b> & plate down", "15", "100.00 %"]
    assert "grasp <i>it</i>" in page.text and "Move forward." in page.text
    assert "Episode 0: episode_0" in page.text and "Episode 2: episode_2" in page.text
    assert [picture.shape for picture in page.pictures] == [(FRAME_PX, 240, 3)] * (6 + 5)
    # A histogram for each dimension of action and state; two curves of actions in each episode.
    assert page.plots == (7 + 8) + 2 * (7 + 7)


def test_the_page_of_a_directory_with_annotations(tmp_path: Path) -> None:
    records = [tabletop_record(seed, steps) for seed, steps in ((0, 4), (1, 3), (2, 5))]
    for record in records:
        # The destination of these is not visible.
        record["steps/reasoning/boxes"][:] = [[0.2, 0.3, 0.6, 0.8], [np.nan] * 4]
    directory = write_tabletop(tmp_path / "tabletop", records)
    build_index(directory, "train", workers=1)
    out = tmp_path / "page.html"
    assert main([str(directory), "--out", str(out)]) == 0
    page = Page(out)
    assert page.text.count("subtask 4") == 1 and page.text.count("motion 0") == 3
    assert len(page.pictures) == 4 + 3 + 5
    for picture in page.pictures:  # the box's upper edge, 240 x 160 px
        edge = picture[47:50, 60:130].astype(int).mean(axis=(0, 1))
        assert edge[0] - edge[2] > 40


def test_the_page_of_real_data(tmp_path: Path, shared_dir: Path) -> None:
    source = shared_dir / "data/bridge_dataset/1.0.0"
    index = build_index(source, "train", tmp_path / "index", workers=1)
    write_page([Part(index=index)], tmp_path / "page.html", episodes=2)
    page = Page(tmp_path / "page.html")
    assert ["robot", "WidowX"] in page.tables[0]
    assert len(page.pictures) == 2 * 4 * 8
    assert page.tables[4][1] == ["put carrot on plate", "64", "32.00 %"]


def test_the_page_of_a_mixture(tmp_path: Path) -> None:
    parts = [
        Part(
            index=made_index.write(
                tmp_path / name, lengths, spec=replace(made_index.SPEC, name=name)
            )
        )
        for name, lengths in (("one", (6,)), ("two", (4, 8)))
    ]
    write_page(parts, tmp_path / "p.html", weights=[2, 1], title="a & b", episodes=0)
    page = Page(tmp_path / "p.html")
    assert page.text.count("a & b") == 2  # the tab's title and the heading
    assert page.tables[0] == [
        ["set", "episodes", "steps", "weight", "share of the samples"],
        ["one", "1", "6", "2", "50.00 %"],
        ["two", "2", "12", "1", "50.00 %"],
    ]
    assert (len(page.pictures), page.plots) == (0, 2 * (7 + 8))


def test_a_frame_that_does_not_decode_is_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = made_index.write(tmp_path / "index", (3,), frames=True)
    file = Path(index.source) / "frames.bin"
    data = bytearray(file.read_bytes())
    data[int(index.frames["image"][1]["offset"]) + 9] ^= 1
    file.write_bytes(data)
    out = tmp_path / "page.html"
    assert main([str(index.folder), "--out", str(out), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["broken_frames"] == 1
    page = Page(out)
    assert "record 0, step 1, camera 'image'" in page.text
    assert len(page.pictures) == 2


def test_boxes_are_drawn_where_they_are() -> None:
    grey = np.full((80, 80, 3), 128, np.uint8)
    boxes = ((0.25, 0.5, 0.75, 0.9), (-5.0, 0.8, 1e9, 0.1))  # the second reaches far outside
    picture = pixels_of(frame(grey, boxes, "")).astype(int)
    first, second = (
        np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) for colour in BOX_COLOURS
    )

    def near(row: int, column: int, colour: np.ndarray) -> bool:
        return bool(np.abs(picture[row, column] - colour).max() < 90)

    assert near(110, 40, first) and near(110, 119, first) and near(80, 80, first)
    assert near(16, 5, second) and near(127, 155, second)
    assert np.abs(picture[30:70, 5:155] - 128).max() < 30
    assert np.abs(pixels_of(frame(grey, (), "")).astype(int) - 128).max() < 5


def points_of(svg: str) -> np.ndarray:
    points = re.search(r'points="([^"]*)"', svg)
    assert points
    return np.array([pair.split(",") for pair in points[1].split()], float)


def test_a_curve_goes_through_its_values() -> None:
    svg = curve(np.array([0, 4, 1], np.float32), "<gripper>")
    middle = (LEFT + RIGHT) / 2
    quarter = BOTTOM - (BOTTOM - TOP) / 4
    np.testing.assert_allclose(
        points_of(svg), [[LEFT, BOTTOM], [middle, TOP], [RIGHT, quarter]], atol=0.051
    )
    assert "&lt;gripper&gt;</text>" in svg and ">0</text>" in svg and ">4</text>" in svg
    assert points_of(curve(np.full(3, 7.0), ""))[:, 1].std() == 0
    inside = points_of(curve(np.array([0.0, 1.0]), "", extent=(-1, 1)))[:, 1]
    np.testing.assert_allclose(inside, [(TOP + BOTTOM) / 2, TOP], atol=0.051)
    assert len(points_of(curve(np.arange(10 * POINTS + 1), ""))) <= POINTS
    assert np.isfinite(points_of(curve(np.array([2.0]), ""))).all()


def test_a_histogram_marks_the_quantiles_and_counts_what_lies_beyond() -> None:
    values = np.concatenate([np.linspace(0, 0.999, 1000), [50.0, -50.0]])
    svg = histogram(values, "x", extent=(-50.0, 0.0, 1.0, 50.0))
    bars, *marks = re.findall(r'<path d="(M[^"]*)" (?:fill|stroke="#[^b])', svg)
    # The range is -1 to 2: a third of the bars hold values, and the outermost ones the outliers.
    assert len(bars.split("M")) - 1 == BINS // 3 + 2
    assert bars.startswith(f"M{LEFT:.1f}") and f"H{RIGHT:.1f}" in bars
    third = (RIGHT - LEFT) / 3
    assert [mark.split()[0] for mark in marks] == [f"M{LEFT + third:.1f}", f"M{RIGHT - third:.1f}"]
    constant = histogram(np.full(9, 3.0), "x", extent=(3.0, 3.0, 3.0, 3.0))
    assert ">2.5</text>" in constant and "nan" not in constant


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(made_index.write(tmp_path / name, (3,)).folder) for name in ("a", "b")]
    out = tmp_path / "page.html"
    arguments = [*folders, "--out", str(out), "--episodes", "0"]
    assert main([*arguments, "--weights", "1", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(x["dataset"], x["steps"], x["weight"], x["share"]) for x in lines] == [
        ("made", 3, 1.0, 0.25),
        ("made", 3, 3.0, 0.75),
    ]
    assert lines[0]["page"] == str(out) and lines[0]["flags"]["pause"] == 0
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}: 2 sets, 6 steps\n"


def test_a_mixture_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its sets lie in a folder by name."""
    definitions, sets = tmp_path / "mine.toml", tmp_path / "sets"
    definitions.write_text(
        '[mixtures.mine]\nentries = [["lara_tabletop", 2.0]]\n'
        '[mixtures.more]\nentries = [["lara_tabletop", 2.0], ["bridge_orig", 1.0]]\n'
    )
    record = tabletop_record(0, 4)
    record["steps/reasoning/boxes"][:] = np.nan
    build_index(write_tabletop(sets / "lara_tabletop", [record]), "train", workers=1)
    arguments = [str(sets), "--definitions", str(definitions), "--json", "--episodes", "0"]
    arguments += ["--out", str(tmp_path / "page.html"), "--mixture"]
    assert main([*arguments, "mine"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["dataset"], line["steps"], line["weight"]) == ("lara_tabletop", 4, 2.0)
    assert "<h1>mine</h1>" in (tmp_path / "page.html").read_text()
    with pytest.raises(FileNotFoundError, match="bridge_orig"):
        main([*arguments, "more"])
    with pytest.raises(ValueError, match="no weights"):
        main([*arguments, "mine", "--weights", "1"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    index = made_index.write(tmp_path / "index", (3,))
    for keywords, message in (
        ({"weights": [1, 2]}, "1 sets and 2 weights"),
        ({"weights": [0]}, r"weights \[0\]: they must be positive"),
        ({"weights": [float("nan")]}, "must be positive"),
        ({"filters": ["pauses"]}, "unknown filters"),
        ({"episodes": -1}, "-1 episodes"),
    ):
        with pytest.raises(ValueError, match=message):
            write_page([Part(index=index)], tmp_path / "page.html", **keywords)
    with pytest.raises(ValueError, match="0 sets"):
        write_page([], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_part_of_a_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tabletop(tmp_path, [tabletop_record(0, 4), tabletop_record(1, 3)])
    arguments = [str(path), "--json", "--episodes", "1", "--out", str(tmp_path / "page.html")]
    assert main([*arguments, "--split", "train[1:]"]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["dataset"], line["split"]) == ("lara_tabletop", "train[1:]")
    assert (line["episodes"], line["rows"], line["steps"]) == (1, 3, 3)
    page = Page(tmp_path / "page.html")
    assert "episode_1" in page.text and "episode_0" not in page.text
    assert page.tables[4][1:] == [["task 1", "3", "100.00 %"]]
    with pytest.raises(ValueError, match=r"'train\[2:\]' holds none of the 2 episodes"):
        main([*arguments, "--split", "train[2:]"])


def test_a_set_that_files_call_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = [[tabletop_record(0, 4)]]
    path = write_directory(tmp_path / "1.0.0", "o10", TABLETOP_FEATURES, {"train": shards})
    arguments = ["--name", "lara_tabletop", "--json", "--out", str(tmp_path / "page.html")]
    assert main([str(path), *arguments]) == 0
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["dataset"], line["steps"]) == ("lara_tabletop", 4)
    with pytest.raises(ValueError, match="--name lara_tabletop is of one dataset; 2 are given"):
        main([str(path), str(path), *arguments])
