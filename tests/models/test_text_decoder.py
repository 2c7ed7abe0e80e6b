"""The decoder: scan equals loop, segments equal one pass, causality. Numbers: the golden files."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models import rope, text_decoder
from lara_jax.models.masks import attention_mask
from lara_jax.models.text_decoder import DecoderLayer, TextConfig, TextDecoder
from tests.models import tiny

CONFIG = tiny.config().text
B, T, D = 2, 7, CONFIG.width


class Everything(nn.Module):
    """Calls every method, so that `init` makes every parameter."""

    config: TextConfig = CONFIG

    @nn.compact
    def __call__(self, ids):
        decoder = TextDecoder(self.config, remat="none", name="text")
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), (3, *ids.shape))
        hidden, _ = decoder(decoder.embed(ids), positions, jnp.ones((1, *ids.shape[1:] * 2), bool))
        return decoder.logits(hidden)


@pytest.fixture(scope="module")
def variables():
    made = jax.jit(Everything().init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32))
    return {"params": nn.unbox(made)["params"]["text"]}


@pytest.fixture(scope="module")
def segment():
    """x, positions, mask and DeepStack features of one causal segment."""
    x = jax.random.normal(jax.random.key(1), (B, T, D))
    positions = jnp.broadcast_to(jnp.arange(T), (3, B, T))
    valid = jnp.ones((B, T), bool)
    mask = attention_mask(jnp.arange(T), jnp.arange(T), valid, valid)
    return x, positions, mask, jax.random.normal(jax.random.key(2), (1, B, T, D))


def run(variables, *args, remat="none", **kwargs):
    decoder = TextDecoder(CONFIG, remat=remat)
    return jax.jit(lambda v: decoder.apply(v, *args, **kwargs))(variables)


def test_scan_equals_a_python_loop(variables, segment):
    x, positions, mask, deepstack = segment
    scanned, _ = run(variables, x, positions, mask, deepstack=deepstack)
    angles = rope.text_rope(positions, CONFIG.head_dim, CONFIG.rope_theta, CONFIG.mrope_section)
    layer = DecoderLayer(CONFIG, jnp.float32, "xla")
    for i in range(CONFIG.layers):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layers"])
        x, _ = layer.apply({"params": one}, x, jnp.asarray(5), (), angles, mask, None)
        if i < len(deepstack):
            x = x + deepstack[i]
    np.testing.assert_allclose(scanned, x, atol=1e-5)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_nothing(variables, segment, remat):
    x, positions, mask, _ = segment

    def gradient(policy):
        decoder = TextDecoder(CONFIG, remat=policy)
        return jax.jit(jax.grad(lambda v: decoder.apply(v, x, positions, mask)[0].var()))(variables)

    for a, b in zip(
        jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_two_segments_equal_one_pass(variables, segment, cut):
    x, positions, mask, _ = segment
    whole, _ = run(variables, x, positions, mask)
    first, kv = run(variables, x[:, :cut], positions[:, :, :cut], mask[:, :cut, :cut])
    second, _ = run(variables, x[:, cut:], positions[:, :, cut:], mask[:, cut:], past=(kv,))
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_causal(variables, segment):
    x, positions, mask, _ = segment
    before, _ = run(variables, x, positions, mask)
    after, _ = run(variables, x.at[:, 4].add(1), positions, mask)
    moved = jnp.abs(before - after).max(axis=(0, 2))
    assert (moved[:4] == 0).all() and (moved[4:] > 1e-4).all()


@pytest.mark.parametrize("size", ["debug", "2b", "4b", "8b"])
def test_shapes_at_full_size(size):
    config = TextConfig(vocab_size=151_936, **text_decoder.VARIANTS[size])
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    logits, made = jax.eval_shape(Everything(config).init_with_output, jax.random.key(0), ids)
    assert logits.shape == (1, 4, 151_936) and logits.dtype == jnp.float32
    count = sum(x.size for x in jax.tree.leaves(nn.unbox(made)))
    published = {"2b": 1.72e9, "4b": 4.02e9, "8b": 8.19e9}
    if size in published:
        np.testing.assert_allclose(count, published[size], rtol=2e-3)
    assert ("lm_head" in made["params"]["text"]) == (size == "8b")


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mrope_section \(24, 20, 20\) must sum to .* 16"):
        TextConfig(vocab_size=8, width=8, layers=1, heads=2, kv_heads=1, head_dim=32, mlp=8)
    with pytest.raises(ValueError, match="3 heads are not a multiple of 2 kv heads"):
        TextConfig(vocab_size=8, width=8, layers=1, heads=3, kv_heads=2, head_dim=128, mlp=8)
