"""Who holds which part of an array: the only file that knows the mesh's axes.

A mesh has three axes. Rows of a batch are split over `data` and `fsdp`. Parameters and optimizer
state are split over `fsdp` (each device keeps a piece and gathers a layer when it runs it) and,
inside a layer, over `tensor`. Models never name these: they give every dimension a LOGICAL name,
and `RULES` says where it lives, so a new layout is one line here.

    on a (data=2, fsdp=4, tensor=1) mesh
    activation  "batch", "length", "embed"  ->  rows split 8 ways, the rest whole
    parameter   "embed", "mlp"              ->  embed split 4 ways

Three rules turn names into a `PartitionSpec`:

1. an unknown name raises (Flax would replicate a misspelt one in silence);
2. a mesh axis serves one dimension only, the first that asks (rows of activations take `fsdp`, so
   their `embed` stays whole);
3. an axis that does not divide the dimension is dropped, because XLA needs even shards (8 kv heads
   on a 16-way `tensor`).
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "slots": (),
    "action": (),
    "state": (),
    # text decoder
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "layers": (),
    # vision tower
    "vision_embed": ("fsdp",),
    "vision_heads": ("tensor",),
    "vision_mlp": ("tensor",),
    "patch": (),
    "positions": (),
    # action expert
    "expert_embed": ("fsdp",),
    "expert_heads": ("tensor",),
    "expert_mlp": ("tensor",),
}

Names = Sequence[str | None]


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Lays the devices out as (data, fsdp, tensor): the last axes on the fastest links.

    `data` goes over the slices of a TPU first, since only it exchanges little enough for the
    network between them. Inside a slice JAX follows the chips' links. Other devices stand in the
    order of their hosts, so that `tensor`, then `fsdp`, stays within a host where it can.

    Args:
      data: copies of the parameters. At most one of the three numbers is -1: whatever is left.
      fsdp: pieces that parameters, optimizer state and rows are split into.
      tensor: pieces that heads, mlp and vocabulary are split into.
      devices: the devices; all of them when None.

    Returns:
      A mesh with axes ("data", "fsdp", "tensor"), to be entered with `jax.set_mesh`.

    Raises:
      ValueError: when the product is not the number of devices, or `data` does not split over the
        slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(data, fsdp, tensor, len(devices))
    auto = (AxisType.Auto,) * len(MESH_AXES)
    if devices[0].platform != "tpu":
        devices.sort(key=lambda device: (_slice(device), device.process_index, device.id))
        return Mesh(np.reshape(devices, tuple(shape.values())), MESH_AXES, axis_types=auto)
    slices = [list(part) for _, part in groupby(sorted(devices, key=_slice), key=_slice)]
    if shape["data"] % len(slices):
        raise ValueError(
            f"config.mesh.data is {shape['data']}, but it must be a multiple of the {len(slices)} "
            "slices, as only data crosses the network between them"
        )
    inside = (shape["data"] // len(slices), shape["fsdp"], shape["tensor"])
    # Sizes need not be sides of the slice: a side may be split (tensor=2 on 4x4x4 chips).
    layouts = [create_device_mesh(inside, part, allow_split_physical_axes=True) for part in slices]
    return Mesh(np.concatenate(layouts), MESH_AXES, axis_types=auto)


def mesh_shape(data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The sizes of a mesh of so many devices, -1 replaced by what is left.

    Raises:
      ValueError: when the product is not the number of devices.
    """
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    wrong = {name: size for name, size in shape.items() if size < 1 and size != -1}
    rest = [name for name, size in shape.items() if size == -1]
    if wrong or len(rest) > 1:
        raise ValueError(f"mesh sizes must be positive, at most one of them -1, got {shape}")
    known = math.prod(size for size in shape.values() if size != -1)
    if rest and devices % known == 0:
        shape[rest[0]] = devices // known
    if math.prod(shape.values()) != devices:
        wanted = " x ".join(f"{name}={size}" for name, size in shape.items())
        raise ValueError(f"mesh {wanted} does not match {devices} devices")
    return shape


def _slice(device: jax.Device) -> int:
    """The slice a TPU is in; of GPUs, the host or the hosts that NVLink joins."""
    return getattr(device, "slice_index", 0)


