"""`lara aot`: refusals everywhere; a compile for a TPU slice where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from lara_jax import cli, sharding
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


@dataclass(frozen=True)
class Device:
    """A device of a slice."""

    id: int
    slice_index: int


def test_data_goes_over_the_slices(monkeypatch):
    def mesh_of_slice(data, fsdp, tensor, *, devices):
        return SimpleNamespace(devices=np.array(devices).reshape(data, 2, tensor))

    monkeypatch.setattr(sharding, "make_mesh", mesh_of_slice)
    devices = [Device(i, i % 2) for i in range(16)]
    recipe = load_recipe(DEBUG, ["mesh.data=4", "mesh.fsdp=-1", "mesh.tensor=2"])
    mesh = aot.slice_mesh(recipe, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 2}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices[:2] == 0).all()
    assert (slices[2:] == 1).all()


def test_data_that_does_not_split_over_the_slices():
    devices = [Device(i, i % 2) for i in range(4)]
    with pytest.raises(ValueError, match="data is 1, but it must be a multiple of the 2 slices"):
        aot.slice_mesh(load_recipe(DEBUG, []), devices)


def test_an_unknown_stage():
    with pytest.raises(ValueError, match="no stage 'last' in the recipe"):
        aot._outline(load_recipe(DEBUG, []), "last")


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
