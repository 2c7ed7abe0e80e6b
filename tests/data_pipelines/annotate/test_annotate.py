"""`lara data annotate`: killed and run again, in threads, continued, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.annotate import annotate
from data_pipelines.annotate.annotate import annotate_index, main
from data_pipelines.annotate.episode import AnnotateSettings
from data_pipelines.annotate.openai_endpoint import EndpointError
from data_pipelines.annotate.readers import open_provider
from data_pipelines.annotate.writers import RuleWriter
from data_pipelines.convert import step_shards
from data_pipelines.index.annotations import attach_annotations
from data_pipelines.index.build import build_index, open_index
from data_pipelines.index.format import Index
from tests.data_pipelines.annotate.small_index import PHASES, named, write_small_index
from tests.data_pipelines.handmade import (
    TABLETOP_FEATURES,
    tabletop_record,
    write_directory,
    write_tabletop,
)

EPISODES = 12


@pytest.fixture
def index(tmp_path: Path) -> Index:
    instructions = tuple(f"put block {'abcdefghijkl'[i]} on the plate" for i in range(EPISODES))
    return write_small_index(tmp_path / "data", instructions=instructions)


def run(index: Index, out: Path, *more: str) -> int:
    return main([str(index.folder), "--out", str(out), *more])


def test_command(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out.jsonl"
    assert run(index, out, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows = EPISODES * len(PHASES)
    assert (result["episodes"], result["already_done"]) == (EPISODES, 0)
    assert result["steps"] == result["annotated_steps"] == rows
    assert result["missing"] == {"no detector": rows}
    provider = open_provider(f"own:{out}")
    found = provider.episode(named(index.key(2), 2, len(PHASES) + 1))
    assert found is not None and found[1].subtask == "move to the block c"
    before = out.read_bytes()
    assert run(index, out) == 0
    assert "180 of 180 steps of 12 episodes annotated" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_done_episodes_are_not_done_again(index: Index, tmp_path: Path) -> None:
    class Counting(RuleWriter):
        calls = 0

        def subtasks(self, view: Any, segments: Any) -> list[str]:
            Counting.calls += 1
            return super().subtasks(view, segments)

    out = tmp_path / "out.jsonl"

    def annotated() -> int:
        Counting.calls = 0
        annotate_index(index, out, writer=Counting(), detector=None, settings=AnnotateSettings())
        return Counting.calls

    assert annotated() == EPISODES
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:3], *lines[5:9]]) + lines[9][:50])
    assert annotated() == 5
    assert out.read_bytes() == whole
    assert annotated() == 0


@pytest.mark.parametrize("workers", [2, 5])
def test_threads_change_nothing(index: Index, tmp_path: Path, workers: int) -> None:
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    run(index, one)
    run(index, many, "--workers", str(workers))
    assert one.read_bytes() == many.read_bytes()


# A run whose writer takes its time, so that it can be killed in the middle of an episode.
SLOW_RUN = """
import sys, time
from data_pipelines.annotate import annotate
from data_pipelines.annotate.writers import RuleWriter

class Slow(RuleWriter):
    def subtasks(self, view, segments):
        time.sleep(0.02)
        return super().subtasks(view, segments)

