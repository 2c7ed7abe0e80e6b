"""Statistics of an index: every step once, filters, strides, the cache, resuming after a kill."""

import errno
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import accumulator, statistics
from data_pipelines.index.build import build_index
from data_pipelines.index.format import FLAGS, Index
from data_pipelines.statistics import (
    DatasetStatistics,
    index_statistics,
    main,
    normalizers,
)
from tests.data_pipelines import made_index

LENGTHS = (4, 3, 0, 5)


def joined(index: Index) -> tuple[np.ndarray, np.ndarray]:
    return np.array(index.actions, np.float64), np.array(index.states, np.float64)


def test_every_step_counts_once(tmp_path: Path) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS)
    found = index_statistics(index)
    assert (found.dataset, found.steps, found.episodes) == ("made", 12, 3)
    for vector, values in zip((found.action, found.state), joined(index), strict=True):
        np.testing.assert_array_equal(vector.min, values.min(axis=0))
        np.testing.assert_array_equal(vector.q99, np.quantile(values, 0.99, axis=0))
        np.testing.assert_allclose(vector.mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(vector.std, values.std(axis=0), rtol=1e-9)
    assert found.action_modes == made_index.SPEC.action_modes
    assert (found.state_encoding, found.control_hz) == ("POS_EULER", 5.0)


def test_filtered_rows_do_not_count(tmp_path: Path) -> None:
    pause, failed = FLAGS["pause"], FLAGS["failed"]
    flags = [pause, 0, 0, pause | failed, 0, 0, failed, *[pause] * 5]
    index = made_index.write(tmp_path / "index", LENGTHS, flags=flags)
    found = index_statistics(index, filters=["pause"])
    assert (found.steps, found.episodes) == (5, 2)  # the last episode is all pause
    np.testing.assert_allclose(found.action.mean, joined(index)[0][[1, 2, 4, 5, 6]].mean(axis=0))
    assert index_statistics(index, filters=["failed", "pause"]).steps == 4
    assert index_statistics(index).steps == 12
    with pytest.raises(ValueError, match=r"\['pauses'\]; known: pause, no_language"):
        index_statistics(index, filters=["pauses"])


@pytest.mark.parametrize("stride", [1, 2])
def test_a_part_of_the_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(statistics, "CHUNK_ROWS", 5)
    index = made_index.write(tmp_path / "index", (4, 3, 6, 5))
    alone = made_index.write(tmp_path / "alone", (4, 3))
    part = index_statistics(index, stride=stride, episodes=slice(0, 2))
    assert part == index_statistics(alone, stride=stride)
    rest = index_statistics(index, stride=stride, episodes=slice(-2, None))
    assert (rest.steps, rest.episodes) == (11, 2)
    np.testing.assert_array_equal(rest.state.max, np.array(index.states[7:]).max(axis=0))
    assert index_statistics(index, stride=stride).steps == 18
    with pytest.raises(ValueError, match="contiguous"):
        index_statistics(index, episodes=slice(None, None, 2))
    with pytest.raises(ValueError, match="no step of the 0 in episodes 2 to 2"):
        index_statistics(index, episodes=slice(2, 2))


def test_filters_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    index = made_index.write(tmp_path / "index", (3,), flags=[FLAGS["failed"]] * 3)
    with pytest.raises(ValueError, match=r"filters \['failed'\] leave no step of the 3 in ep"):
        index_statistics(index, filters=["failed"])


def test_a_stride_does_not_cross_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CHUNK_ROWS", 7)
    index = made_index.write(tmp_path / "index", LENGTHS)
    parts = []
    for number, rows in ((0, 4), (1, 3), (3, 5)):
        actions = made_index.vectors(number, rows)[0]
        after = np.concatenate([actions[1:], actions[-1:] * [0, 0, 0, 0, 0, 0, 1]])
        parts.append(np.concatenate([(actions + after)[:, :6], after[:, 6:]], axis=1))
    found = index_statistics(index, stride=2)
    np.testing.assert_allclose(found.action.mean, np.concatenate(parts).mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found.state.max, joined(index)[1].max(axis=0))
    assert (found.steps, found.control_hz) == (12, 2.5)
    with pytest.raises(ValueError, match="stride 0; at least 1"):
        index_statistics(index, stride=0)


@pytest.mark.parametrize(("vector", "dimension"), [("actions", 2), ("states", 7)])
def test_a_value_that_is_not_finite_is_named(tmp_path: Path, vector: str, dimension: int) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS)
    values = np.array(getattr(index, vector))
    values[5, dimension] = np.nan
    (index.folder / f"{vector}.bin").write_bytes(values.tobytes())
    message = f"made: {vector}, dimension {dimension}: nan in .*frames.bin, record 1, step 1"
    with pytest.raises(ValueError, match=message):
        index_statistics(Index.open(index.folder))


