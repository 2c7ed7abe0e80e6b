"""The Beam jobs, run here by Beam's DirectRunner: what comes out is what the plain path gives.

Beam lives in an environment of its own; `launch/beam.sh` makes it, and these tests run there::

    .venv-beam/bin/python -m pytest tests/data_pipelines/convert
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip(
    "apache_beam", reason="apache_beam is not installed (launch/beam.sh, an environment of its own)"
)

from data_pipelines.annotate.annotate import annotate_index
from data_pipelines.annotate.episode import AnnotateSettings
from data_pipelines.annotate.writers import RuleWriter
from data_pipelines.convert import annotate_job, lerobot_to_rlds, rlds_to_array_record, stats_job
from data_pipelines.frames import FrameReader
from data_pipelines.index.build import build_index, index_folder, open_source
from data_pipelines.index.format import Index
from data_pipelines.index.parts import index_source
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.statistics import DatasetStatistics, index_statistics
from tests.data_pipelines.handmade import tabletop_record, write_tabletop
from tests.data_pipelines.lerobot import sets

pytestmark = pytest.mark.slow

SHARDS = (3, 1, 4)  # episodes in each file
PROCESSES = ("--direct_running_mode", "multi_processing", "--direct_num_workers", "2")


def record(seed: int) -> dict[str, object]:
    made = tabletop_record(seed, 3 + seed % 5)
    corners = made["steps/reasoning/boxes"]
    low, high = np.minimum(*np.split(corners, 2, -1)), np.maximum(*np.split(corners, 2, -1))
    return {**made, "steps/reasoning/boxes": np.concatenate([low, high], -1)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed RLDS split."""
    shards = [[record(10 * shard + n) for n in range(count)] for shard, count in enumerate(SHARDS)]
    path = write_tabletop(tmp_path_factory.mktemp("rlds"), *shards)
    build_index(path, "train", workers=1)
    return path


@pytest.fixture(scope="module")
def index(directory: Path) -> Index:
    return Index.open(index_folder(directory, "train"))


def assert_same_frames(found: Index, expected: Index) -> None:
    for camera in expected.header.cameras:
        for frame in range(expected.header.counts["stored_steps"]):
            np.testing.assert_array_equal(
                FrameReader(found).image(camera, frame), FrameReader(expected).image(camera, frame)
            )


def assert_same_rows(found: Index, expected: Index) -> None:
    np.testing.assert_array_equal(found.actions, expected.actions)
    np.testing.assert_array_equal(found.states, expected.states)
    for name in ("episode", "frame", "next_frame", "flags"):
        np.testing.assert_array_equal(found.rows[name], expected.rows[name])
    for row in range(len(expected)):
        assert found.instruction(row) == expected.instruction(row)
        assert found.annotation(row) == expected.annotation(row)


@pytest.mark.parametrize("options", [(), PROCESSES], ids=["one process", "two processes"])
def test_rlds_to_array_record(
    directory: Path,
    index: Index,
    tmp_path: Path,
    options: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--input", str(directory), "--output", str(tmp_path / "out"), *options]
    assert rlds_to_array_record.main(arguments) == 0
    folder = tmp_path / "out" / "lara_index" / "train"
    assert capsys.readouterr().out == f"{folder}\n"
    found = Index.open(folder)
    assert_same_rows(found, index)
    assert_same_frames(found, index)
    assert found.header.counts == index.header.counts
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "lara_index",
        *(f"lara_tabletop-train.array_record-0000{shard}-of-00003" for shard in range(3)),
    ]
    with pytest.raises(ValueError, match="train exists; choose another --output"):
        rlds_to_array_record.main(arguments)


def test_an_index_at_another_place(directory: Path, index: Index, tmp_path: Path) -> None:
    os.rename(index.folder, tmp_path / "elsewhere")
    arguments = ["--input", str(directory), "--output", str(tmp_path / "out")]
    try:
        with pytest.raises(FileNotFoundError, match=r"has no index at .*: run `lara data"):
            rlds_to_array_record.main(arguments)
        given = ["--index", str(tmp_path / "elsewhere"), "--cameras", "image"]
        assert rlds_to_array_record.main([*arguments, *given]) == 0
    finally:
        os.rename(tmp_path / "elsewhere", index.folder)
    with pytest.raises(ValueError, match=r"cameras \['left'\]: .* has image"):
        rlds_to_array_record.main([*arguments, "--cameras", "left"])


