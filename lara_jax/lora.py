"""Low-rank adaptation: a kernel W learns as W + (alpha / rank) A B, and only A and B train.

    kernel  [L, D, N, H]    q_proj of the scanned text decoder
    a       [L, D, r]       random, variance 1 / D
    b       [L, r, N, H]    zero: the adapted model starts as the model itself

The factors lie beside the networks, `params["lora"]["text"]...["kernel"]["a"]`, and are merged into
the kernels before the model runs: the networks know nothing of them, and merging for good is the
same function. What this saves is the moments, the master copy's motion and the checkpoints of a
full fine-tune; the backward pass still forms the gradient of each adapted kernel.

Letters: L layers, r rank; of a kernel, I its input axes and O its output axes.

Source: arXiv 2106.09685.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lara_jax.optimizer_config import LoraConfig
from lara_jax.param_tree import check_patterns, flat, matches, nested, overlay

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
    product = partial(jnp.tensordot, axes=1)
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
