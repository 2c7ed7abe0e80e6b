"""Samples: views, history, chunks at any rate, filters, splits; what cannot be is named."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.index.format import FLAGS, Index
from data_pipelines.sampling import (
    StepSource,
    action_chunks,
    parse_split,
    strided_actions,
)
from lara_jax.tokenizers.prompt import Annotation
from tests.data_pipelines.small_index import decoded, jpeg, make_index, numbers


def source(index: Index, **changes: Any) -> StepSource:
    return StepSource(**{"index": index, "views": ("primary",), "action_horizon": 2} | changes)


def test_samples_hold_what_the_index_says(tmp_path: Path) -> None:
    index = make_index(tmp_path, episodes=(4, 3, 5), annotated=True, dropped=1)
    steps = source(index, action_horizon=3)
    steps = pickle.loads(pickle.dumps(steps))
    assert (len(steps), steps.size, steps.width, steps.stride) == (12, (16, 24), 7, 1)
    row = 0
    for episode, rows in enumerate((4, 3, 5)):
        for t in range(rows):
            sample = steps[row]
            last = t == rows - 1
            now = decoded(jpeg(0, episode, t + 1))
            later = now if last else decoded(jpeg(0, episode, t + 2))
            np.testing.assert_array_equal(sample["images"], [now], strict=True)
            np.testing.assert_array_equal(sample["next_images"], [later], strict=True)
            np.testing.assert_array_equal(sample["view_mask"], [True], strict=True)
            np.testing.assert_array_equal(sample["next_mask"], [not last], strict=True)
            np.testing.assert_array_equal(sample["state"], -numbers(np.array([row]), 8)[0])
            inside = np.arange(t, t + 3) < rows
            np.testing.assert_array_equal(sample["action_mask"], np.tile(inside, (7, 1)).T)
            held = np.minimum(np.arange(row, row + 3), row + rows - 1 - t)
            expected = numbers(held, 7)
            expected[~inside, :6] = 0
            np.testing.assert_array_equal(sample["actions"], expected, strict=True)
            assert sample["instruction"] == f"alpha {episode}"
            assert sample["annotation"] == Annotation(f"task {row}", ((0.0, 0.0, 0.5, 1.0),))
            assert sample["sample_id"] == row
            row += 1
    assert steps.index.where(5).endswith("frames.bin, record 1, step 2")
    for number in (12, -1):
        with pytest.raises(IndexError, match=f"sample {number} of 12"):
            steps[number]


def test_nothing_is_mapped_before_a_sample_is_asked_for(tmp_path: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    index = make_index(tmp_path, flags=[1, 0] * 6)
    every, some = source(index), source(index, filters=("pause",))
    assert mapped() == 0
    assert (len(every), len(some)) == (12, 6)
    assert mapped() <= 1  # the episodes
    every[3]
    assert mapped() > 1
    # Another process maps for itself.
    assert len(pickle.dumps(every)) < 2000


def test_views_by_role_by_name_earlier_and_missing(tmp_path: Path) -> None:
    sizes = {"image": (16, 24), "hand": (16, 24)}
    roles = {"primary": "image", "wrist": "hand", "secondary": "gone"}
    cameras = dict.fromkeys([*sizes, "gone"], "observation/any")  # the source lacks one
    index = make_index(tmp_path, episodes=(2, 4), sizes=sizes, roles=roles, cameras=cameras)
    views = ("hand", "primary", "primary@-2", "secondary", "wrist@-1", "other")
    steps = source(index, views=views)
    assert steps.missing_views == ("secondary", "other")
    for row, t in ((3, 1), (4, 2)):
        sample = steps[row]
        exists = [True, True, t >= 2, False, True, False]
        np.testing.assert_array_equal(sample["view_mask"], exists, strict=True)
        np.testing.assert_array_equal(sample["next_mask"], [True, True] + [False] * 4)
        black = np.zeros((16, 24, 3), np.uint8)
        places = [(1, t), (0, t), (0, t - 2), None, (1, t - 1), None]
        for v, place in enumerate(places):
            there = exists[v] and place is not None
            image = decoded(jpeg(place[0], 1, place[1])) if there else black
            np.testing.assert_array_equal(sample["images"][v], image)
            if v >= 2:
                np.testing.assert_array_equal(sample["next_images"][v], image)
        np.testing.assert_array_equal(sample["next_images"][0], decoded(jpeg(1, 1, t + 1)))


def test_next_frames_may_be_left_out(tmp_path: Path) -> None:
    sample = source(make_index(tmp_path), next_frames=False)[0]
    np.testing.assert_array_equal(sample["next_images"], sample["images"])
    assert not sample["next_mask"].any()


def test_a_still_scene_has_no_next_frame(tmp_path: Path) -> None:
    index = make_index(tmp_path, picture=lambda c, e, t, size: jpeg(t // 2, size=size))
    masks = [bool(source(index)[t]["next_mask"][0]) for t in range(4)]
    assert masks == [False, True, False, False]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_chunk_sums_changes_and_keeps_positions(stride: int) -> None:
    actions = np.arange(1, 25, dtype=np.float32).reshape(8, 3)  # episodes of 5 and of 3 rows
    absolute = np.array([False, False, True])
    ends = np.repeat([5, 8], [5, 3])
    chunks, inside = action_chunks(actions, np.arange(8), ends, 3, absolute, stride)
    assert chunks.dtype == np.float32
    for row, end in enumerate(ends):
        for j in range(3):
            first = row + j * stride
            group = actions[first : min(first + stride, end)]
            assert inside[row, j] == (first < end)
            expected = [*group[:, :2].sum(0), actions[min(first + stride, end) - 1, 2]]
            np.testing.assert_array_equal(chunks[row, j], expected)
    assert not np.signbit(chunks).any()  # what holds still is 0, not -0


def test_chunks_at_a_rate_of_their_own(tmp_path: Path) -> None:
    index = make_index(tmp_path, episodes=(3, 7), control_hz=15.0)
    steps = source(index, views=("primary", "primary@-1"), chunk_hz=5.0, action_horizon=3)
    assert (steps.stride, steps.chunk_rate_hz, steps.is_too_slow) == (3, 5.0, False)
    sample = steps[3 + 3]  # of 7, row 3: (3 4 5) (6 . .) (. . .)
    actions = index.actions[3:]
    np.testing.assert_array_equal(sample["actions"][0, :6], actions[3:6, :6].sum(0))
    np.testing.assert_array_equal(sample["actions"][:, 6], actions[[5, 6, 6], 6])
    np.testing.assert_array_equal(sample["action_mask"][:, 0], [True, True, False])
    np.testing.assert_array_equal(sample["images"][1], decoded(jpeg(0, 1, 0)))
    np.testing.assert_array_equal(sample["next_images"][0], decoded(jpeg(0, 1, 6)))
    # Three steps on, the episode has ended.
    assert steps[3 + 3]["next_mask"][0] and not steps[3 + 5]["next_mask"][0]
    for_statistics = np.concatenate(list(strided_actions(index, 3)))
    firsts = np.stack([steps[number]["actions"][0] for number in range(10)])
    np.testing.assert_array_equal(for_statistics, firsts, strict=True)


@pytest.mark.parametrize(
    ("hz", "chunk_hz", "stride", "slow"),
    [(5, 0, 1, False), (10, 4, 3, False), (30, 5, 6, False), (3, 10, 1, True), (8, 10, 1, True)],
)
def test_strides(tmp_path: Path, hz: float, chunk_hz: float, stride: int, slow: bool) -> None:
    steps = source(make_index(tmp_path, control_hz=float(hz)), chunk_hz=chunk_hz)
    assert (steps.stride, steps.is_too_slow, steps.chunk_rate_hz) == (stride, slow, hz / stride)


def test_narrow_actions_are_filled_up_and_masked(tmp_path: Path) -> None:
    sample = source(make_index(tmp_path, action_dim=2), action_dim=4)[2]
    np.testing.assert_array_equal(sample["actions"][:, 2:], 0)
    np.testing.assert_array_equal(sample["actions"][:, :2], numbers(np.array([2, 3]), 2))
    np.testing.assert_array_equal(sample["action_mask"], [[True, True, False, False]] * 2)
    sample = source(make_index(tmp_path / "b", action_dim=2), action_dim=4)[3]
    np.testing.assert_array_equal(sample["action_mask"].sum(1), [2, 0])


def test_filters_leave_out_rows_that_carry_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks and scans small enough to have several of them.
    monkeypatch.setattr("data_pipelines.sampling._BLOCK", 7)
    monkeypatch.setattr("data_pipelines.sampling._SCAN", 21)
    flags = np.random.default_rng(0).choice([0, 1, 2, 4, 5], 90)
    flags[20:50] = FLAGS["pause"]  # whole blocks without a row
    index = make_index(tmp_path, episodes=(10,) * 9, flags=flags.tolist())
    for names in ((), ("pause",), ("pause", "no_language"), ("failed",)):
        for episodes in (slice(None), slice(1, 8), slice(5, None), slice(3, 3), slice(2, 4)):
            steps = source(index, filters=names, episodes=episodes)
            bits = sum(FLAGS[name] for name in names)
            first, stop, _ = episodes.indices(9)
            rows = [r for r in range(10 * first, 10 * stop) if not flags[r] & bits]
            assert [steps.row(n) for n in range(len(steps))] == rows
            assert steps.filtered_rows == 10 * max(0, stop - first) - len(rows)
    # What is left out as a sample is still the future of another one.
    index = make_index(tmp_path / "b", episodes=(3,), flags=[0, 1, 0])
    sample = source(index, filters=("pause",))[0]
    np.testing.assert_array_equal(sample["actions"], index.actions[:2])
    assert sample["next_mask"].all()


def test_bad_frames_are_no_history_and_no_future(tmp_path: Path) -> None:
    bad = FLAGS["bad_frame"]
    index = make_index(tmp_path, episodes=(6,), flags=[0, bad, bad, 0, 0, 0])
    settings = {"views": ("primary", "primary@-1"), "chunk_hz": 2.5}
    every, good = source(index, **settings), source(index, filters=("bad_frame",), **settings)
    assert [every[n]["next_mask"][0] for n in (0, 3)] == [True, True]
    assert [good[n]["next_mask"][0] for n in (0, 1)] == [False, True]  # rows 0 and 3
    assert [good[n]["view_mask"][1] for n in (1, 2, 3)] == [False, False, True]  # 3, 4 and 5


@pytest.mark.parametrize(
    ("text", "name", "part"),
    [
        ("train", "train", slice(0, 40)),
        ("train[:95%]", "train", slice(0, 38)),
        ("train[95%:]", "train", slice(38, 40)),
        ("train[10:20]", "train", slice(10, 20)),
        ("val[-5%:]", "val", slice(38, 40)),
        ("val[-3:]", "val", slice(37, 40)),
        ("train[:33%]", "train", slice(0, 13)),
        ("train[50%:30]", "train", slice(20, 30)),
        ("train[30:99]", "train", slice(30, 40)),
        ("train[:]", "train", slice(0, 40)),
    ],
)
def test_parts_of_splits(text: str, name: str, part: slice) -> None:
    split = parse_split(text)
    assert split.name == name
    assert split.episodes(40) == part


def test_two_parts_share_no_episode(tmp_path: Path) -> None:
    index = make_index(tmp_path, episodes=(4, 3, 5))
    first, rest = (
        source(index, episodes=parse_split(text).episodes(3))
        for text in ("train[:50%]", "train[50%:]")
    )
    rows = [steps[n]["sample_id"] for steps in (first, rest) for n in range(len(steps))]
    assert (rows, len(first)) == (list(range(12)), 7)


@pytest.mark.parametrize(
    "text", ["", "train[", "train[5]", "train[:5%:2]", "a+b", "train[1.5:]", "train[:101%]"]
)
def test_a_split_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^split "):
        parse_split(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_horizon": 0}, "action_horizon is 0"),
        ({"filters": ("pauses",)}, r"unknown filters \['pauses'\]; known: pause, no_language"),
        ({"views": ("wrist",)}, "none of the views wrist; its cameras: image; roles: primary"),
        ({"views": ()}, "none of the views"),
        ({"views": ("primary@2",)}, "view 'primary@2': expected"),
        ({"action_dim": 6}, r"'alpha': its actions \(EEF_POS\) are 7 wide, action_dim is 6"),
        ({"chunk_hz": -1.0}, "chunk_hz is -1"),
        ({"episodes": slice(0, 3, 2)}, "contiguous"),
    ],
)
def test_bad_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    index = make_index(tmp_path)
    with pytest.raises(ValueError, match=message):
        source(index, **changes)


def test_datasets_that_cannot_serve_are_named(tmp_path: Path) -> None:
    sizes = {"image": (16, 24), "hand": (8, 8)}
    index = make_index(tmp_path / "a", sizes=sizes)
    with pytest.raises(ValueError, match=r"'alpha': views of .* \(image 16x24, hand 8x8 px"):
        source(index, views=("image", "hand"))
    assert source(index, views=("image", "hand"), image_size=(8, 16))[0]["images"].shape == (
        (2, 8, 16, 3)
    )
    index = make_index(tmp_path / "b", control_hz=0.0)
    with pytest.raises(ValueError, match=r"its control_hz is 0\.0, so that chunk_hz 5 cannot"):
        source(index, chunk_hz=5.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"views": ("image",)},
        {"action_horizon": 3},
        {"filters": ("failed",)},
        {"episodes": slice(0, 2)},
        {"image_size": (16, 24)},
        {"chunk_hz": 5.0},
        {"action_dim": 8},
        {"next_frames": False},
    ],
)
def test_the_fingerprint_is_that_of_the_samples(tmp_path: Path, changes: dict[str, Any]) -> None:
    index = make_index(tmp_path / "a")
    moved = Index.open(index.folder, source="/elsewhere")
    assert source(moved).fingerprint == source(index).fingerprint
    assert source(index, **changes).fingerprint != source(index).fingerprint
    assert source(make_index(tmp_path / "b", "beta")).fingerprint != source(index).fingerprint