annotate.RuleWriter = Slow
sys.exit(annotate.main(sys.argv[1:]))
"""


def test_killed_run_goes_on(index: Index, tmp_path: Path, repository: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    run(index, undisturbed)
    command = [sys.executable, "-c", SLOW_RUN, str(index.folder), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as child:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and child.poll() is None:
            if out.is_file() and out.read_bytes().count(b"\n") >= 3:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    done = out.read_bytes().count(b"\n")
    assert 3 <= done < EPISODES
    with open(out, "ab") as file:  # as if killed while writing
        file.write(undisturbed.read_bytes().splitlines()[done][:80])
    assert run(index, out) == 0
    assert out.read_bytes() == undisturbed.read_bytes()


FULL_DISK = """
import resource, sys
from data_pipelines.annotate.annotate import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def test_full_disk(index: Index, tmp_path: Path, repository: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    run(index, undisturbed)
    whole = undisturbed.read_bytes()
    most = len(whole) // 2
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(most), str(index.folder), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1 and "run again, it goes on" in child.stderr
    assert len(out.read_bytes()) <= most
    assert run(index, out) == 0
    assert out.read_bytes() == whole


def test_failing_model_ends_the_run_and_keeps_what_is_done(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Failing(RuleWriter):
        def subtasks(self, view: Any, segments: Any) -> list[str]:
            if view.number == 4:
                raise EndpointError("http://x, model m: HTTP 503")
            return super().subtasks(view, segments)

    out, undisturbed = tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    monkeypatch.setattr(annotate, "RuleWriter", Failing)
    assert run(index, out, "--workers", "3") == 1
    assert "HTTP 503; run again, it goes on" in capsys.readouterr().err
    assert out.read_bytes().count(b"\n") == 4
    monkeypatch.undo()
    run(index, undisturbed)
    assert run(index, out) == 0
    assert out.read_bytes() == undisturbed.read_bytes()


def test_detector_is_called(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Detector:
        name = "all of it"

        def boxes(self, images: Sequence[np.ndarray], phrases: Sequence[str]) -> Any:
            return [[(0.0, 0.0, 1.0, 1.0) for _ in phrases] for _ in images]

    monkeypatch.setattr(annotate, "detector_named", lambda description: Detector())
    out = tmp_path / "out.jsonl"
    assert run(index, out, "--detector", "any", "--box-every", "2") == 0
    found = open_provider(f"own:{out}").episode(named(index.key(0), 0, len(PHASES) + 1))
    assert found is not None and len(found[1].boxes) == 2
    # Without the detector these are other inputs: the file stays.
    with pytest.raises(ValueError, match="other inputs"):
        monkeypatch.undo()
        run(index, out)


def test_dataset_directory_and_back_into_its_index(tmp_path: Path) -> None:
    """From a TFDS directory to annotations to an index that has them."""
    directory = write_tabletop(tmp_path / "lara_tabletop")
    index = build_index(directory, "train", workers=1)
    out = tmp_path / "out.jsonl"
    assert main([str(directory), "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(line["steps"]) for line in lines] == [4, 3, 5]
    index = attach_annotations(index, open_provider(f"own:{out}"))
    for row in range(len(index)):
        annotation = index.annotation(row)
        number, step = (int(index.rows[row][name]) for name in ("episode", "frame"))
        expected = lines[number]["steps"][str(step)]
        assert annotation is not None
        assert (annotation.subtask, annotation.motion) == (expected["subtask"], expected["motion"])


def test_a_set_of_ones_own_and_its_conversion(tmp_path: Path) -> None:
    """By a definition file, and by nothing but the index of step records."""
    definitions = tmp_path / "mine.toml"
    definitions.write_text(
        "[datasets.mine]\n"
        "control_hz = 5.0\n"
        'cameras = { front = "observation/image" }\n'
        'roles = { primary = "front" }\n'
        'action = ["action"]\n'
        'state = ["observation/state"]\n'
        'episode_key = ["episode_metadata/file_path"]\n'
    )
    shards = [[tabletop_record(0, 4), tabletop_record(1, 3)]]
    path = write_directory(tmp_path / "mine/1.0.0", "mine", TABLETOP_FEATURES, {"train": shards})
    with pytest.raises(ValueError, match="unknown dataset 'mine'"):
        main([str(path), "--out", str(tmp_path / "none.jsonl")])
    first = tmp_path / "first.jsonl"
    assert main([str(path), "--definitions", str(definitions), "--out", str(first)]) == 0
    index = open_index(path, "train", definitions=definitions)

    steps = str(tmp_path / "steps")
    written = [
        step_shards.write_shard(index, shard, steps, ["front"])
        for shard in range(step_shards.shard_count(index))
    ]
    step_shards.write_records_index(f"{steps}/lara_index/train", index, written, steps, ["front"])
    second = tmp_path / "second.jsonl"
    assert main([steps, "--out", str(second)]) == 0
    lines = [[json.loads(line) for line in out.read_text().splitlines()] for out in (first, second)]
    assert [line["number"] for line in lines[1]] == [0, 1]
    for ours, theirs in zip(*lines, strict=True):
        assert (ours["key"], ours["steps"]) == (theirs["key"], theirs["steps"])
    # What was made of the one fits the other.
    converted = Index.open(f"{steps}/lara_index/train")
    assert attach_annotations(converted, open_provider(f"own:{first}")).annotation(0)


def test_real_bridge_episodes(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "data" / "bridge_dataset" / "1.0.0"
    index = build_index(source, "train", tmp_path / "index", workers=1)
    out = tmp_path / "out.jsonl"
    assert run(index, out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(len(line["steps"]) for line in lines) == len(index) == 200
    for line in lines:
        first = int(index.episodes[line["number"]]["first_row"])
        gripper = index.actions[first : first + len(line["steps"]), 6]
        phases = [step["phase"] for step in line["steps"].values()]
        closed = [phase in ("grasp", "move") and gripper.min() < 0.5 for phase in phases]
        assert closed == (gripper < 0.5).tolist()  # here no episode starts closed
        if "carrot" in line["steps"]["1"]["subtask"]:
            assert line["steps"]["1"]["subtask"] == "move to the carrot"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--writer", "poet"], "writer 'poet'; allowed: rules, openai:URL,MODEL"),
        (["--writer", "openai:foo"], "'openai:foo' lacks a URL or a model; allowed: openai:URL"),
        (["--writer", "openai:foo,qwen"], "endpoint 'foo'; expected a URL"),
        (["--detector", "zero-shot:"], "allowed: none, zero-shot:FOLDER"),
        (["--detector", "zero-shot:gs://b/x"], "detector gs://b/x is a URL; it must be a local"),
    ],
)
def test_bad_arguments(index: Index, tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(index, tmp_path / "out.jsonl", *arguments)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers: '0' is no whole number from 1 on"),
        (["--box-every", "0"], "--box-every: '0' is no whole number from 1 on"),
        (["--axes", "+x,+y"], "--axes: axes '+x,+y'; expected forward,left,up as in +x,+y,+z"),
        (["--out", "gs://b/x"], "--out: path gs://b/x is a URL; it must be a local path"),
    ],
)
def test_bad_options(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        annotate.main([str(tmp_path), "--out", str(tmp_path / "out.jsonl"), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
