"""A run goes on where it was saved, on another mesh and with another number of processes.

The model is that of `soak/tiny.py`, whose kernels are split along both of their axes; the networks
themselves are compared across meshes in test_train.py.
"""

import csv
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.devices import environment
from tests.soak import tiny

SETTINGS = (
    "train.stages=latent_2",
    "train.steps=6",
    "data.batch_size=8",
    "checkpoint.every_steps=3",
    "checkpoint.keep=9",
    "log.every_steps=1",
    "optimizer.epsilon=1e-3",
    "teacher.momentum=0.5",
)
CHILD = """
import sys
from pathlib import Path

import jax

from lara_jax import sharding, train
from lara_jax.config import load_recipe
from tests.soak import tiny

data, address, number, *arguments = sys.argv[1:]
if address:
    jax.distributed.initialize(address, 2, int(number))
tiny.use_tiny_model(setattr)
make_mesh = sharding.make_mesh
for argument in arguments:
    workdir, mesh, *settings = argument.split()
    sizes = [int(n) for n in mesh.split("x")]
    devices = jax.devices()[: sizes[0] * sizes[1] * sizes[2]]
    sharding.make_mesh = lambda *_: make_mesh(*sizes, devices=devices)
    recipe = load_recipe("configs/debug.py", [f"data.path={data}", *settings])
    state = train.train(recipe, Path(workdir))
    kernel = state.params["text"]["kernel"]
    part = kernel.addressable_shards[0].data.size
    assert part * sizes[1] * sizes[2] == kernel.size, (mesh, part)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_data(tmp_path_factory.mktemp("data"), 20)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Six steps on one device, saved after three and six."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    Training(repository, data, 8, [arguments(workdir, "1x1x1")]).check()
    return workdir


class Training:
    """A process, or one of two, that trains in several directories one after the other."""

    def __init__(
        self,
        repository: Path,
        data: Path,
        devices: int,
        runs: list[str],
        address: str = "",
        number: int = 0,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(data), address, str(number), *runs],
            cwd=repository,
            env=environment(devices),
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self) -> str:
        """Standard error of a process that has ended well."""
        _, told = self._process.communicate()
        assert self._process.returncode == 0, told[-3000:]
        return told


def arguments(workdir: Path, mesh: str) -> str:
    return " ".join([str(workdir), mesh, *SETTINGS])


def halfway(undisturbed: Path, workdir: Path) -> Path:
    """A copy of the run as it stood after three steps."""
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    return workdir


def losses(workdir: Path) -> np.ndarray:
    """Loss and gradient norm of all six steps."""
    with (workdir / "metrics.csv").open() as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    return np.array([[float(row["loss"]), float(row["gradient_norm"])] for row in rows])


MESHES = ("1x1x1", "8x1x1", "2x4x1", "4x2x1", "1x4x2")  # data x fsdp x tensor


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_losses(
    undisturbed: Path, data: Path, repository: Path, tmp_path: Path
) -> None:
    runs = {mesh: halfway(undisturbed, tmp_path / mesh) for mesh in MESHES}
    told = Training(repository, data, 8, [arguments(path, mesh) for mesh, path in runs.items()])
    assert told.check().count("resuming at step 3 ") == len(MESHES)
    for mesh, workdir in runs.items():
        np.testing.assert_allclose(losses(workdir), losses(undisturbed), rtol=1e-5, err_msg=mesh)


def by_two(repository: Path, data: Path, workdir: Path, mesh: str, devices: int) -> list[str]:
    """What two processes, with so many devices each, tell of a run that goes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    run = [arguments(workdir, mesh)]
    both = [Training(repository, data, devices, run, address, number) for number in (0, 1)]
    return [process.check() for process in both]


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_saved(
    undisturbed: Path, data: Path, repository: Path, tmp_path: Path
) -> None:
    workdir = halfway(undisturbed, tmp_path / "two")
    told = by_two(repository, data, workdir, "2x4x1", 4)
    assert ["resuming at step 3 " in lines for lines in told] == [True, False]  # one speaks
    np.testing.assert_allclose(losses(workdir), losses(undisturbed), rtol=1e-5)
    # And back to one.
    shutil.rmtree(workdir / "checkpoints" / "3")
    again = Training(repository, data, 8, [arguments(workdir, "1x8x1") + " train.steps=7"])
    assert "resuming at step 6 " in again.check()


@pytest.mark.slow
def test_two_processes_that_share_their_rows(
    undisturbed: Path, data: Path, repository: Path, tmp_path: Path
) -> None:
    """`tensor` goes over both, so that each must read the whole batch."""
    workdir = halfway(undisturbed, tmp_path / "shared")
    by_two(repository, data, workdir, "1x1x2", 1)
    np.testing.assert_allclose(losses(workdir), losses(undisturbed), rtol=1e-5)