def local_rows(mesh: Mesh, rows: int, process: int | None = None) -> np.ndarray:
    """Which rows of a batch on the devices a process holds: int64[n], ascending.

    Args:
      mesh: the devices.
      rows: of the batch.
      process: its number; None for this one.
    """
    held = _held_rows(mesh)[jax.process_index() if process is None else process]
    size = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    return np.concatenate([np.arange(piece * size, (piece + 1) * size) for piece in held])


def reader(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of each batch a process reads, and how many parts there are.

    Processes whose devices differ only along `tensor` hold the same rows, and read the same part.

    Args:
      mesh: the devices.
      process: its number; None for this one.

    Raises:
      ValueError: processes hold parts of each other's rows.
    """
    held = _held_rows(mesh)
    parts = sorted(set(held.values()))
    pieces = mesh.shape["data"] * mesh.shape["fsdp"]
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != pieces:
        raise ValueError(
            f"config.mesh.tensor={mesh.shape['tensor']} makes processes hold parts of each other's "
            "rows; choose one that divides the devices of a process, or that they divide"
        )
    return parts.index(held[jax.process_index() if process is None else process]), len(parts)


def _held_rows(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """By process: the pieces of a batch, of data x fsdp many, that its devices hold."""
    held: dict[int, set[int]] = {}
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    for (piece, _), device in np.ndenumerate(rows):
        held.setdefault(device.process_index, set()).add(piece)
    return {process: tuple(sorted(pieces)) for process, pieces in held.items()}


def partition_spec(axis_sizes: dict[str, int], names: Names, shape: Sequence[int]) -> PartitionSpec:
    """Where the dimensions of one array live.

    Args:
      axis_sizes: devices along each mesh axis.
      names: one logical name (or None: whole) for each dimension.
      shape: the array's shape.

    Returns:
      The spec after the three rules above; `partition_spec({"data": 1, "fsdp": 4, "tensor": 2},
      ("embed", "mlp"), (64, 256))` is `PartitionSpec("fsdp", "tensor")`.

    Raises:
      ValueError: for an unknown name, or when there is not one name per dimension.
    """
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} axis names {tuple(names)} for an array of shape {shape}")
    free = dict(axis_sizes)
    entries: list[Any] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; known: {', '.join(sorted(RULES))}")
        taken: list[str] = []
        shards = 1
        for axis in RULES[name] if name is not None else ():
            devices = free.pop(axis, None)
            if devices is not None and size % (shards * devices) == 0:
                shards *= devices
                taken.append(axis)
        entries.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Tells the compiler where an activation lives; does nothing outside `jax.set_mesh`.

    Args:
      x: any array.
      names: one logical name (or None) for each dimension; checked also where there is no mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = partition_spec(_automatic(mesh), names, x.shape)
    return x if mesh.empty or mesh.size == 1 else jax.lax.with_sharding_constraint(x, spec)


def gather(parameter: jax.Array, *names: str | None) -> jax.Array:
    """A parameter as a layer uses it: its pieces along `fsdp` put together, `tensor` kept.

    The compiler would gather it by itself. But without this, on a mesh with data, fsdp and tensor
    all above 1, it gets some gradients wrong: it forgets to sum over `data` where a sum over rows
    becomes a matrix that is split over `fsdp` only (openxla/xla issue 40034). Said here, the sum
    is complete before it is split.

    Args:
      parameter: a kernel or table.
      names: one logical name (or None) for each dimension.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in _automatic(mesh).items() if axis != "fsdp"}
    spec = partition_spec(sizes, names, parameter.shape)
    if mesh.empty or mesh.size == 1:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, spec)