@pytest.mark.parametrize("options", [(), PROCESSES], ids=["one process", "two processes"])
def test_statistics(
    directory: Path, index: Index, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = tmp_path / "statistics.json"
    arguments = ["--filter", "pause", "--stride", "2", *options]
    stats_job.main(["--input", str(directory), "--output", str(out), *arguments])
    assert list(tmp_path.iterdir()) == [out]
    found, expected = (
        DatasetStatistics.load(out),
        index_statistics(index, filters=["pause"], stride=2),
    )
    for vector in ("action", "state"):
        ours, theirs = getattr(found, vector), getattr(expected, vector)
        for name in ("mean", "std"):  # in these the order of adding up shows
            values = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(*values, rtol=1e-12, atol=1e-15)
        found = replace(found, **{vector: replace(ours, mean=theirs.mean, std=theirs.std)})
    assert found == expected


@pytest.mark.parametrize("options", [(), PROCESSES], ids=["one process", "two processes"])
def test_annotations(
    directory: Path, index: Index, tmp_path: Path, options: tuple[str, ...]
) -> None:
    plain, out = tmp_path / "plain.jsonl", tmp_path / "out.jsonl"
    annotate_index(
        index, plain, writer=RuleWriter(), detector=None, settings=AnnotateSettings(), workers=1
    )
    arguments = ["--input", str(directory), "--output", str(out), *options]
    assert annotate_job.main(arguments) == 0
    assert out.read_bytes() == plain.read_bytes()
    # Again, after a run that was killed: a line too few, another one cut off.
    lines = plain.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[1:4]) + lines[4][:100])
    assert annotate_job.main(arguments) == 0
    assert out.read_bytes() == plain.read_bytes()
    assert sorted(tmp_path.iterdir()) == [out, plain]
    with pytest.raises(ValueError, match=r"out.jsonl: all its lines are of other inputs"):
        annotate_job.main([*arguments, "--box-every", "3"])


def test_lerobot_to_rlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sets.write_bridge(tmp_path / "my_robot")
    arguments = ["--input", str(root), "--output", str(tmp_path / "rlds")]
    assert lerobot_to_rlds.main([*arguments, "--split", "train", "--split", "valid"]) == 0
    folder = tmp_path / "rlds" / "my_robot" / "1.0.0"
    assert capsys.readouterr().out == f"{folder}\n"
    for split in ("train", "valid"):
        theirs = index_source(LeRobotSource.read(root, split), tmp_path / f"{split}.a", workers=1)
        source = open_source(folder, split, definitions=folder / "definition.toml")
        ours = index_source(source, tmp_path / f"{split}.b", workers=1)
        assert_same_rows(ours, theirs)
        assert len(ours.episodes) == {"train": 3, "valid": 1}[split]
        for frame in range(theirs.header.counts["stored_steps"]):
            images = [FrameReader(which).image("image_0", frame) for which in (ours, theirs)]
            assert np.abs(np.subtract(*images, dtype=int)).mean() < 3  # JPEG
    with pytest.raises(ValueError, match="exists; choose another --output, --name or"):
        lerobot_to_rlds.main(arguments)


def test_a_damaged_file_is_named(directory: Path, tmp_path: Path) -> None:
    path = write_tabletop(tmp_path / "copy", [record(1)], [record(2)])
    build_index(path, "train", workers=1)
    (_, file) = sorted(path.glob("*.tfrecord*"))
    data = bytearray(file.read_bytes())
    data[data.index(b"\xff\xd8") + 20] ^= 1
    file.write_bytes(data)
    for job, out in ((rlds_to_array_record, "steps"), (stats_job, "s.json")):
        with pytest.raises(ValueError, match=file.name):
            job.main(["--input", str(path), "--output", str(tmp_path / "out" / out)])
    assert not (tmp_path / "out" / "s.json").exists()
    assert not (tmp_path / "out" / "steps" / "lara_index").exists()


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ("rlds_to_array_record", "has no dataset_info.json"),
        ("stats_job", "has no dataset_info.json"),
    ],
)
def test_a_wrong_call_is_one_line(job: str, message: str, tmp_path: Path, repository: Path) -> None:
    call = [sys.executable, "-m", f"data_pipelines.convert.{job}"]
    arguments = ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [*call, *arguments], cwd=repository, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    last = run.stderr.splitlines()[-1]
    assert last.startswith(f"{job}: {tmp_path}") and message in last
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("job", [rlds_to_array_record, lerobot_to_rlds, annotate_job, stats_job])
def test_an_option_that_nobody_knows_is_refused(
    job: ModuleType, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(directory), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        job.main([*arguments, "--direct_num_workers", "1", "--filtr", "pause"])
    assert stop.value.code == 2
    assert "neither the job nor Beam knows --filtr pause; see" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_not_there_is_said_to_be_so(directory: Path, tmp_path: Path) -> None:
    arguments = ["--input", str(directory), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"has no split 'test'; it has: train"):
        rlds_to_array_record.main([*arguments, "--split", "test"])
