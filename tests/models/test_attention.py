"""The attention function against a plain computation, and what it promises at pads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models.attention import attention


def draw(b: int, t: int, s: int, n: int, k: int, h: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (b, t, n, h))
    key = jax.random.normal(keys[1], (b, s, k, h))
    value = jax.random.normal(keys[2], (b, s, k, h))
    mask = jax.random.bernoulli(keys[3], 0.6, (b, t, s)).at[:, :, 0].set(True)
    return q, key, value, mask


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> np.ndarray:
    """One head, one query at a time."""
    q, k, v, mask = (np.asarray(x, np.float64) for x in (q, k, v, mask))
    out = np.zeros_like(q)
    groups = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        allowed = mask[b, t] > 0
        scores = k[b, allowed, n // groups] @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, allowed, n // groups]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_plain_attention(kv_heads):
    q, k, v, mask = draw(2, 5, 7, 4, kv_heads, 8)
    np.testing.assert_allclose(attention(q, k, v, mask), plain(q, k, v, mask), atol=1e-5)


def test_no_mask_attends_to_everything():
    q, k, v, mask = draw(1, 3, 4, 2, 2, 8)
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, jnp.ones_like(mask)))


def test_query_that_sees_nothing_averages_all_keys():
    q, k, v, mask = draw(2, 5, 7, 4, 2, 8)
    out = attention(q, k, v, mask.at[:, 2].set(False))
    average = jnp.repeat(v.mean(axis=1), 2, axis=1)
    np.testing.assert_allclose(out[:, 2], average, atol=1e-6)


def test_bfloat16_keeps_its_dtype_and_softmax_is_float32():
    q, k, v, mask = draw(2, 5, 7, 4, 2, 8)
    low = attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), mask)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), attention(q, k, v, mask), atol=0.05)


def test_refuses_what_it_cannot_do():
    q, k, v, mask = draw(1, 2, 2, 4, 2, 8)
    with pytest.raises(ValueError, match=r"'flash'.*xla"):
        attention(q, k, v, mask, implementation="flash")
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention(q, jnp.ones((1, 2, 3, 8)), jnp.ones((1, 2, 3, 8)), mask)
