"""Reasoning from elsewhere: attached to an index without touching the rest of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.annotate.readers import EpisodeName
from data_pipelines.index.build import attach_annotations, build_index
from data_pipelines.index.format import FLAGS
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.handmade import write_tabletop

WORDS = Annotation(subtask="lift the cup", boxes=((0.125, 0.25, 0.5, 0.75),), motion="Move up.")


@dataclass
class Provider:
    """Annotations of the second episode's steps, by key."""

    steps: Mapping[int, Annotation]
    fingerprint: str = "made"
    description: str = "made by hand"
    asked: list[tuple[str, int]] = field(default_factory=list)

    def episode(self, name: EpisodeName) -> Mapping[int, Annotation] | None:
        self.asked.append((name.key, name.number))
        return self.steps if name.key == "episode_1" else None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tabletop(tmp_path)


def test_annotations_replace_those_of_the_records(path: Path) -> None:
    before = build_index(path, "train", workers=1)
    unchanged = {
        name: (before.folder / name).read_bytes()
        for name in ("actions.bin", "frames.image.bin", "texts.bin", "texts.ends.bin")
    }
    assert before.annotation(5) is not None
    provider = Provider({1: WORDS, 2: Annotation()})
    index = attach_annotations(before, provider)
    assert provider.asked == [("episode_0", 0), ("episode_1", 1), ("episode_2", 2)]
    assert [row for row in range(12) if index.annotation(row)] == [5]
    assert index.annotation(5) == WORDS
    assert index.filter_counts["no_annotation"] == 11
    assert np.flatnonzero(index.rows["flags"] & FLAGS["no_annotation"] == 0).tolist() == [5]
    assert index.header.counts["boxes"] == 1
    assert index.header.annotations == {
        "fingerprint": "made",
        "from": "made by hand",
        "episodes": 1,
        "rows": 1,
    }
    assert index.header.digest != before.header.digest
    index.check()
    for name, data in unchanged.items():
        assert (index.folder / name).read_bytes() == data
    assert before.annotation(5) != WORDS  # who has the old one open keeps it
    assert [index.instruction(row) for row in (0, 4, 7)] == ["task 0", "task 1", "task 2"]


def test_an_index_is_made_with_annotations_and_kept_while_they_are_the_same(path: Path) -> None:
    index = build_index(path, "train", workers=1, annotations=Provider({0: WORDS}))
    assert index.annotation(4) == WORDS
    same = Provider({})
    assert build_index(path, "train", annotations=same).annotation(4) == WORDS
    assert not same.asked
    other = Provider({2: WORDS}, fingerprint="other")
    assert build_index(path, "train", annotations=other).annotation(4) is None
    assert build_index(path, "train").annotation(6) == WORDS


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({3: WORDS}, r"episode 1 \(key 'episode_1'\): no step 3; it has 3 steps"),
        ({}, r"made by hand has nothing of lara_tabletop, split 'train': none of 3 episodes"),
        ({1: Annotation()}, r"has nothing of lara_tabletop"),
        (
            {2: Annotation(boxes=((0.5, 0.2, 0.3, 0.4),))},
            r"episode_1'\), step 2, box 0: box .*is inverted",
        ),
        (
            {2: Annotation(boxes=((0.1, 0.2, 0.3, 0.4), (0.5, 0.5, 1.2, 0.6)))},
            r"episode 1 \(key 'episode_1'\), step 2, box 1: box \[0\.5, .*outside the image",
        ),
    ],
)
def test_bad_annotations_are_named_and_leave_the_index_as_it_was(
    path: Path, steps: Mapping[int, Annotation], message: str
) -> None:
    index = build_index(path, "train", workers=1)
    with pytest.raises(ValueError, match=message):
        attach_annotations(index, Provider(steps))
    assert build_index(path, "train", verify=True).header.digest == index.header.digest
    assert [entry.name for entry in index.folder.parent.iterdir()] == [".train.lock", "train"]


def test_a_box_that_sticks_out_by_rounding_is_cut(path: Path) -> None:
    box = (-1e-4, 0.0, 1.0001, 0.5)
    index = build_index(path, "train", annotations=Provider({0: Annotation(boxes=(box,))}))
    annotation = index.annotation(4)
    assert annotation is not None and annotation.boxes == ((0.0, 0.0, 1.0, 0.5),)
