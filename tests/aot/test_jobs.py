"""`lara aot` over several topologies and in search: what it compiles, keeps, prints and draws."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lara_jax import cli
from lara_jax.aot import cli as aot_cli
from lara_jax.aot import jobs
from lara_jax.aot.chips import GIB, slices_of, topology
from lara_jax.aot.compile import state_size
from lara_jax.aot.jobs import Job, compile_job
from lara_jax.config import load_recipe

DEBUG = "configs/debug.py"


def report_of(job: Job) -> dict[str, Any]:
    """What a compiler would say, for which only full remat and few rows fit."""
    recipe = job.recipe
    mesh = aot_cli._shape(job)
    rows = recipe.data.batch_size // (mesh["data"] * mesh["fsdp"])
    peak = (2 + rows * (0.25 if recipe.model.remat == "full" else 1.0)) * GIB
    fits = peak <= job.topology.chip.granted_bytes
    return {
        "topology": job.topology.name,
        "num_slices": job.slices,
        "devices": job.devices,
        "mesh": mesh,
        "remat": recipe.model.remat,
        "batch_size": recipe.data.batch_size,
        "peak_memory_bytes": round(peak),
        "hbm_bytes": round(job.topology.chip.hbm_bytes),
        "fits": fits,
        "estimated_step_seconds": 0.1 if fits else None,
        "samples_per_second": recipe.data.batch_size / 0.1 if fits else None,
        "mfu": 0.5 if fits else None,
        "collective_bytes": 10**9 if fits else None,
    }


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that were compiled; none really is."""
    done: list[Job] = []

    def compile_at_once(job: Job, cache: Path | None) -> dict[str, Any]:
        del cache
        done.append(job)
        return report_of(job)

    monkeypatch.setattr(aot_cli, "compile_job", compile_at_once)
    monkeypatch.setattr(aot_cli, "state_size", lambda recipe, stage: lambda mesh: GIB)
    return done


def lara_aot(*arguments: str) -> int:
    return cli.main(["aot", "--config", DEBUG, *arguments])


