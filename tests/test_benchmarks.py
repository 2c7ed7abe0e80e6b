"""The benchmarks run and print what they promise; speed itself is nothing to test here."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lara_jax import train, train_step

NAMES = {
    "jpeg_kilobytes_mean",
    "decoder_frames_per_second",
    "ours_frames_per_second",
    "ours_two_frames_frames_per_second",
    "ours_resized_frames_per_second",
    "ours_over_decoder",
    "ours_two_frames_over_decoder",
    "index_seconds_per_1000_episodes",
    "stats_steps_per_second",
    "stats_minutes_per_10_million_steps",
    *(
        f"{kind}_{sets}"
        for kind in ("peak_memory_gb", "unshared_memory_gb", "memory_gb_before_opening")
        for sets in ("1_dataset", "2_datasets")
    ),
}


@pytest.mark.slow
def test_loader_prints_its_table(repository: Path, tmp_path: Path) -> None:
    # An interpreter that has no TensorFlow: those lines, and only those, are left out.
    options = {
        "--data": tmp_path,
        "--episodes": 2,
        "--statistics-episodes": 20,
        "--rounds": 2,
        "--seconds": 0.05,
        "--datasets": 2,
        "--samples": 64,
        "--tensorflow-python": tmp_path / "none",
    }
    words = [str(word) for pair in options.items() for word in pair]
    run = subprocess.run(
        [sys.executable, "benchmarks/loader.py", "--json", *words],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "tf.data is left out" in run.stderr
    lines = {line.pop("name"): line for line in map(json.loads, run.stdout.splitlines())}
    assert set(lines) == NAMES
    for name, line in lines.items():
        low, high = line["quartiles"]
        assert 0 < line["minimum"] <= low <= line["value"] <= high <= line["maximum"], name
    assert 15 < lines["jpeg_kilobytes_mean"]["value"] < 30


def test_checkpoint_prints_its_table(repository: Path) -> None:
    """Without its debug run, whose compilation takes a minute."""
    options = ["--json", "--gigabytes", "0.001", "--rounds", "2", "--steps", "0"]
    run = subprocess.run(
        [sys.executable, "benchmarks/checkpoint.py", *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = {line.pop("name"): line for line in map(json.loads, run.stdout.splitlines())}
    measured = ("save_blocking_ms", "save_files_seconds", "check_seconds", "restore_seconds")
    floors = ("copy_in_memory_ms", "plain_file_seconds", "checkpoint_gb")
    assert set(lines) == {f"{name}_0.001gb" for name in (*measured, *floors)}
    for name, line in lines.items():
        assert 0 < line["minimum"] <= line["value"] <= line["maximum"], name
    assert 0.001 < lines["checkpoint_gb_0.001gb"]["value"] < 0.0015


@pytest.fixture
def scripts(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks can be imported, as they import each other."""
    monkeypatch.syspath_prepend(repository / "benchmarks")


@pytest.mark.usefixtures("scripts")
def test_loop_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What the script replaces is put back.
    for place, name in ((train_step, "init_params"), (train_step, "stage_loss")):
        monkeypatch.setattr(place, name, getattr(place, name))
    monkeypatch.setattr(train, "make_train_step", train.make_train_step)
    assert importlib.import_module("loop").main(["--json", "--rounds", "2", "--steps", "20"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {line["name"]: line for line in lines}
    speeds = ("step_ms_alone", "step_ms_in_loop")
    assert set(found) == {*speeds, "overhead_percent", "idle_percent"}
    for line in lines:
        assert line["minimum"] <= line["value"] <= line["maximum"]
    assert min(found[name]["minimum"] for name in speeds) > 0
    assert 0 <= found["idle_percent"]["minimum"] <= found["idle_percent"]["maximum"] < 100


@pytest.mark.usefixtures("scripts")
def test_curriculum_compares_by_seed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """With made-up runs: which commands are given, and what is made of their evaluations."""
    curriculum: Any = importlib.import_module("curriculum")
    commands = []

    def lara(*arguments: str) -> None:
        commands.append(arguments)
        if arguments[0] == "train":
            (seed,) = (int(word[-1]) for word in arguments if word.startswith("--config.seed="))
            alone = "--config.train.stages=action" in arguments
            workdir = Path(arguments[arguments.index("--workdir") + 1])
            workdir.mkdir()
            rows = [(5, "position_m", 9.0), (10, "position_m", (seed + 1) * (2 if alone else 1))]
            rows += [(10, "rotation_rad", 0.5), (10, "gripper_accuracy", 0.75)]
            rows += [(10, "loss_action", 1 + alone)]
            lines = [f"{step},action,lara_tabletop,{name},{value}" for step, name, value in rows]
            table = "\n".join(["step,stage,dataset,metric,value", *lines])
            (workdir / "eval.csv").write_text(table)

    monkeypatch.setattr(curriculum, "lara", lara)
    change = "--config.data.batch_size=16"
    words = ["--json", "--seeds", "3", "--steps", "10", "--folder", str(tmp_path)]
    assert curriculum.main([*words, change]) == 0
    assert all(change in command for command in commands[1:])
    assert [command[0] for command in commands] == ["data"] + ["train"] * 6
    lines = {
        line.pop("name"): line for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert lines["three_stages_position_mm"] == {"value": 2000, "seeds": [1000, 2000, 3000]}
    assert lines["action_alone_gripper_wrong_percent"]["value"] == 25
    ratio = "three_stages_over_action_alone"
    assert lines[f"{ratio}_position_mm"]["seeds"] == [0.5, 0.5, 0.5]
    assert lines[f"{ratio}_flow_loss"]["value"] == 0.5
    assert lines[f"{ratio}_rotation_mrad"]["value"] == 1
    for wrong in ("--config.train.steps=5", "--batch=4"):
        with pytest.raises(SystemExit):
            curriculum.main([*words, wrong])
        assert f"{wrong}: allowed" in capsys.readouterr().err
