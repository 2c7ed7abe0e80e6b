"""`lara aot`: refusals everywhere; a compile for a TPU slice where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from lara_jax import cli
from lara_jax.aot import compile as aot
from lara_jax.aot.chips import topology
from lara_jax.config import load_recipe

DEBUG = "configs/debug.py"
KEYS = {
    "devices",
    "peak_memory_bytes",
    "argument_bytes",
    "temporary_bytes",
    "hbm_bytes",
    "fits",
    "flops",
    "estimated_step_seconds",
    "mfu",
    "collective_bytes",
    "compile_seconds",
}


def without_libtpu(name: str) -> None:
    assert name == "libtpu"


def test_without_libtpu_it_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(aot.importlib.util, "find_spec", without_libtpu)
    assert cli.main(["aot", "--config", DEBUG, "--topology", "v5e:2x2"]) == 2
    assert "bash launch/make_env.sh .venv-tpu requirements/tpu.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5e:2"], "topology 'v5e:2' is unknown"),
        (["--topology", "v5e:2x2", "--num-slices", "0"], "--num-slices must be 1 or more"),
        (["--topology", "v5e:2x2", "--config.no.such=1"], "such"),
        (["--topology", "v5e:2x2", "--num-slices", "2", "--what", "policy"], "on one device"),
    ],
)
def test_wrong_calls(arguments, message, capsys):
    assert cli.main(["aot", "--config", DEBUG, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_flags_and_variables(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: name)
    for name in (*aot.NO_TPU, "LIBTPU_INIT_ARGS"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    told = {}
    monkeypatch.setattr(aot.jax.config, "update", told.__setitem__)
    flags = aot.set_environment(topology("v5e:2x2"), 2)
    assert told == {"jax_platforms": "cpu"}
    assert "--xla_tpu_enable_async_collective_fusion=true" in flags
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in flags
    assert os.environ["LIBTPU_INIT_ARGS"] == flags
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_an_unknown_stage():
    with pytest.raises(ValueError, match="no stage 'last' in the recipe"):
        aot.stage_outline(load_recipe(DEBUG, []), "last")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (requirements/tpu.txt)"
)
def test_debug_recipe_on_a_slice():
    command = [sys.executable, "-m", "lara_jax.cli", "aot", "--config", DEBUG]
    command += ["--topology", "v5e:2x2", "--json"]
    plain = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert set(found) >= KEYS
    assert found["devices"] == 4
    assert found["fits"]
    assert found["flops"] == pytest.approx(found["analytic_flops"], rel=0.05)
    assert found["argument_bytes"] < found["peak_memory_bytes"] < found["hbm_bytes"]
    assert found["collectives"]["all-gather"]["ici_bytes"] > 0
    assert found["collectives"]["all-gather"]["dcn_bytes"] == 0
    assert found["unknown_loops"] == []
    assert 0 < found["mfu"] < 1
