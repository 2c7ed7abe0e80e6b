"""Low-rank adaptation: a kernel W learns as W + (alpha / rank) A B, and only A and B train.

    kernel  [L, D, N, H]    q_proj of the scanned text decoder
    a       [L, D, r]       random, variance 1 / D
    b       [L, r, N, H]    zero: the adapted model starts as the model itself

The factors lie beside the networks, `params["lora"]["text"]...["kernel"]["a"]`. A step adds their
path to that of the kernel, x W + (alpha / rank) (x A) B, so that an adapted kernel has neither
gradient nor moments. Policies, evaluation and export merge them into the kernels: the networks know
nothing of them.

Letters: L layers, r rank; of a kernel, I its input axes and O its output axes.

Source: arXiv 2106.09685.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lara_jax.models.layers import Dense
from lara_jax.optimizer_config import LoraConfig
from lara_jax.param_tree import check_patterns, flat, matches, nested, overlay
from lara_jax.sharding import gather

LORA = "lora"

Names = Sequence[str | None]


def init_factors(
    params: Mapping[str, Any], axes: Mapping[str, Any], config: LoraConfig, key: jax.Array
) -> dict[str, Any]:
    """The factors of every kernel that a pattern matches.

    Args:
      params: the networks' parameters.
      axes: the same tree of logical axis names.
      config: rank and patterns.
      key: of A's random numbers.

    Returns:
      float32 tree by network and path, `{"a": [L, I, r], "b": [L, r, O]}` for each kernel.

    Raises:
      ValueError: a pattern matches no kernel.
    """
    names = flat(axes)
    kernels = {path: x.shape for path, x in flat(params).items() if path.endswith("/kernel")}
    check_patterns("lora.patterns", config.patterns, kernels)
    chosen = {path: s for path, s in kernels.items() if matches(path, config.patterns)}
    factors: dict[str, jax.Array] = {}
    for path, one in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        layers, inputs, outputs = _split(names[path], chosen[path])
        a = jax.random.normal(one, (*layers, *inputs, config.rank)) / math.sqrt(math.prod(inputs))
        factors |= {f"{path}/a": a, f"{path}/b": jnp.zeros((*layers, config.rank, *outputs))}
    return nested(factors)


def factor_axes(axes: Mapping[str, Any], factors: Mapping[str, Any]) -> dict[str, Any]:
    """Logical axis names of the factors: those of their kernels, the rank's axis is whole."""
    names = flat(axes)
    found: dict[str, Names] = {}
    for path in flat(factors):
        kernel, _, which = path.rpartition("/")
        layers, inputs, outputs = _split(names[kernel], tuple(names[kernel]))
        found[path] = (*layers, *inputs, None) if which == "a" else (*layers, None, *outputs)
    return nested(found)


def adapted(params: Mapping[str, Any]) -> set[str]:
    """The networks that train by their factors alone."""
    return set(params.get(LORA, ()))


def apply(
    model: nn.Module, params: Mapping[str, Any], scale: float, *args: Any, **kwargs: Any
) -> Any:
    """`model.apply`, in which each adapted layer adds scale (x A) B to its output.

    Args:
      model: whose dense layers are `lara_jax.models.layers.dense`.
      params: with `lora` beside the networks, or without.
      scale: `LoraConfig.scale`.
      args, kwargs: as `model.apply` takes them.
    """
    networks = {name: tree for name, tree in params.items() if name != LORA}
    variables = {"params": networks, LORA: params.get(LORA, {})}
    with nn.intercept_methods(partial(_add_path, scale)):
        return model.apply(variables, *args, **kwargs)


def _add_path(
    scale: float, layer: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """The output of a module's method; of an adapted dense layer, with the factors' path."""
    out = layer(*args, **kwargs)
    module = context.module
    if not (isinstance(module, Dense) and module.has_variable(LORA, "kernel")):
        return out
    factors = module.get_variable(LORA, "kernel")
    a, b = (gather(factors[name], *[None] * factors[name].ndim) for name in "ab")
    low = jnp.tensordot(args[0].astype(out.dtype), a.astype(out.dtype), a.ndim - 1)
    return out + scale * jnp.tensordot(low, b.astype(out.dtype), 1)


def merged(params: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The networks' parameters with the factors in their kernels.

    Args:
      params: with `lora` beside the networks, or without (then nothing changes).
      scale: `LoraConfig.scale`.
    """
    networks = {name: tree for name, tree in params.items() if name != LORA}
    factors = flat(params.get(LORA, {}))
    kernels = flat(networks)
    changed = {
        path.removesuffix("/a"): _sum(
            kernels[path.removesuffix("/a")], a, factors[f"{path.removesuffix('a')}b"], scale
        )
        for path, a in factors.items()
        if path.endswith("/a")
    }
    return overlay(networks, nested(changed)) if changed else networks


def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel + scale * a b; every axis that is not of the product is a layer's."""
    product = partial(jnp.tensordot, axes=1, precision="highest")
    for _ in range(a.ndim + b.ndim - 2 - kernel.ndim):
        product = jax.vmap(product)
    return kernel + scale * product(a, b)


def _split(names: Names, kernel: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """A kernel's shape (or names) as those of its layers, inputs and outputs.

    Inputs are one axis where the outputs are heads, else all but the last: q_proj is (embed) x
    (heads, head_dim), o_proj (heads, head_dim) x (embed).
    """
    first = 1 if names[0] == "layers" else 0
    cut = first + 1 if names[-1] == "head_dim" else len(names) - 1
    return kernel[:first], kernel[first:cut], kernel[cut:]
