"""The tabletop's benchmark runs and prints what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mujoco")

from lara_jax.evals.tabletop import FAMILIES


def lines(repository: Path, *options: str) -> dict[str, float]:
    run = subprocess.run(
        [sys.executable, "benchmarks/tabletop.py", "--json", *options],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return {line["name"]: line["value"] for line in map(json.loads, run.stdout.splitlines())}


@pytest.mark.slow
def test_rates(repository: Path) -> None:
    found = lines(repository, "--rounds", "1", "--seconds", "0.01", "--sizes", "16")
    assert set(found) == {
        f"{what}_16_px_{cameras}"
        for what in ("steps_per_second", "episodes_per_minute")
        for cameras in ("1_camera", "2_cameras")
    }
    assert min(found.values()) > 0


@pytest.mark.slow
def test_expert(repository: Path) -> None:
    found = lines(repository, "--expert", "--episodes", "2")
    assert set(found) == {
        f"expert_percent_{family}{how}" for family in FAMILIES for how in ("", "_disturbed")
    }
    assert set(found.values()) == {100.0}