def test_the_cache_is_used_and_distrusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS)
    expected = index_statistics(index)
    cache = index.folder / "statistics.json"
    passes: list[int] = []
    compute = statistics._compute
    monkeypatch.setattr(statistics, "_compute", lambda *args: passes.append(1) or compute(*args))
    assert index_statistics(index) == expected and not passes
    assert capsys.readouterr().err == ""

    good = cache.read_text()
    tampered = json.loads(good)
    tampered["statistics"]["steps"] = 13
    for damage in (good[:-20], "[]", "null", "{}", json.dumps(tampered), "\x00"):
        cache.write_text(damage)
        passes.clear()
        assert index_statistics(index) == expected and passes == [1], damage
        assert "is damaged" in capsys.readouterr().err
        assert cache.read_text() == good

    other = made_index.write(tmp_path / "other", (6,))
    (other.folder / "statistics.json").write_text(good)
    assert index_statistics(other).steps == 6
    assert "belongs to another index" in capsys.readouterr().err

    passes.clear()
    index_statistics(index, stride=2)
    index_statistics(index, filters=["pause"])
    assert passes == [1, 1]
    assert index_statistics(index) == expected


@pytest.mark.parametrize("reason", [errno.EROFS, errno.EACCES])
def test_a_read_only_index_has_statistics_too(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reason: int,
) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS)

    def refuse(**_: object) -> None:
        raise OSError(reason, "refused")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert index_statistics(index).steps == 12
    assert "is read only: its statistics were taken, but are not kept" in capsys.readouterr().err
    assert not (index.folder / "statistics.json").exists()


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS)

    def refuse(**_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(OSError, match="no space left"):
        index_statistics(index)


# Small parts, so that the pass has many chunks and the sketches are in use.
SMALL = """
from data_pipelines import accumulator, statistics
accumulator.HELD_ROWS, statistics.CHUNK_ROWS, statistics.CHUNKS_PER_SAVE = 200, 100, 3
"""
KILLED = """
import os, signal
updates = []
update = accumulator.Accumulator.update
def counted(self, values):
    updates.append(1)
    if len(updates) == 2 * 17:
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, values)
accumulator.Accumulator.update = counted
statistics.index_statistics(statistics.Index.open({folder!r}), stride={stride})
"""


@pytest.mark.parametrize("stride", [1, 2])
def test_a_killed_pass_goes_on_and_ends_the_same(
    tmp_path: Path,
    stride: int,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lengths = [30] * 100
    undisturbed = made_index.write(tmp_path / "undisturbed", lengths)
    index = made_index.write(tmp_path / "index", lengths)
    code = SMALL + KILLED.format(folder=str(index.folder), stride=stride)
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (partial,) = index.folder.glob("statistics*.partial")
    left, cache = partial.read_bytes(), partial.with_suffix(".json")
    assert not cache.exists()

    monkeypatch.setattr(accumulator, "HELD_ROWS", 200)
    monkeypatch.setattr(statistics, "CHUNK_ROWS", 100)
    expected = index_statistics(undisturbed, stride=stride)
    updates: list[int] = []
    update = accumulator.Accumulator.update

    def counted(self: accumulator.Accumulator, values: np.ndarray) -> None:
        updates.append(len(values))
        update(self, values)

    monkeypatch.setattr(accumulator.Accumulator, "update", counted)
    # 25 chunks of 4 episodes; killed in the 17th, 15 were saved.
    assert index_statistics(index, stride=stride) == expected
    assert updates == [120] * 2 * 10
    assert not partial.exists() and "from the start" not in capsys.readouterr().err

    for damage in (left[:-1], left[:40], b"", left.replace(b"PK", b"KP", 1)):
        cache.unlink()
        partial.write_bytes(damage)
        updates.clear()
        assert index_statistics(index, stride=stride) == expected and len(updates) == 2 * 25
        assert "damaged: taking the statistics from the start" in capsys.readouterr().err

    # The same file beside another index is of no use there.
    other = made_index.write(tmp_path / "other", [30] * 99)
    (other.folder / partial.name).write_bytes(left)
    assert index_statistics(other, stride=stride).steps == 2970
    assert "belongs to another index" in capsys.readouterr().err


def test_a_saved_file_is_all_that_normalising_needs(tmp_path: Path) -> None:
    spec = replace(made_index.SPEC, action_modes=("min_max",) * 6 + ("binary",))
    index = made_index.write(tmp_path / "index", (50,), spec=spec)
    file = tmp_path / "statistics.json"
    index_statistics(index).save(file)
    loaded = DatasetStatistics.load(file)
    assert loaded == index_statistics(index)
    action, state = normalizers(loaded)
    scaled = action.normalize(index.actions)
    assert scaled.min() == -1 and scaled.max() == 1 and set(scaled[:, 6]) == {0.0, 1.0}
    np.testing.assert_allclose(action.unnormalize(scaled), index.actions, atol=1e-6)
    assert state.modes == spec.state_modes
    values = loaded.to_dict()
    with pytest.raises(ValueError, match="fields"):
        DatasetStatistics.from_dict({**values, "extra": 1})
    with pytest.raises(ValueError, match="made: action statistics and modes"):
        DatasetStatistics.from_dict({**values, "action_modes": ["none"]})


def test_normalisers_of_real_data(tmp_path: Path, shared_dir: Path) -> None:
    source = shared_dir / "data/bridge_dataset/1.0.0"
    index = build_index(source, "train", tmp_path / "index", workers=1)
    found = index_statistics(index)
    assert (found.dataset, found.steps, found.episodes) == ("bridge_dataset", 200, 25)
    actions, states = joined(index)
    np.testing.assert_array_equal(found.action.q01, np.quantile(actions, 0.01, axis=0))
    action, state = normalizers(found)
    scaled = action.normalize(actions)
    assert np.abs(scaled).max() == 1
    # About 1 % of the steps lie beyond each of the two percentiles.
    assert 0.01 < (np.abs(scaled[:, :6]) == 1).mean() < 0.05
    inside = (np.abs(scaled[:, :6]) < 1).all(axis=1)
    np.testing.assert_allclose(
        action.unnormalize(scaled[inside])[:, :6], actions[inside, :6], atol=1e-7, rtol=1e-6
    )
    assert (state.normalize(states)[:, 6] == 0).all()  # the pad


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = made_index.write(tmp_path / "index", LENGTHS, flags=[1] * 2 + [0] * 10)
    file = tmp_path / "out.json"
    arguments = [str(index.folder), "--filter", "pause", "--stride", "2", "--out", str(file)]
    arguments += ["--split", "train[:3]"]
    assert main([*arguments, "--json"]) == 0
    expected = index_statistics(index, filters=["pause"], stride=2)
    (line,) = capsys.readouterr().out.splitlines()
    assert DatasetStatistics.from_dict(json.loads(line)) == expected
    assert DatasetStatistics.load(file) == expected
    assert main(arguments) == 0
    title, header, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "made: 10 steps of 3 episodes" and len(rows) == 7 + 8
    assert header.split() == ["dimension", "mode", *statistics.COLUMNS]
    assert rows[6].startswith("action[6]")