def product(
    x: jax.Array, kernel: jax.Array, *, inputs: int, names: Names, shape: Sequence[int]
) -> jax.Array:
    """The product of a layer: the last axes of x with the first ones of a kernel.

    As a rule the kernel is gathered. Where `fsdp` is manual (inside `jax.shard_map`) `x` has this
    device's rows and `kernel` is its piece, which stays; all rows of the group come to it:

        kernel split by outputs     all rows of x, whole   -> product -> its columns, to their rows
        kernel split by inputs      its columns of all x   -> product -> summed, to their rows

    Args:
      x: float[B, ..., *inputs].
      kernel: float[*inputs, *outputs], or a piece of it.
      inputs: how many axes are contracted.
      names: one logical name for each axis of the whole kernel.
      shape: of the whole kernel.

    Returns:
      float[B, ..., *outputs].
    """
    contracted = tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))

    def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.dot_general(x, kernel, (contracted, ((), ())))

    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.manual_axes:
        return dot(x, gather(kernel, *names))
    held = list(partition_spec({"fsdp": mesh.shape["fsdp"]}, names, shape))
    if "fsdp" not in held:
        return dot(x, kernel)
    split = held.index("fsdp")
    move = partial(jax.lax.all_to_all, axis_name="fsdp", tiled=True)
    if split < inputs:
        mine = move(x, split_axis=x.ndim - inputs + split, concat_axis=0)
        return jax.lax.psum_scatter(dot(mine, kernel), "fsdp", scatter_dimension=0, tiled=True)
    mine = dot(jax.lax.all_gather(x, "fsdp", axis=0, tiled=True), kernel)
    return move(mine, split_axis=0, concat_axis=mine.ndim - len(shape) + split)


def _automatic(mesh: Any) -> dict[str, int]:
    """Axes that the compiler divides the work over, and their sizes."""
    return {axis: size for axis, size in mesh.shape.items() if axis not in mesh.manual_axes}


def named_sharding(mesh: Mesh, names: Names, shape: Sequence[int]) -> NamedSharding:
    """The sharding of one array with these logical names and this shape."""
    return NamedSharding(mesh, partition_spec(dict(mesh.shape), names, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_tree(mesh: Mesh, names: Any, tree: Any) -> Any:
    """Shardings of a tree of arrays.

    Args:
      mesh: the devices.
      names: the same tree, each array replaced by a tuple (or `PartitionSpec`) of logical names.
      tree: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: for an unknown name or a wrong number of names, with the leaf's path.
    """
    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    shardings = []
    for (path, leaf), leaf_names in zip(leaves, treedef.flatten_up_to(names), strict=True):
        try:
            shardings.append(named_sharding(mesh, tuple(leaf_names), leaf.shape))
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from error
    return treedef.unflatten(shardings)


def shard_like(mesh: Mesh, tree: Any, params: Any, param_shardings: Any) -> Any:
    """Shardings of a tree that repeats parts of the parameters (the optimizer's moments).

    A leaf whose path ENDS with the path of a parameter of the same shape lives where that
    parameter lives; all else (counters, keys) is replicated.
    """

    def parts(path: Any) -> tuple[str, ...]:
        return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)

    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    where = {
        (parts(path), leaf.shape): sharding
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(param_shardings), strict=True)
    }

    def find(path: Any, leaf: Any) -> NamedSharding:
        names = parts(path)
        tails = (where.get((names[start:], leaf.shape)) for start in range(len(names)))
        return next((sharding for sharding in tails if sharding is not None), replicated(mesh))

    return jax.tree_util.tree_map_with_path(find, tree)


def batch_sharding(mesh: Mesh, tree: Any, pieces: int = 1) -> Any:
    """Shardings of a batch: the leading dimension of every leaf is rows.

    Args:
      mesh: the devices.
      tree: the batch's shapes.
      pieces: micro-batches it is cut into; each has to split evenly, too.

    Raises:
      ValueError: when the rows cannot be split evenly.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    def rows(leaf: Any) -> NamedSharding:
        if leaf.shape[0] % (pieces * shards):
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows does not split into {pieces} pieces over "
                f"data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} = {shards} devices"
            )
        return named_sharding(mesh, ("batch", *[None] * (len(leaf.shape) - 1)), leaf.shape)

    return jax.tree.map(rows, tree)


def put(batch: Any, shardings: Any) -> Any:
    """A batch on the devices; every process gives the rows of its own devices.

    Args:
      batch: NumPy arrays: this process's rows, in the order of the batch.
      shardings: from `batch_sharding`.
    """
    return jax.tree.map(
        lambda leaf, where: jax.make_array_from_process_local_data(where, leaf), batch, shardings
    )
