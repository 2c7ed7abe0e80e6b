"""Building blocks shared by the three networks: dense layers and norms whose parameters carry named
axes.

Every parameter is created with logical axis names (`nn.with_logical_partitioning`);
`lara_jax.sharding` is the one place that maps those names to mesh axes. Parameters are float32;
`dtype` is what a layer computes in. Norms always compute in float32.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lara_jax.models.tape import TAPE, Tape, taped
from lara_jax.sharding import product

Names = tuple[str | None, ...]

KERNEL_INIT = nn.initializers.lecun_normal()
EMBEDDING_INIT = nn.initializers.normal(0.02)

# What a layer is made of: its parameters, and low-rank factors of its kernels (`lara_jax.lora`).
COLLECTIONS = ("params", "lora")

HOST_MEMORY = "pinned_host"

# What the backward pass finds again: everything, nothing, the products with a parameter, or these
# from the host's memory, where they wait meanwhile.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY),
}

# Of the latent loop's layers it finds the outputs of dense layers, which are small.
PROJECTION = "projection"
LOOP_REMAT = jax.checkpoint_policies.save_only_these_names(PROJECTION)


class Dense(nn.Module):
    """A dense layer over the last `inputs` axes whose kernel axes are called `names`.

    In `lara_jax.models.latent_loop` it finds a piece of its kernel and a tape: see there.

    Attributes:
      features: output axes.
      names: one logical name per kernel axis, inputs first; the bias takes those of the outputs.
      inputs: how many trailing input axes are contracted.
      use_bias: whether to add a bias.
      dtype: compute dtype; parameters stay float32.
    """

    features: tuple[int, ...]
    names: Names
    inputs: int = 1
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[..., *inputs] -> float[..., *features] in `dtype`."""
        inputs = x.shape[x.ndim - self.inputs :]
        shape = (*inputs, *self.features)
        multiply = partial(product, inputs=self.inputs, names=self.names, shape=shape)
        if self.has_variable(TAPE, "kernel"):
            kernel, place = (self.get_variable(c, "kernel") for c in ("params", TAPE))
            out = checkpoint_name(taped(x.astype(self.dtype), kernel, place), PROJECTION)
        else:
            matrix = math.prod(inputs), math.prod(self.features)
            init = nn.with_logical_partitioning(
                lambda key: KERNEL_INIT(key, matrix).reshape(shape), self.names
            )
            kernel = self.param("kernel", init)
            x = x.astype(self.dtype)
            out = multiply(x, kernel.astype(self.dtype))
            if self.is_mutable_collection(TAPE) and not self.is_initializing():
                self.variable(TAPE, "kernel", lambda: Tape(x, out, multiply, self.names))
        if self.use_bias:
            init = nn.with_logical_partitioning(
                nn.initializers.zeros_init(), self.names[self.inputs :]
            )
            out = out + self.param("bias", init, self.features).astype(self.dtype)
        return out


def dense(
    features: int | Sequence[int],
    names: Names,
    *,
    inputs: int = 1,
    use_bias: bool = False,
    dtype: Any = jnp.float32,
    name: str | None = None,
) -> Dense:
    """A `Dense` layer; see there. `name` is the module's name inside a compact parent."""
    features = (features,) if isinstance(features, int) else tuple(features)
    return Dense(features, names, inputs, use_bias, dtype, name=name)


def rms_norm(axis: str, *, epsilon: float, dtype: Any, name: str | None = None) -> nn.RMSNorm:
    """RMSNorm over the last axis, whose logical name is `axis`; statistics in float32."""
    scale = nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,))
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, scale_init=scale, name=name)


def layer_norm(
    axis: str | None, *, epsilon: float, dtype: Any, name: str | None = None
) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32; `axis=None`: no scale and bias."""
    affine = axis is not None
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_fast_variance=False,
        use_scale=affine,
        use_bias=affine,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), (axis,)),
        name=name,
    )


def remat(target: Any, policy: str) -> Any:
    """`target` (a module class or a lifted function) that recomputes its inside in the backward
    pass.

    Raises:
      ValueError: `policy` is not one of `REMAT_POLICIES`, or "offload" on a device that does not
        reach the host's memory.
    """
    if policy not in REMAT_POLICIES:
        raise ValueError(
            f"remat policy {policy!r} is unknown; choose one of {sorted(REMAT_POLICIES)}"
        )
    if policy == "none":
        return target
    device = jax.local_devices()[0]
    kinds = sorted(memory.kind for memory in device.addressable_memories())
    if policy == "offload" and HOST_MEMORY not in kinds:
        raise ValueError(
            f"remat policy 'offload' needs memory of kind {HOST_MEMORY!r}; {device.device_kind} "
            f"devices have {', '.join(kinds)}"
        )
    return nn.remat(target, prevent_cse=False, policy=REMAT_POLICIES[policy])


def stack(target: Any, length: int, in_axes: Any, *, out_axes: Any = 0) -> Any:
    """`nn.scan` of a layer class, parameters stacked on a leading `layers` axis."""
    return nn.scan(
        target,
        variable_axes=dict.fromkeys((*COLLECTIONS, TAPE), 0),
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        out_axes=out_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
