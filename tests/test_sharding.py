"""Names to mesh axes, and that a mesh's shape changes nothing."""

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from lara_jax import sharding
from lara_jax.sharding import RULES, constrain, gather, make_mesh, partition_spec
from tests import devices

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("names", "shape", "expected"),
    [
        (("embed", "mlp"), (64, 256), ("fsdp", "tensor")),
        (("layers", "embed", "heads", "head_dim"), (3, 64, 8, 16), (None, "fsdp", "tensor", None)),
        # Rows take fsdp, so the width of an activation stays whole.
        (("batch", "length", "embed"), (16, 5, 64), (("data", "fsdp"), None, None)),
        # 4 rows fill data only; fsdp was asked for by the rows and is not handed on.
        (("batch", "length", "embed"), (4, 5, 64), ("data", None, None)),
        # An axis that does not divide the dimension is dropped.
        (("embed", "kv_heads"), (64, 3), ("fsdp", None)),
        ((None, "vocab"), (4, 10), (None, "tensor")),
        ((), (), ()),
    ],
)
def test_names_become_axes(names: tuple, shape: tuple, expected: tuple) -> None:
    assert partition_spec(SIZES, names, shape) == PartitionSpec(*expected)


def test_unknown_names_and_wrong_ranks_raise_also_without_a_mesh() -> None:
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "embed") is x
    assert gather(x, "embed", "mlp") is x
    with pytest.raises(ValueError, match="unknown logical axis 'mpl'"):
        gather(x, "embed", "mpl")
    with pytest.raises(ValueError, match=r"unknown logical axis 'embedd'; known: .*embed"):
        constrain(x, "batch", "embedd")
    with pytest.raises(ValueError, match="3 axis names"):
        constrain(x, "batch", "length", "embed")


def test_every_rule_uses_axes_of_the_mesh() -> None:
    assert {axis for axes in RULES.values() for axis in axes} == set(sharding.MESH_AXES)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "data=3 x fsdp=1 x tensor=1 does not match 1 devices"),
        ((-1, -1, 1), "at most one of them -1"),
        ((0, 1, 1), "must be positive"),
        ((-1, 2, 1), "does not match 1 devices"),
    ],
)
def test_impossible_meshes_are_refused(shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(*shape, devices=jax.devices()[:1])


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device of a cluster that is not there; its place in the slice is that of its id."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    sides: tuple[int, int] = (4, 4)
    device_kind: str = "TPU v6 lite"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return (*np.unravel_index(self.id % math.prod(self.sides), self.sides), 0)


def tpus(slices: int) -> list[Device]:
    """Slices of 4 x 4 chips, a host having 2 x 2; listed one chip of each slice at a time."""
    return [
        Device(
            id=16 * number + 4 * x + y,
            process_index=4 * number + x // 2 * 2 + y // 2,
            slice_index=number,
            platform="tpu",
        )
        for x in range(4)
        for y in range(4)
        for number in range(slices)
    ]


def field(mesh: Mesh, name: str) -> np.ndarray:
    return np.vectorize(lambda device: getattr(device, name))(mesh.devices)


@pytest.mark.parametrize("sizes", [(2, -1, 2), (-1, 8, 2), (4, 2, -1), (2, 16, 1)])
def test_data_goes_over_the_slices(sizes: tuple[int, int, int]) -> None:
    mesh = make_mesh(*sizes, devices=tpus(2))
    slices = field(mesh, "slice_index")
    assert all(known in (-1, size) for known, size in zip(sizes, slices.shape, strict=True))
    half = len(slices) // 2
    assert (slices[:half] == 0).all()
    assert (slices[half:] == 1).all()


@pytest.mark.parametrize("sizes", [(1, -1, 1), (-1, 32, 1), (3, -1, 1)])
def test_what_crosses_slices_other_than_data_is_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"of the 2 slices|does not match 32 devices"):
        make_mesh(*sizes, devices=tpus(2))
    with pytest.raises(ValueError, match=r"config.mesh.data is 2, .* multiple of the 3 slices"):
        make_mesh(2, -1, 1, devices=tpus(3))


