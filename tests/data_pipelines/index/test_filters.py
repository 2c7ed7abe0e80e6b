"""Flags: which rows a filter would drop, and how many."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.index.build import build_index
from data_pipelines.index.filters import bad_rows, pauses
from data_pipelines.index.format import FLAGS
from data_pipelines.oxe.registry import spec_named
from tests.data_pipelines.handmade import tabletop_record, write_tabletop

SPEC = spec_named("lara_tabletop")


def action(x: float = 0.0, roll: float = 0.0, gripper: float = 1.0) -> list[float]:
    return [x, 0.0, 0.0, roll, 0.0, 0.0, gripper]


def test_a_pause_is_neither_motion_nor_a_new_gripper() -> None:
    rows = [
        (action(), True),  # the first row has no gripper before it
        (action(x=6e-4), False),
        (action(x=-6e-4), False),
        (action(x=5e-4), True),  # not above the threshold
        (action(roll=0.5), True),  # as the source: rotation does not count
        (action(gripper=0.0), False),
        (action(gripper=0.0), True),
    ]
    actions = np.array([row for row, _ in rows], np.float32)
    assert pauses(SPEC, actions).tolist() == [pause for _, pause in rows]
    assert pauses(SPEC, actions[:0]).tolist() == []


def test_other_action_spaces_use_the_norm_of_changes_and_new_positions() -> None:
    navigation = replace(
        SPEC,
        action_encoding="NAV_2D",
        action=("action[0:2]",),
        absolute_action=(False, False),
        action_modes=("q99", "q99"),
    )
    moves = np.array([[0, 0], [4e-4, 4e-4], [3e-4, 3e-4]], np.float32)
    assert pauses(navigation, moves).tolist() == [True, False, True]
    joints = replace(
        SPEC, action_encoding="JOINT_POS", absolute_action=(True,) * 7, action_modes=("q99",) * 7
    )
    targets = np.repeat(np.array([[0.3], [0.3], [0.31]], np.float32), 7, axis=1)
    assert pauses(joints, targets).tolist() == [False, True, False]


def test_a_row_is_bad_by_its_frame_or_its_next_one() -> None:
    bad = np.array([False, False, True, False])
    flags = bad_rows(bad, np.array([0, 1, 2, 3]), np.array([1, 2, 3, 3]))
    assert (flags == FLAGS["bad_frame"]).tolist() == [False, True, True, False]


def test_flags_are_set_and_counted(tmp_path: Path) -> None:
    silent, failed, plain = (tabletop_record(n, 3) for n in range(3))
    silent["steps/language_instruction"] = [b"", b" ", b"go"]
    failed["episode_metadata/success"] = np.array([False])
    for key in ("subtask", "motion"):
        plain[f"steps/reasoning/{key}"] = [b"", b"", b"words"]
    plain["steps/reasoning/boxes"][:] = np.nan
    plain["steps/reasoning/boxes"][1, 0] = [0.1, 0.2, 0.3, 0.4]
    still = tabletop_record(3, 2)
    still["steps/action"][:] = action()
    path = write_tabletop(tmp_path, [silent, failed], [plain, still])
    index = build_index(path, "train", workers=1)
    flags = index.rows["flags"]
    expected = {"no_language": [0, 1], "failed": [3, 4, 5], "no_annotation": [6], "bad_frame": []}
    for name, rows in expected.items():
        assert np.flatnonzero(flags & FLAGS[name]).tolist() == rows
    assert np.flatnonzero(flags & FLAGS["pause"])[-2:].tolist() == [9, 10]
    assert index.filter_counts == {
        name: np.count_nonzero(flags & bit) for name, bit in FLAGS.items()
    }
    annotation = index.annotation(7)
    assert annotation is not None and (annotation.subtask, len(annotation.boxes)) == ("", 1)
    assert index.annotation(6) is None


def broken(tmp_path: Path) -> Path:
    """A directory of 2 episodes of 4 steps; step 2 of the second has a frame that is cut off."""
    record = tabletop_record(1, 4)
    image = record["steps/observation/image"][2]
    record["steps/observation/image"][2] = image[: len(image) // 2]
    return write_tabletop(tmp_path, [tabletop_record(0, 4)], [record])


def test_a_frame_that_does_not_decode_is_refused_if_frames_are_decoded(tmp_path: Path) -> None:
    path = broken(tmp_path)
    with pytest.raises(
        ValueError, match=r"00001-of-00002, record 0: step 2, camera 'image': .*cannot be decoded"
    ):
        build_index(path, "train", workers=1, decode_frames=True)
    assert build_index(path, "train", workers=1).filter_counts["bad_frame"] == 0


def test_frames_that_do_not_decode_are_flagged_up_to_a_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = broken(tmp_path)
    build_index(path, "train", workers=1)
    options = {"workers": 1, "decode_frames": True}
    with pytest.raises(ValueError, match=r"2 of 8 rows \(25\.00%\) need a frame .*allowed 20\.00%"):
        build_index(path, "train", **options, max_bad_fraction=0.2)
    index = build_index(path, "train", **options, max_bad_fraction=0.25)
    assert "without decoding" in capsys.readouterr().err
    assert np.flatnonzero(index.rows["flags"] & FLAGS["bad_frame"]).tolist() == [5, 6]
    assert index.header.decoded and index.filter_counts["bad_frame"] == 2
    kept = build_index(path, "train", workers=1)
    assert kept.header.digest == index.header.digest
    with pytest.raises(ValueError, match=r"allowed 0\.00%"):
        build_index(path, "train", **options)
    with pytest.raises(ValueError, match="max_bad_fraction is 2; allowed 0 to 1"):
        build_index(path, "train", **options, max_bad_fraction=2)


@pytest.mark.parametrize("size", [0, 5, 60])
def test_the_first_frame_of_a_file_may_be_a_bad_one(tmp_path: Path, size: int) -> None:
    record = tabletop_record(1, 4)
    record["steps/observation/image"][0] = record["steps/observation/image"][0][:size]
    path = write_tabletop(tmp_path, [record, tabletop_record(0, 4)])
    options = {"workers": 1, "decode_frames": True}
    with pytest.raises(ValueError, match=r"record 0: step 0, camera 'image'"):
        build_index(path, "train", **options)
    index = build_index(path, "train", **options, max_bad_fraction=0.2)
    assert np.flatnonzero(index.rows["flags"] & FLAGS["bad_frame"]).tolist() == [0]
    camera = index.header.cameras["image"]
    assert (camera.height, camera.width) == (16, 24)
    record["steps/observation/image"] = [b"junk"] * 4
    path = write_tabletop(tmp_path / "none", [record])
    with pytest.raises(ValueError, match="no frame of camera image decodes"):
        build_index(path, "train", **options, max_bad_fraction=1.0)
    with pytest.raises(ValueError, match="max_bad_fraction needs decode_frames"):
        build_index(path, "train", max_bad_fraction=1.0)
