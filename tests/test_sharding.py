"""Names to mesh axes, and that a mesh's shape changes nothing."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

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
