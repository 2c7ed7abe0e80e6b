"""The one attention function: grouped queries, boolean masks, softmax in float32, several
implementations.

Axis letters: B batch, T query, S key, N heads, K kv heads, G = N/K, H head dim.

`xla` runs everywhere and is the reference. `cudnn` is the fused flash kernel on NVIDIA GPUs; what
it gives at a pad is undefined. JAX's flash kernel for TPUs is not among them: neither its causal
flag nor its segment ids can say what `<img_next>` tokens may see, and the bias that could is a
float32[B, N, T, S], with a gradient of that size.

With `xla` a query that may attend to nothing (a pad) averages uniformly over all keys: its scores
are all the same finite minimum. That is what the PyTorch reference computes at pads, and its action
expert reads those rows.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Parts = tuple[jax.Array, ...]
Implementation = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def attention(
    query: jax.Array,
    key: jax.Array | Parts,
    value: jax.Array | Parts,
    mask: jax.Array | None = None,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Scaled dot-product attention.

    Args:
      query: float[B, T, N, H].
      key: float[B, S, K, H]; N is a multiple of K, query head n reads kv head n // (N/K). Several
        stand for themselves, one after the other; `xla` leaves them where they lie if T is 1.
      value: float[B, S, K, H], likewise.
      mask: bool[B, T, S], True = may attend; None = attend to everything.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      float[B, T, N, H] in the query's dtype.

    Raises:
      ValueError: unknown implementation, or N is not a multiple of K.
    """
    keys, values = (x if isinstance(x, tuple) else (x,) for x in (key, value))
    heads, kv_heads = query.shape[-2], keys[0].shape[-2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} kv heads")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r}; choose one of {tuple(IMPLEMENTATIONS)}"
        )
    if query.shape[1] == 1 and implementation == "xla":
        return _in_parts(query, keys, values, mask)
    k, v = (jnp.concatenate(parts, axis=1) for parts in (keys, values))
    return IMPLEMENTATIONS[implementation](query, k, v, mask)


def additive(mask: jax.Array) -> jax.Array:
    """float32 0 where `mask` allows, the smallest finite float where not; same shape."""
    return jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    return _in_parts(q, (k,), (v,), mask)


def _in_parts(q: jax.Array, keys: Parts, values: Parts, mask: jax.Array | None) -> jax.Array:
    B, T, N, H = q.shape
    K = keys[0].shape[2]
    q = q.reshape(B, T, K, N // K, H)
    parts = [
        jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32) for k in keys
    ]
    scores = jnp.concatenate(parts, axis=-1) * (1.0 / math.sqrt(H))
    if mask is not None:
        scores = scores + additive(mask)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(values[0].dtype)
    ends = list(itertools.accumulate(k.shape[1] for k in keys))[:-1]
    split = jnp.split(weights, ends, axis=-1)
    seen = [jnp.einsum("BKGTS,BSKH->BTKGH", w, v) for w, v in zip(split, values, strict=True)]
    return functools.reduce(jnp.add, seen).reshape(B, T, N, H)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    mask = None if mask is None else mask[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


IMPLEMENTATIONS: dict[str, Implementation] = {"xla": _xla, "cudnn": _cudnn}
