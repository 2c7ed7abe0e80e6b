"""Annotations in parts: the lines of the whole file, and what an earlier run did stays."""

import json
from pathlib import Path

import pytest

from data_pipelines.annotate.annotate import annotate_index
from data_pipelines.annotate.episode import AnnotateSettings
from data_pipelines.annotate.writers import RuleWriter
from data_pipelines.convert import annotation_parts
from data_pipelines.convert.annotation_parts import Annotator, Part, parts_of, write_part
from data_pipelines.index.format import Index
from data_pipelines.index.parts import index_source
from tests.data_pipelines.convert import made_source

NUMBERS = (0, 1, 2, 4, 5)  # of the episodes with rows; number 3 has none


@pytest.fixture
def index(tmp_path: Path) -> Index:
    source = made_source.make(tmp_path / "source")
    return index_source(source, tmp_path / "index", workers=1, max_bad_fraction=1.0)


@pytest.fixture
def expected(index: Index, tmp_path: Path) -> list[str]:
    """The lines that `lara data annotate` writes."""
    out = tmp_path / "whole.jsonl"
    annotate_index(
        index, out, writer=RuleWriter(), detector=None, settings=AnnotateSettings(), workers=1
    )
    return out.read_text().splitlines(keepends=True)


def write(index: Index, part: Part, annotator: Annotator | None = None) -> int:
    written = write_part(str(index.folder), index.source, annotator or Annotator(), part)
    assert written.file == part.file
    return written.already_done


def test_parts_are_the_file(
    index: Index, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotation_parts, "EPISODES_PER_PART", 2)
    assert tuple(index.episodes["number"]) == NUMBERS
    parts = parts_of(NUMBERS, str(tmp_path / "parts"))
    assert [(Path(part.file).name, part.episodes) for part in parts] == [
        ("00000000.jsonl", (0, 1)),
        ("00000002.jsonl", (2,)),
        ("00000004.jsonl", (4, 5)),
    ]
    assert [write(index, part) for part in reversed(parts)] == [0, 0, 0]
    texts = [Path(part.file).read_text() for part in parts]
    assert "".join(texts) == "".join(expected)


def test_what_is_done_is_not_done_again(
    index: Index, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = parts_of([0, 1, 4], str(tmp_path))
    wanted = [expected[NUMBERS.index(number)] for number in part.episodes]
    other = json.loads(expected[1])
    other["provenance"]["inputs"] = "of another time"
    Path(part.file).write_text(expected[3] + json.dumps(other) + "\n" + expected[2])
    made = []
    line = Annotator.line
    monkeypatch.setattr(
        Annotator, "line", lambda self, index, n: made.append(n) or line(self, index, n)
    )
    assert write(index, part) == 1
    assert made == [0, 1]
    assert Path(part.file).read_text() == "".join(wanted)
    settings = AnnotateSettings(box_every_steps=2)
    assert write(index, part, Annotator(settings=settings)) == 0
    assert Path(part.file).read_text() != "".join(wanted)


def test_a_line_of_an_episode_that_is_gone(index: Index, expected: list[str]) -> None:
    line = json.loads(expected[4])
    assert Annotator().made(index, line)
    assert not Annotator().made(index, {**line, "number": 3})


def test_a_part_that_is_no_json(index: Index, tmp_path: Path) -> None:
    (part,) = parts_of([0, 1], str(tmp_path))
    Path(part.file).write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"00000000.jsonl, line 1: not JSON"):
        write(index, part)