def test_tensor_and_fsdp_stay_within_a_host_of_gpus() -> None:
    """XLA numbers GPUs by host, but JAX may list them otherwise; each host is a slice to it."""
    gpus = [Device(id=i, process_index=i // 4, slice_index=i // 4) for i in range(16)]
    mesh = make_mesh(1, -1, 2, devices=gpus[::-1])
    assert field(mesh, "id").ravel().tolist() == list(range(16))
    hosts = field(make_mesh(4, 2, 2, devices=gpus), "process_index")
    assert all(len(set(row.ravel())) == 1 for row in hosts)


def test_tensor_stays_within_a_host_of_tpus() -> None:
    hosts = field(make_mesh(1, 8, 2, devices=tpus(1)), "process_index")
    assert all(len(set(pair)) == 1 for pair in hosts.reshape(-1, 2))


def test_rows_are_read_where_they_are() -> None:
    """Hosts of 2 x 2 chips in a slice of 4 x 4: what one holds does not lie together."""
    mesh = make_mesh(1, 16, 1, devices=tpus(1))
    held = [sharding.local_rows(mesh, 32, process) for process in range(4)]
    hosts = np.repeat(field(mesh, "process_index").ravel(), 2)
    assert (np.diff(hosts) != 0).sum() > 3
    for process, rows in enumerate(held):
        assert rows.tolist() == np.flatnonzero(hosts == process).tolist()
    parts = [sharding.reader(mesh, process) for process in range(4)]
    assert sorted(parts) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_processes_that_share_rows_read_the_same() -> None:
    gpus = [Device(id=i, process_index=i // 2) for i in range(8)]
    mesh = make_mesh(1, 2, 4, devices=gpus)
    assert [sharding.reader(mesh, p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert sharding.local_rows(mesh, 8, 3).tolist() == [4, 5, 6, 7]
    uneven = [Device(id=i, process_index=i // 3) for i in range(6)]
    with pytest.raises(ValueError, match="tensor=2 makes processes hold parts of each other"):
        sharding.reader(make_mesh(1, 3, 2, devices=uneven), 0)


def test_trees_name_the_leaf_that_is_wrong() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    tree = {"a": {"w": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match=r"\['a'\]\['w'\]: unknown logical axis 'wdth'"):
        sharding.shard_tree(mesh, {"a": {"w": ("embed", "wdth")}}, tree)


# Runs in its own process, because the number of devices is fixed when JAX starts.
EIGHT_DEVICES = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from lara_jax import sharding

mesh = sharding.make_mesh(2, -1, 2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}, mesh
tree = {"w": jnp.ones((8, 4)), "norm": jnp.ones(8)}
axes = {"w": ("embed", "mlp"), "norm": P("embed")}
params = sharding.shard_tree(mesh, axes, tree)
assert params["w"].spec == P("fsdp", "tensor") and params["norm"].spec == P("fsdp")

# Optimizer states repeat the tree of parameters somewhere inside.
state = {"count": jnp.int32(0), "moments": ({"part": tree}, {"w": jnp.ones((3, 4))})}
like = sharding.shard_like(mesh, state, tree, params)
assert like["moments"][0]["part"]["w"].spec == P("fsdp", "tensor")
assert like["count"].spec == P()
assert like["moments"][1]["w"].spec == P()  # same name, other shape

rows = sharding.batch_sharding(mesh, {"x": jnp.ones((8, 3))})
assert rows["x"].spec == P(("data", "fsdp"), None)
for rows, pieces in ((6, 1), (8, 4)):
    try:
        sharding.batch_sharding(mesh, {"x": jnp.ones((rows, 3))}, pieces)
    except ValueError as error:
        assert f"a batch of {rows} rows does not split into {pieces} pieces" in str(error)
    else:
        raise AssertionError("uneven rows were accepted")

@jax.jit
def f(x):
    return sharding.constrain(x * 2, "batch", "length", "embed")

# The compiler's error that `gather` works around shows in a chain of kernels of this kind.
names = (("embed", "mlp"), ("embed", "mlp"), ("mlp", "action"))
keys = jax.random.split(jax.random.key(0), 4)
kernels = [jax.random.normal(key, shape) / 10 for key, shape in
           zip(keys, ((128, 128), (128, 128), (128, 7)))]
x = jax.random.normal(keys[3], (8, 32, 128))

def gradients(kernels, x):
    def loss(kernels):
        h = x
        for kernel, axes in zip(kernels, names):
            h = jnp.tanh(h @ sharding.gather(kernel, *axes))
        return (h**3).mean()
    return jax.grad(loss)(kernels)

expected = jax.jit(gradients)(kernels, x)
where = sharding.shard_tree(mesh, list(names), kernels), sharding.batch_sharding(mesh, x)
with jax.set_mesh(mesh):
    found = jax.jit(gradients, in_shardings=where, out_shardings=where[0])(kernels, x)
for a, b in zip(found, expected):
    assert float(jnp.abs(jax.device_get(a) - b).max() / jnp.abs(b).max()) < 1e-5

with jax.set_mesh(mesh):
    assert f(jnp.ones((8, 4, 16))).sharding.spec == P(("data", "fsdp"))
print("done")
"""


def test_on_eight_devices(repository: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES],
        cwd=repository,
        env=devices.environment(8),
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "done", run.stderr
