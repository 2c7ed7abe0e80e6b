"""The benchmarks run and print what they promise; speed itself is nothing to test here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = {
    "jpeg_kilobytes_mean",
    "decoder_frames_per_second",
    "ours_frames_per_second",
    "ours_two_frames_frames_per_second",
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
