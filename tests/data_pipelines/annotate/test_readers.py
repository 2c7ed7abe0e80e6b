"""Foreign annotations: LaRA's two files, ECoT's one; what is malformed is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.annotate.readers import open_provider
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.annotate.small_index import named

BOX, BOX2 = [0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.75, 1.0]
CAPTIONS = {
    "episode_index": 7,
    "steps": {
        "0": {"subtask": "move to the spoon", "reasoning": "Move left.", "gripper_state": 1},
        "1": {"subtask": "", "reasoning": "", "gripper_state": None},
        "2": {"subtask": "", "reasoning": "Move down."},
        "4": {"subtask": "", "reasoning": None},
    },
}
BOXES = {
    "episode_index": 7,
    "num_steps": 5,
    "dense_labels": {
        "active_bbox": [BOX, BOX, None, None, None],
        "active_bbox2": [BOX2, None, None, BOX2, None],
    },
    "dense_scores": [0.9, 0.8, None, None, None],
}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def lara(tmp_path: Path, captions: Any = CAPTIONS, boxes: Any = BOXES) -> str:
    one = write_lines(tmp_path / "captions.jsonl", {"episode_index": 3, "steps": {}}, captions)
    two = write_lines(tmp_path / "boxes.jsonl", boxes)
    return f"lara:{one},{two}"


def test_lara(tmp_path: Path) -> None:
    provider = open_provider(lara(tmp_path))
    assert provider.episode(named("ignored", 7)) == {
        0: Annotation("move to the spoon", (tuple(BOX), tuple(BOX2)), "Move left."),
        1: Annotation(boxes=(tuple(BOX),)),
        2: Annotation(motion="Move down."),
    }
    assert provider.episode(named("", 3)) is None and provider.episode(named("", 0)) is None
    # The key of a LeRobot episode knows its number even where the split leaves some out.
    assert provider.episode(named("episode_000007", 3)) == provider.episode(named("", 7))
    assert provider.episode(named("episode_000003", 7)) is None


def test_lara_captions_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "captions.jsonl", CAPTIONS)
    found = open_provider(f"lara:{path}").episode(named("", 7))
    assert found is not None and list(found) == [0, 2]


def test_lara_fingerprint_is_of_both_files(tmp_path: Path) -> None:
    first = open_provider(lara(tmp_path)).fingerprint
    assert open_provider(lara(tmp_path)).fingerprint == first
    other = {**BOXES, "dense_labels": {"active_bbox": [None] * 5}}
    assert open_provider(lara(tmp_path, boxes=other)).fingerprint != first


@pytest.mark.parametrize("text", ['{"episode_index": 8, "steps"', "[]", '{"steps": {}}', "nan"])
def test_malformed_line_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(CAPTIONS) + "\n\n" + text)
    with pytest.raises(ValueError, match=r"captions\.jsonl, line 3: "):
        open_provider(f"lara:{path}")


def test_episode_twice_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "captions.jsonl", CAPTIONS, CAPTIONS)
    with pytest.raises(ValueError, match="line 2: episode 7 is there already, in line 1"):
        open_provider(f"lara:{path}")


@pytest.mark.parametrize(
    ("captions", "boxes", "message"),
    [
        (CAPTIONS, {**BOXES, "num_steps": 4}, "active_bbox should be a list of num_steps = 4"),
        (
            CAPTIONS,
            {**BOXES, "dense_labels": {"active_bbox": [None] * 4 + [[0, 0, 1, 2]]}},
            "line 1, episode 7, step 4: .*outside the image",
        ),
        (
            {"episode_index": 7, "steps": {"5": {"subtask": "x", "reasoning": ""}}},
            BOXES,
            "line 2, episode 7, step '5': there is no such step; the episode has steps 0..4",
        ),
        ({"episode_index": 7, "steps": []}, BOXES, "'steps' should be a JSON object"),
        ({"episode_index": 7, "steps": {"0": "x"}}, BOXES, "step 0: should be a JSON object"),
        ({"episode_index": 7, "steps": {"0": {"subtask": 3}}}, BOXES, "'subtask' should be a text"),
    ],
)
def test_lara_bad_entry_is_named(tmp_path: Path, captions: Any, boxes: Any, message: str) -> None:
    provider = open_provider(lara(tmp_path, captions, boxes))
    with pytest.raises(ValueError, match=message):
        provider.episode(named("episode_000007", 7))


def ecot(tmp_path: Path, **features: Any) -> Path:
    reasoning = {
        "0": {
            "subtask": "Move to the blue spoon.",
            "move": "move left",
            "move_reason": "It is {there}.",
        },
        "1": {"subtask": 'say "towel"', "move": "", "move_reason": ""},
        "2": {"subtask": "", "move": "stop", "move_reason": None},
    }
    boxes = [
        [[0.4, "spoon", [0, 0, 64, 64]], [0.3, "blue spoon", [64, 64, 128, 256]],
         [0.9, "towel", [1, 1, 2, 2]]],
        [[0.9, "the towel", [-3, 0, 128, 260]]],
        [],
    ]  # fmt: skip
    values = {
        "/data/a\\b{1}.npy": {
            "17": {
                "metadata": {"episode_id": "17", "n_steps": 3},
                "features": {"bboxes": boxes, **features},
                "reasoning": reasoning,
            },
            "18": {"metadata": {}, "features": {}},
        },
        "/data/c.npy": {"0": {"features": {"bboxes": None}, "reasoning": {"0": {"move": "stop"}}}},
    }
    path = tmp_path / "features.json"
    path.write_text(json.dumps(values, indent=2))
    return path


def test_ecot(tmp_path: Path) -> None:
    provider = open_provider(f"ecot:{ecot(tmp_path)}")
    # Text i is of stored step i.
    assert provider.episode(named("/data/a\\b{1}.npy_17", 0)) == {
        0: Annotation(
            "Move to the blue spoon", ((0.25, 0.25, 0.5, 1.0),), "Move left. It is {there}."
        ),
        1: Annotation('say "towel"', ((0.0, 0.0, 0.5, 1.0),), ""),
        2: Annotation(motion="Stop."),
    }
    assert provider.episode(named("/data/a\\b{1}.npy_18", 1)) is None
    assert provider.episode(named("/data/c.npy_0", 2)) == {0: Annotation(motion="Stop.")}
    assert provider.episode(named("/data/c.npy_1", 3)) is None


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[0.4, "spoon", [0, 0, 400, 64]]]], r"step 0: box .* outside the image, \[0, 256\]"),
        ([[[0.4, "spoon", [64, 0, 0, 64]]]], "step 0: .*inverted"),
        ([["spoon"]], "step 0: a box is"),
    ],
)
def test_ecot_bad_box_is_named(tmp_path: Path, boxes: Any, message: str) -> None:
    provider = open_provider(f"ecot:{ecot(tmp_path, bboxes=boxes)}")
    with pytest.raises(ValueError, match=f"features.json, episode '/data/.*_17', {message}"):
        provider.episode(named("/data/a\\b{1}.npy_17", 0))


@pytest.mark.parametrize("keep", [0, 40, 500, -1])
def test_ecot_truncated_file_is_an_error(tmp_path: Path, keep: int) -> None:
    path = ecot(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is the file complete|is empty"):
        open_provider(f"ecot:{path}")


@pytest.mark.parametrize(
    "description", ["lara:", "lara:a,b,c", "ecot:a,b", "own:", "voc:a.xml", "captions.jsonl"]
)
def test_unknown_description(description: str) -> None:
    with pytest.raises(ValueError, match="allowed: lara:CAPTIONS"):
        open_provider(description)


@pytest.mark.parametrize("kind", ["lara", "ecot", "own"])
def test_missing_file(tmp_path: Path, kind: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"'{kind}:.*': there is no file /.*nowhere"):
        open_provider(f"{kind}:{tmp_path / 'nowhere'}")
