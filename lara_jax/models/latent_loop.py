"""The latent loop: K slots, one after the other, each fed the hidden state before it.

Sizes decide its layout. A step's activations are one token a row, its weights are all of the text
decoder's. So inside the loop the weights stay where they are and activations travel
(`lara_jax.sharding.product`): every device multiplies all rows of its `fsdp` group with its piece
of a kernel. Attention is over the rows that a device has anyway. This part of the program says
itself what is exchanged (`jax.shard_map` over `data` and `fsdp`; `tensor` is left to the compiler).

Backwards, the loop has no sum of weight gradients (`lara_jax.models.tape`), and recomputes what
lies between the projections, but not these: they would have to be exchanged again.

Letters: B rows, P prefix, K slots, D width, L layers.

Source of the layout: arXiv 2211.05102, section 3.2.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec

from lara_jax.models import masks
from lara_jax.models.layers import COLLECTIONS, LOOP_REMAT, rms_norm
from lara_jax.models.tape import TAPE, Tape, blank
from lara_jax.models.text_decoder import (
    DecoderLayer,
    KeyValues,
    TextConfig,
    decoder_layers,
    run_layers,
)
from lara_jax.sharding import RULES, partition_spec

Variables = dict[str, Any]
Path = tuple[str, ...]


class LatentLoop(nn.Module):
    """The text decoder's layers and final norm, K times; parameters named as there."""

    config: TextConfig
    slots: int
    source: str
    dtype: Any
    recompute: bool
    implementation: str

    def setup(self) -> None:
        layer = DecoderLayer
        if self.recompute:
            layer = nn.remat(layer, prevent_cse=False, policy=LOOP_REMAT)
        layers = decoder_layers(layer, self.config.layers)
        self.layers = layers(self.config, self.dtype, self.implementation)
        self.norm = rms_norm("embed", epsilon=self.config.norm_eps, dtype=self.dtype)

    def __call__(
        self,
        hidden: jax.Array,
        prefix_kv: KeyValues,
        prefix_valid: jax.Array,
        positions: jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        """As `think`."""
        K = self.slots

        def step(
            loop: LatentLoop, carry: Any, k: jax.Array, position: jax.Array, invariant: Any
        ) -> tuple[Any, jax.Array]:
            previous, slot_kv = carry
            prefix_kv, prefix_valid = invariant
            if loop.source == "post_norm":
                previous = loop.norm(previous)
            mask = masks.slot_mask(prefix_valid, K, k)
            past = (prefix_kv, slot_kv)
            hidden, new = run_layers(
                loop.layers, loop.config, previous, position[..., None], mask, past
            )
            slot_kv = jax.tree.map(
                lambda slots, one: jax.lax.dynamic_update_slice_in_dim(slots, one, k, axis=2),
                slot_kv,
                new,
            )
            return (hidden, slot_kv), hidden[:, 0]

        scan = nn.scan(
            step,
            variable_broadcast=COLLECTIONS,
            variable_axes={TAPE: 0},
            split_rngs={"params": False},
            in_axes=(0, 2, nn.broadcast),
            out_axes=1,
            length=K,
        )
        empty = jax.tree.map(
            lambda x: jnp.zeros_like(x, shape=(*x.shape[:2], K, *x.shape[3:])), prefix_kv
        )
        invariant = prefix_kv, prefix_valid
        (_, slot_kv), slot_hidden = scan(self, (hidden, empty), jnp.arange(K), positions, invariant)
        return slot_hidden, slot_kv


def think(
    loop: LatentLoop,
    variables: Variables,
    hidden: jax.Array,
    prefix_kv: KeyValues,
    prefix_valid: jax.Array,
    positions: jax.Array,
) -> tuple[jax.Array, KeyValues]:
    """Runs the loop with the text decoder's variables, laid out over the mesh as above.

    Where rows are not split, or do not split evenly, the compiler places the loop.

    Args:
      loop: unbound.
      variables: by collection, the text decoder's tree.
      hidden: float[B, 1, D], the hidden state before the first slot, before the final norm.
      prefix_kv: the prefix's keys and values, loop-invariant.
      prefix_valid: bool[B, P].
      positions: int32[3, B, K] of the slots.

    Returns:
      the slots' hidden states float[B, K, D] before the final norm, and their keys and values.
    """
    variables = {
        name: {part: tree[part] for part in ("layers", "norm") if part in tree}
        for name, tree in variables.items()
    }
    inputs = hidden, prefix_kv, prefix_valid, positions
    _, recorded = jax.eval_shape(partial(loop.apply, mutable=[TAPE]), variables, *inputs)
    places: dict[Path, Tape] = flatten_dict(recorded[TAPE])
    params = flatten_dict(variables["params"])
    kernels = {path: params.pop(path).astype(loop.dtype) for path in places}
    rest = {**variables, "params": unflatten_dict(params)}
    run = partial(_run, loop, places)
    mesh = jax.sharding.get_abstract_mesh()
    axes = RULES["batch"]
    sizes = {axis: mesh.shape.get(axis, 1) for axis in axes}
    rows = partition_spec(sizes, ("batch",), hidden.shape[:1])[0]
    if rows != axes or math.prod(sizes.values()) == 1:
        return run(kernels, rest, *inputs)
    pieces = {
        path: partition_spec(sizes, ("layers", *place.names), kernels[path].shape)
        for path, place in places.items()
    }
    whole, first, second = PartitionSpec(), PartitionSpec(rows), PartitionSpec(None, rows)
    # The compiler sums each parameter's gradient over the axes that its spec leaves out, once.
    return jax.shard_map(
        run,
        in_specs=(pieces, whole, first, second, first, second),
        out_specs=(first, second),
        axis_names=set(axes),
        check_vma=False,  # Flax's scan forgets which arrays differ between devices.
    )(kernels, rest, *inputs)


def _run(
    loop: LatentLoop,
    places: dict[Path, Tape],
    kernels: dict[Path, jax.Array],
    variables: Variables,
    hidden: jax.Array,
    *inputs: Any,
) -> tuple[jax.Array, KeyValues]:
    """The loop on these rows, with kernels or pieces of them, recorded on a tape."""

    def zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
        steps, layers, _, *rest = shape.shape
        return jnp.zeros((steps, layers, len(hidden), *rest), shape.dtype)

    tape = {path: blank(kernels[path], jax.tree.map(zeros, places[path])) for path in places}
    params = flatten_dict(variables["params"]) | jax.lax.stop_gradient(kernels)
    variables = {**variables, "params": unflatten_dict(params), TAPE: unflatten_dict(tape)}
    return loop.apply(variables, hidden, *inputs)
