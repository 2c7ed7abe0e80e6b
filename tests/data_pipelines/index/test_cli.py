"""`lara data index`: what it prints, and its exit codes."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.index import cli
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    splits = {"train": [[tabletop_record(0, 4)]], "val": [[tabletop_record(1, 3)]]}
    return write_directory(tmp_path / "1.0.0", "lara_tabletop", TABLETOP_FEATURES, splits)


def test_all_splits_as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(path), "--json", "--workers", "1", "--decode-frames"]) == 0
    out, err = capsys.readouterr()
    train, val = map(json.loads, out.splitlines())
    assert (train["split"], train["episodes"], train["rows"]) == ("train", 1, 4)
    assert (val["split"], val["rows"], val["folder"]) == ("val", 3, str(path / "lara_index/val"))
    assert train["decoded"] and train["absent_cameras"] == ["wrist_image"]
    assert set(train["filters"]) == {"pause", "no_language", "no_annotation", "failed", "bad_frame"}
    assert "episode/s" in err and "rows that filters would drop: pause " in err


def test_one_split_elsewhere(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([str(path), "--split", "val", "--out", str(out), "--verify"]) == 0
    assert capsys.readouterr().out == f"{out / 'val'}\n"
    assert sorted(entry.name for entry in out.iterdir()) == [".val.lock", "val"]
    assert not (path / "lara_index").exists()


def test_absent_cameras_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    definitions = tmp_path / "mine.toml"
    definitions.write_text(
        "[datasets.mine]\n"
        "control_hz = 5.0\n"
        'cameras = { front = "observation/image", wrist = "observation/wrist" }\n'
        'roles = { primary = "front" }\n'
        'action = ["action"]\n'
        'state = ["observation/state"]\n'
    )
    shards = [[tabletop_record(0, 4)]]
    path = write_directory(tmp_path / "1.0.0", "mine", TABLETOP_FEATURES, {"train": shards})
    assert cli.main([str(path), "--json", "--definitions", str(definitions)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["absent_cameras"] == ["wrist"]
    assert "in the definition, but not in the data: wrist" in err


def test_a_full_disk_is_one_line_and_exit_code_1(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/rows.bin")

    monkeypatch.setattr(cli, "build_index", full)
    assert cli.main([str(path)]) == 1
    assert capsys.readouterr().err == (
        "lara data index: [Errno 28] No space left on device: '/data/rows.bin'; "
        "run again, it goes on from here\n"
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--split", "test"], ValueError, "no split 'test'"),
        (["--annotations", "magic:file"], ValueError, "magic"),
        (["--definitions", "none.toml"], FileNotFoundError, "none.toml"),
        (["--annotations", "own:gs://b/x"], ValueError, "annotations file gs://b/x is a URL"),
        (["--definitions", "gs://b/x"], ValueError, "definition file gs://b/x is a URL"),
        (["--mixture", "nope"], ValueError, "unknown mixture 'nope'"),
        (["--name", "nope"], ValueError, "unknown dataset 'nope'"),
    ],
)
def test_a_wrong_call(
    path: Path, arguments: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cli.main([str(path), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-bad-fraction", "0.1"], "--max-bad-fraction needs --decode-frames"),
        (["--mixture", "lara:bridge", "--name", "x"], "--name is for one"),
        (["--mixture", "lara:bridge", "--annotations", "own:x"], "--annotations are of one data"),
        (["--workers", "0"], "--workers: '0' is no whole number from 1 on"),
    ],
)
def test_options_that_do_not_go_together(
    path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(path), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_own_annotations_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tabletop(tmp_path)
    line = {"schema": 1, "key": "episode_1", "number": 1, "steps": {"1": {"subtask": "lift"}}}
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert cli.main([str(path), "--annotations", f"own:{file}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["filters"]["no_annotation"] == 11


def test_what_is_no_dataset_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/absent does not exist$"):
        cli.main([str(tmp_path / "absent")])
    with pytest.raises(FileNotFoundError, match=r"/absent does not exist$"):
        cli.main([str(tmp_path / "absent"), "--mixture", "lara:bridge"])
    assert cli.main([str(path)]) == 0
    with pytest.raises(ValueError, match=r"lara_index/val is the folder of an index; name that of"):
        cli.main([str(path / "lara_index/val")])
