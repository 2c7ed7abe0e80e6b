"""The action expert: the flow's conventions and who sees what. Numbers: the golden files."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models import action_expert
from lara_jax.models.action_expert import ActionExpert, ActionExpertConfig, flow_time
from tests.models import tiny

CONFIG = tiny.config().expert
B, R, S = 2, 3, 6
C, A = CONFIG.action_horizon, CONFIG.action_dim


@pytest.fixture(scope="module")
def arguments():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "noisy": jax.random.normal(keys[0], (B, R, C, A)),
        "bucket": jnp.array([[0, 400, 900], [5, 50, 500]]),
        "state": jax.random.normal(keys[1], (B, CONFIG.state_dim)),
        "context": jax.random.normal(keys[2], (B, S, CONFIG.context_width)),
        "context_mask": jnp.ones((B, S), bool).at[0, :2].set(False),
    }


@pytest.fixture(scope="module")
def variables(arguments):
    made = nn.unbox(jax.jit(ActionExpert(CONFIG).init)(jax.random.key(1), **arguments))
    return jax.tree.map(lambda x: x + 0.05, made)


def velocity(variables, arguments, config=CONFIG, **changes):
    expert = ActionExpert(config)
    return jax.jit(lambda v, a: expert.apply(v, **a))(variables, arguments | changes)


@pytest.mark.parametrize(("size", "millions"), [("debug", None), ("B", 161), ("L", None)])
def test_shapes_at_full_size(size, millions):
    config = ActionExpertConfig(context_width=2560, **action_expert.VARIANTS[size])
    noisy = jnp.zeros((1, 2, 16, 7))
    args = (noisy, jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 8)))
    context = (jax.ShapeDtypeStruct((1, 9, 2560), jnp.bfloat16), jnp.ones((1, 9), bool))
    out, made = jax.eval_shape(
        ActionExpert(config, jnp.bfloat16).init_with_output, jax.random.key(0), *args, *context
    )
    assert out.shape == (1, 2, 16, 7) and out.dtype == jnp.float32
    if millions:
        assert sum(x.size for x in jax.tree.leaves(made)) // 1_000_000 == millions


def test_draws_do_not_see_each_other_and_share_their_context(variables, arguments):
    """R draws at once equal R calls of one draw each."""
    together = velocity(variables, arguments)
    for r in range(R):
        alone = velocity(
            variables,
            arguments,
            noisy=arguments["noisy"][:, r : r + 1],
            bucket=arguments["bucket"][:, r : r + 1],
        )
        np.testing.assert_allclose(together[:, r], alone[:, 0], rtol=1e-5)


def test_what_is_masked_does_not_matter(variables, arguments):
    other = arguments["context"].at[0, :2].add(1.0)
    np.testing.assert_array_equal(
        velocity(variables, arguments), velocity(variables, arguments, context=other)
    )
    everything = jnp.ones_like(arguments["context_mask"])
    before = velocity(variables, arguments, context_mask=everything)
    after = velocity(variables, arguments, context_mask=everything, context=other)
    assert jnp.abs(before - after)[0].max() > 1e-4 and jnp.abs(before - after)[1].max() == 0


@pytest.mark.parametrize("name", ["noisy", "bucket", "state", "context"])
def test_every_input_matters(variables, arguments, name):
    changed = velocity(variables, arguments, **{name: arguments[name] + 1})
    assert jnp.abs(changed - velocity(variables, arguments)).max() > 1e-5


def test_sampler_takes_euler_steps(variables, arguments):
    noise = arguments["noisy"][:, 0]
    x, rest = noise, {k: arguments[k] for k in ("state", "context", "context_mask")}
    for bucket in (0, 250, 500, 750):
        at = jnp.full((B, 1), bucket)
        x = x + velocity(variables, rest, noisy=x[:, None], bucket=at)[:, 0] / 4
    expert = ActionExpert(CONFIG)
    sampled = expert.apply(variables, noise, *rest.values(), method="sample")
    np.testing.assert_allclose(sampled, x, rtol=1e-5)


def test_dropout_is_on_in_training_only(variables, arguments):
    expert = ActionExpert(dataclasses.replace(CONFIG, dropout=0.5))
    still = expert.apply(variables, **arguments)
    np.testing.assert_allclose(still, velocity(variables, arguments), rtol=1e-5)
    rngs = {"dropout": jax.random.key(0)}
    assert jnp.abs(expert.apply(variables, **arguments, train=True, rngs=rngs) - still).max() > 1e-3


def test_odd_number_of_blocks_ends_with_cross_attention(arguments):
    expert = ActionExpert(dataclasses.replace(CONFIG, layers=3))
    made = jax.eval_shape(expert.init, jax.random.key(0), **arguments)["params"]
    kernel = nn.unbox(made)["last_cross"]["attn"]["to_k"]["kernel"]
    assert kernel.shape[0] == CONFIG.context_width


def test_flow_times_follow_the_beta_distribution():
    """t = (0.999 - s)/0.999 with s ~ Beta(1.5, 1): mean of s is 0.6, P(s < x) = x^1.5."""
    s = 0.999 * (1 - np.asarray(flow_time(jax.random.key(0), (50_000,))))
    assert s.min() > -1e-6 and s.max() < 1 + 1e-6
    np.testing.assert_allclose(s.mean(), 0.6, atol=0.005)
    for x in (0.25, 0.5, 0.75):
        np.testing.assert_allclose((s < x).mean(), x**1.5, atol=0.01)


def test_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="2 heads of 8 must make up the even width 20"):
        dataclasses.replace(CONFIG, width=20)
    with pytest.raises(ValueError, match="action_horizon 9 exceeds max_positions 8"):
        dataclasses.replace(CONFIG, action_horizon=9)