def objects(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_several_topologies(
    compiled: list[Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svg = tmp_path / "figures" / "scaling.svg"
    names = ["--topology", "v5e:2x2,2xv5e-16", "--topology", "tpu7x:2x2x1"]
    assert lara_aot(*names, "--rows", "2", "--plot", str(svg), "--json") == 0
    found = objects(capsys)
    assert [(one["topology"], one["num_slices"]) for one in found] == [
        ("v5e:2x2", 1),
        ("v5e:4x4", 2),
        ("tpu7x:2x2x1", 1),
    ]
    # Each has the recipe's mesh in every slice, and as many rows a device.
    assert [one["mesh"]["data"] for one in found] == [1, 2, 1]
    assert [one["devices"] for one in found] == [4, 32, 8]
    assert [one["batch_size"] for one in found] == [8, 64, 16]
    drawn = svg.read_text()
    assert drawn.lstrip().startswith("<?xml")
    assert "</svg>" in drawn
    assert "http" not in drawn.split("<metadata>")[0].replace("http://www.w3.org", "").lower()


def test_a_table_over_topologies(compiled: list[Job], capsys: pytest.CaptureFixture[str]) -> None:
    assert lara_aot("--topology", "v5e-4,v5p-8", "--config.data.batch_size=128") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["v5e:2x2,", "v5p:2x2x1,"]
    assert "16 NO" in out  # 34 GiB
    assert len(compiled) == 2


def test_a_search_says_how_to_run_the_best(
    compiled: list[Job], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--topology", "v5e:2x2", "--search", "--search-remat", "none,full"]
    assert lara_aot(*arguments, "--search-mesh", "1x4x1,2x2x1") == 0
    told = capsys.readouterr()
    assert "1 x v5e:2x2: 3 layouts" in told.err
    assert len(compiled) <= 10
    table = told.out.splitlines()
    best = table[4].split()
    assert best[:3] == ["1x4x1", "full", "208"]
    line = next(line for line in table if line.startswith("fastest: "))
    settings = [word.removeprefix("--config.") for word in line.split()[1:]]
    recipe = load_recipe(DEBUG, settings)
    assert (recipe.mesh.fsdp, recipe.model.remat, recipe.data.batch_size) == (4, "full", 208)
    assert any(line.startswith("largest batch: ") for line in table)


def test_a_search_as_json_has_the_best_first(
    compiled: list[Job], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    png = tmp_path / "best.png"
    arguments = ["--topology", "v5e:2x2,2xv6e-4", "--search", "--search-remat", "full"]
    arguments += ["--search-mesh", "1x-1x1", "--search-batch", "100"]
    assert lara_aot(*arguments, "--json", "--plot", str(png)) == 0
    found = objects(capsys)
    assert len(found) == len(compiled)
    assert png.stat().st_size > 1000
    for name in ("v5e:2x2", "v6e:2x2"):
        speeds = [one["samples_per_second"] or 0 for one in found if one["topology"] == name]
        assert speeds == sorted(speeds, reverse=True)
        assert speeds[0] == 96 / 0.1
    assert {(one["num_slices"], one["mesh"]["data"]) for one in found} == {(1, 1), (2, 2)}
    assert {"fits", "peak_memory_bytes", "estimated_step_seconds", "mfu", "rows"} <= set(found[0])


def test_a_search_that_is_stopped_shows_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(aot_cli, "state_size", lambda recipe, stage: lambda mesh: GIB)
    done: list[Job] = []

    def stop(job: Job, cache: Path | None) -> dict[str, Any]:
        assert cache == tmp_path
        if done:
            raise KeyboardInterrupt
        done.append(job)
        return report_of(job)

    monkeypatch.setattr(aot_cli, "compile_job", stop)
    arguments = ["--topology", "v5e:2x2", "--search", "--cache", str(tmp_path), "--json"]
    assert lara_aot(*arguments) == 130
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert f"stopped; what was compiled is kept in {tmp_path}" in told.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search-remat", "full"], "need --search"),
        (["--search", "--search-remat", "half"], "'half'; allowed: none, dots, full, offload"),
        (["--search", "--search-mesh", "4"], "'4'; give data x fsdp x tensor"),
        (["--search", "--search-mesh", "1x2x1"], "does not match 4 devices"),
        (["--search", "--num-slices", "2", "--search-mesh", "1x8x1"], "does not match 4 devices"),
        (["--search", "--what", "policy"], "a policy call has one row"),
        (["--plot", "scaling.pdf"], "ends in .svg or .png"),
        (["--rows", "0"], "--rows must be 1 or more"),
    ],
)
def test_wrong_calls(
    arguments: list[str],
    message: str,
    compiled: list[Job],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lara_aot("--topology", "v5e:2x2", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not compiled


def test_scaling_takes_the_best_of_every_topology(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    scaling: Any = importlib.import_module("scaling")
    commands: list[list[str]] = []

    def lara(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        del options
        commands.append(command)
        lines = [
            report_of(job("model.remat=full", f"data.batch_size={rows}"))
            | {"topology": name, "latent_slots": 9}
            for name in ("v5e:2x2", "v5p:2x2x1")
            for rows in (64, 32)
        ]
        return subprocess.CompletedProcess(command, 1, "\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(scaling.subprocess, "run", lara)
    plot = tmp_path / "scaling.svg"
    arguments = ["--config", DEBUG, "--topology", "v5e:2x2,v5p-8", "--slots", "0,3"]
    arguments += ["--fit", "full", "--plot", str(plot), "--config.seed=1"]
    assert scaling.main([*arguments, "--json"]) == 0
    found = objects(capsys)
    assert [(one["topology"], one["latent_slots"]) for one in found] == [
        ("v5e:2x2", 0),
        ("v5p:2x2x1", 0),
        ("v5e:2x2", 3),
        ("v5p:2x2x1", 3),
    ]
    assert {one["batch_size"] for one in found} == {64}
    assert [word in commands[1] for word in ("--config.seed=1", "--search", "full")] == [True] * 3
    assert "--config.model.latent_slots=3" in commands[1]
    assert plot.stat().st_size > 1000
    assert scaling.main(arguments) == 0
    assert "debug, K = 3" in capsys.readouterr().out


class Child:
    """Stands in for the processes that compile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, status: int = 0) -> None:
        self.calls: list[list[str]] = []
        self.status = status
        monkeypatch.setattr(jobs, "require_libtpu", lambda: None)
        monkeypatch.setattr(jobs.subprocess, "run", self.run)
        monkeypatch.setattr(jobs.importlib.metadata, "version", lambda name: "1")

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        del options
        self.calls.append(command)
        out = json.dumps({"fits": True, "number": len(self.calls)})
        return subprocess.CompletedProcess(command, self.status, out, "a\nlara aot: it broke\n")


def job(*overrides: str) -> Job:
    return Job(config=DEBUG, topology=topology("v5e:2x2"), slices=2, overrides=overrides)


def test_a_report_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = Child(monkeypatch)
    assert compile_job(job(), tmp_path)["number"] == 1
    assert compile_job(job(), tmp_path)["number"] == 1
    assert compile_job(job("data.batch_size=32"), tmp_path)["number"] == 2
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1")
    assert compile_job(job(), tmp_path)["number"] == 3
    assert compile_job(job(), None)["number"] == 4
    [*_, config, file, name, sides, slices, number] = child.calls[0][:10]
    assert (config, file, name, sides) == ("--config", DEBUG, "--topology", "v5e:2x2")
    assert (slices, number) == ("--num-slices", "2")
    assert "--config.data.batch_size=32" in child.calls[1]


def test_a_failure_is_told_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = Child(monkeypatch, status=2)
    found = compile_job(job(), tmp_path)
    assert found["error"] == "status 2: it broke"
    assert (found["fits"], found["devices"]) == (False, 8)
    compile_job(job(), tmp_path)
    assert len(child.calls) == 2


def test_slices_in_a_name() -> None:
    assert slices_of("2xv5e-256") == (topology("v5e:16x16"), 2)
    assert slices_of("v5e-256", 3) == (topology("v5e:16x16"), 3)
    with pytest.raises(ValueError, match="topology"):
        slices_of("0xv5e-256")


def test_state_size_by_mesh() -> None:
    size = state_size(load_recipe(DEBUG, []))
    whole, fsdp, both = size((1, 1, 1)), size((1, 4, 1)), size((1, 2, 2))
    assert size((4, 4, 1)) == fsdp
    # Norms and what does not divide stay whole.
    assert whole / 4 < fsdp < whole / 3
    assert whole / 4 < both < whole / 3


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (requirements/tpu.txt)"
)
def test_a_search_with_libtpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lara_jax.cli", "aot", "--config", DEBUG, "--json"]
    command += ["--topology", "v5e:2x2", "--search", "--search-mesh", "1x4x1", "--search-batch"]
    command += ["16", "--search-remat", "none", "--cache", str(tmp_path)]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    [found] = map(json.loads, done.stdout.splitlines())
    assert found["fits"]
    assert (found["rows"], found["batch_size"], found["mesh"]["fsdp"]) == (4, 16, 4)
    again = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    assert again.stdout == done.stdout
