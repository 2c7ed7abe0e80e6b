"""`launch/xla_flags.sh`: flags that exist, for platforms that exist."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import Launch, refused

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# The cheapest thing that reads XLA_FLAGS, and the one that reads LIBTPU_INIT_ARGS without a TPU.
READ_XLA_FLAGS = "import jaxlib.xla_client as client; client.make_cpu_client()"
READ_LIBTPU_INIT_ARGS = (
    "from jax.experimental import topologies;"
    "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
)


def variables(launch: Launch, *arguments: str, **environment: str) -> dict[str, str]:
    """What the script prints, as a dictionary."""
    run = launch("xla_flags.sh", *arguments, **environment)
    assert run.returncode == 0, run.stderr
    return dict(line.split("=", 1) for line in run.stdout.splitlines())


def read_by(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python `code` in a process that has these variables."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_jaxlib_knows_the_flags_of_cuda(launch: Launch) -> None:
    flags = variables(launch, "cuda")["XLA_FLAGS"]
    run = read_by(READ_XLA_FLAGS, XLA_FLAGS=flags)
    assert run.returncode == 0, run.stderr
    run = read_by(READ_XLA_FLAGS, XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=true")
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_no_such_flag" in run.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (the tpu extra)"
)
@pytest.mark.parametrize("platform", TPUS)
def test_libtpu_knows_the_flags_of_tpus(launch: Launch, platform: str) -> None:
    flags = variables(launch, platform, "2")["LIBTPU_INIT_ARGS"]
    alone = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    run = read_by(READ_LIBTPU_INIT_ARGS, LIBTPU_INIT_ARGS=flags, **alone)
    assert run.returncode == 0, run.stderr
    wrong = f"{flags} --xla_tpu_no_such_flag=true"
    run = read_by(READ_LIBTPU_INIT_ARGS, LIBTPU_INIT_ARGS=wrong, **alone)
    assert "Unknown command line flag 'xla_tpu_no_such_flag'" in run.stderr


def test_slices_and_v5e_get_more(launch: Launch) -> None:
    one = {name: variables(launch, name)["LIBTPU_INIT_ARGS"].split() for name in TPUS}
    assert one["v4"] == one["v5p"] == one["v6e"] == one["tpu7x"]
    assert set(one["v4"]) < set(one["v5e"])
    two = variables(launch, "v4", "2")["LIBTPU_INIT_ARGS"].split()
    assert two[: len(one["v4"])] == one["v4"]
    assert all("data_parallel" in flag for flag in two[len(one["v4"]) :])
    assert len(two) == len(one["v4"]) + 2


def test_the_callers_flags_come_last(launch: Launch) -> None:
    mine = variables(launch, "v4", LIBTPU_INIT_ARGS="--mine=1")["LIBTPU_INIT_ARGS"]
    assert mine.endswith(" --mine=1")
    mine = variables(launch, "cuda", XLA_FLAGS="--mine=1")["XLA_FLAGS"]
    assert mine.endswith(" --mine=1")


def test_every_group_names_its_source(repository: Path) -> None:
    text = (repository / "launch/xla_flags.sh").read_text()
    for block in text.split("\n)\n")[:-1]:
        assert "Source:" in block or "the same page" in block, block.splitlines()[-2:]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["v9"], ["'v9'", "v4 v5e v5p v6e tpu7x cuda"]),
        (["v4", "no"], ["'no'", "from 1"]),
        ([], ["usage"]),
    ],
)
def test_wrong_calls_are_named(launch: Launch, arguments: list[str], parts: list[str]) -> None:
    refused(launch("xla_flags.sh", *arguments), parts)
