"""`lara data index` and `annotate` on a LeRobot data set: what is kept, and what made anew."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.annotate import annotate
from data_pipelines.annotate.readers import open_provider
from data_pipelines.index.build import StaleIndex, build_index, open_index
from tests.data_pipelines.lerobot import sets
from tests.data_pipelines.lerobot.sets import LENGTHS


@pytest.fixture(scope="module")
def good_bridge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sets.write_bridge(tmp_path_factory.mktemp("good") / "bridge")


def test_lara_data_index_just_works(tmp_path: Path, good_bridge: Path) -> None:
    root = shutil.copytree(good_bridge, tmp_path / "bridge")
    index = build_index(root, "train", workers=1)
    assert index.header.dataset == "bridge_lara" and len(index) == sum(LENGTHS[:3])
    assert build_index(root, "train", workers=1).header.digest == index.header.digest
    tasks = root / "meta/tasks.jsonl"
    tasks.write_text(tasks.read_text().replace("drawer", "cupboard"))
    renamed = build_index(root, "train", workers=1)
    assert "cupboard" in renamed.instruction(LENGTHS[0] + LENGTHS[1])
    shutil.rmtree(root / "annotations")
    assert build_index(root, "train", workers=1).annotation(1) is None


def test_verify_keeps_a_fresh_index_and_sees_edits_of_the_same_size(
    tmp_path: Path, good_bridge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(good_bridge, tmp_path / "bridge")
    index = build_index(root, "train", workers=1)
    assert all(file.checksum for file in index.header.files)
    header = index.folder / "index.json"
    made = header.stat().st_ino
    build_index(root, "train", workers=1, verify=True)
    assert open_index(root, "train", verify=True).header == index.header
    assert header.stat().st_ino == made and "anew" not in capsys.readouterr().err
    annotations = "annotations/episode_dense_captions_full_final.jsonl"
    for file, old, new in (
        ("meta/tasks.jsonl", "drawer", "fridge"),
        (annotations, "motion 2.0", "MOTION 2.0"),
    ):
        path = root / file
        facts = path.stat()
        path.write_text(path.read_text().replace(old, new))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as a careless copy
        with pytest.raises(StaleIndex, match=path.name):
            open_index(root, "train", verify=True)
        index = build_index(root, "train", workers=1, verify=True)
    row = LENGTHS[0] + LENGTHS[1]
    assert "fridge" in index.instruction(row)
    annotation = index.annotation(row)
    assert annotation is not None and annotation.motion == "MOTION 2.0"


def test_annotations_of_own_by_key(tmp_path: Path, good_bridge: Path) -> None:
    """`lara data annotate` on a split that does not start with the first episode, and back."""
    root = shutil.copytree(good_bridge, tmp_path / "bridge")
    out = tmp_path / "own.jsonl"
    assert annotate.main([str(root), "--split", "valid", "--out", str(out)]) == 0
    (line,) = map(json.loads, out.read_text().splitlines())
    assert (line["key"], line["number"]) == ("episode_000003", 0)
    provider = open_provider(f"own:{out}")
    index = build_index(root, "train_valid", annotations=provider, workers=1)
    assert index.header.annotations["episodes"] == 1
    annotation = index.annotation(len(index) - 1)
    assert annotation is not None and annotation.subtask


@pytest.mark.parametrize(("package", "named"), [("pyarrow", "PyArrow"), ("av", "PyAV")])
def test_a_package_that_is_absent(
    good_bridge: Path, tmp_path: Path, repository: Path, package: str, named: str
) -> None:
    command = f"""
import sys
sys.modules[{package!r}] = None
from lara_jax.cli import main
sys.exit(main(["data", "index", {str(good_bridge)!r}, "--out", {str(tmp_path / "i")!r}]))
"""
    child = subprocess.run(
        [sys.executable, "-c", command],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert f"need {named}: install the extra `lerobot` (lara-jax[lerobot])" in child.stderr
