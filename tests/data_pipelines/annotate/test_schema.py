"""Our annotation file: what it refuses, and what a killed run leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.annotate.readers import open_provider
from data_pipelines.annotate.schema import AnnotationWriter
from tests.data_pipelines.annotate.small_index import named


def line(number: int, inputs: str = "a", **step: Any) -> dict[str, Any]:
    entry = {"subtask": f"subtask {number}", "boxes": [], "motion": "Hold still.", **step}
    return {
        "schema": 1,
        "key": f"episode_{number}",
        "number": number,
        "steps": {"3": entry},
        "provenance": {"dataset": "small", "split": "train", "stored_steps": 5, "inputs": inputs},
    }


def is_a(values: Any) -> bool:
    return values["provenance"]["inputs"] == "a"


def write(path: Path, *lines: dict[str, Any]) -> bytes:
    with AnnotationWriter(path, is_a) as writer:
        for values in lines:
            writer.append(values)
        writer.finish()
    return path.read_bytes()


def numbers(path: Path) -> list[int]:
    return [json.loads(text)["number"] for text in path.read_text().splitlines()]


def test_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, line(0, boxes=[[0.1, 0.2, 0.3, 0.4]]), line(1, subtask="nimm den Löffel"))
    provider = open_provider(f"own:{path}")
    first, second = provider.episode(named("episode_0", 9)), provider.episode(named("episode_1", 9))
    assert first is not None and second is not None
    assert first[3].boxes == ((0.1, 0.2, 0.3, 0.4),) and first[3].motion == "Hold still."
    assert second[3].subtask == "nimm den Löffel"
    assert provider.episode(named("episode_2", 0)) is None


def test_line_without_key_is_found_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, {**line(4), "key": ""})
    provider = open_provider(f"own:{path}")
    assert provider.episode(named("whatever", 4)) is not None
    assert provider.episode(named("whatever", 5)) is None


@pytest.mark.parametrize("cut", [1, 7, 60, -1])
def test_half_written_line_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "out.jsonl"
    whole = write(path, line(0), line(1), line(2))
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    path.write_bytes(whole[:last] + whole[last:][:cut])
    with AnnotationWriter(path, is_a) as writer:
        assert sorted(writer.kept) == [0, 1]
        writer.append(line(2))
        writer.finish()
    assert path.read_bytes() == whole


def test_stale_lines_go_and_order_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with AnnotationWriter(path, is_a) as writer:
        for values in (line(0), line(1, inputs="b"), line(2)):
            writer.append(values)
    with AnnotationWriter(path, is_a) as writer:
        assert sorted(writer.kept) == [0, 2] and numbers(path) == [0, 2]
        writer.append(line(1))
        writer.finish()
        assert numbers(path) == [0, 1, 2]
        writer.append(line(3))
    assert numbers(path) == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_file_of_other_inputs_stays_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = write(path, line(0, inputs="b"), line(1, inputs="b"))
    with pytest.raises(ValueError, match=r"other inputs or settings.*--overwrite"):
        AnnotationWriter(path, is_a)
    assert path.read_bytes() == before
    with AnnotationWriter(path, is_a, overwrite=True) as writer:
        assert not writer.kept
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", ["notes", "notes\nmore\n", '{"episode_index": 0}\n'])
def test_foreign_file_stays(tmp_path: Path, content: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="line 1: this is no annotation file"):
        AnnotationWriter(path, is_a, overwrite=True)
    assert path.read_text() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        AnnotationWriter(path, is_a),
        pytest.raises(ValueError, match="another process is writing"),
    ):
        AnnotationWriter(path, is_a)
    AnnotationWriter(path, is_a).__exit__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0.1, 0.2, 1.3, 0.4]]}, "outside the image"),
        ({"boxes": [[0.1, 0.2, float("nan"), 0.4]]}, "4 numbers"),
        ({"boxes": [[0.5, 0.2, 0.3, 0.4]]}, "inverted"),
        ({"boxes": [[0.5, 0.2, 0.3]]}, "4 numbers"),
        ({"motion": 7}, "'motion' should be a text"),
    ],
)
def test_bad_entry_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "out.jsonl"
    write(path, line(0), line(1, **change))
    provider = open_provider(f"own:{path}")
    place = "out.jsonl, line 2, episode 'episode_1', step 3: "
    with pytest.raises(ValueError, match=f"{place}.*{message}"):
        provider.episode(named("episode_1", 1))


@pytest.mark.parametrize("step", ["5", "-1", "x"])
def test_unknown_step_is_named(tmp_path: Path, step: str) -> None:
    path = tmp_path / "out.jsonl"
    values = line(0)
    values["steps"] = {step: values["steps"]["3"]}
    write(path, values)
    with pytest.raises(ValueError, match=f"line 1.*step '{step}'.*has steps 0..4"):
        open_provider(f"own:{path}").episode(named("episode_0", 0))


def test_rounding_is_cut_to_the_image(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, line(0, boxes=[[-1e-6, 0.2, 1.0004, 0.4]]))
    found = open_provider(f"own:{path}").episode(named("episode_0", 0))
    assert found is not None and found[3].boxes == ((0.0, 0.2, 1.0, 0.4),)


def test_other_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(json.dumps({**line(0), "schema": 2}) + "\n")
    with pytest.raises(ValueError, match="schema 2; this release reads 1"):
        open_provider(f"own:{path}").episode(named("episode_0", 0))
