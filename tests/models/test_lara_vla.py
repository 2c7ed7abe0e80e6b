"""The assembled model and its latent loop. Numbers: the golden files."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models import masks
from lara_jax.models.lara_vla import Inputs, LaraVLA
from tests.models import tiny

P, S = tiny.PREFIX, tiny.SUFFIX


@cache
def params():
    return tiny.params(LaraVLA(tiny.config()))


@cache
def compiled(**changes):
    """The model as a compiled function of its inputs; tests with the same shapes share it."""
    model = LaraVLA(tiny.config(**changes))
    return jax.jit(lambda p, inputs: model.apply({"params": p}, inputs, tiny.GRID))


def think(inputs: Inputs, **changes):
    return compiled(**changes)(params(), inputs)


def naive(inputs: Inputs, slots: int, source: str):
    """The whole sequence recomputed from scratch for every slot, no cache: K + 1 full passes."""
    model = LaraVLA(tiny.config(latent_slots=slots, latent_source=source))

    def run(model: LaraVLA):
        layout = model._layout(inputs, tiny.GRID)
        prefix, deepstack = model._embed_prefix(inputs, layout.is_image[:, :P], tiny.GRID)
        x = jnp.concatenate(
            [
                prefix,
                jnp.zeros((len(prefix), slots, prefix.shape[-1])),
                model.text.embed(inputs.suffix_ids),
            ],
            axis=1,
        )
        deepstack = jnp.pad(deepstack, ((0, 0), (0, 0), (0, slots + S), (0, 0)))
        everything = slice(0, P + slots + S)
        mask = layout.mask(everything, everything)
        for k in range(slots + 1):
            hidden, _ = model.text(x, layout.positions, mask, deepstack=deepstack)
            hidden = model._source(hidden)
            if k < slots:
                x = x.at[:, P + k].set(hidden[:, P + k - 1])
        return hidden

    return jax.jit(lambda p: model.apply({"params": p}, method=run))(params())


@pytest.mark.parametrize("source", ["pre_norm", "post_norm"])
@pytest.mark.parametrize("slots", [0, 1, 4])
def test_scan_equals_recomputation(slots, source):
    inputs = tiny.inputs()
    got = think(inputs, latent_slots=slots, latent_source=source)
    want = naive(inputs, slots, source)
    np.testing.assert_allclose(got.hidden[got.valid], want[got.valid], atol=2e-5)


def test_gradient_flows_through_all_steps():
    """A slot's only input is the state fed back: the image reaches slot k through k steps."""
    model = LaraVLA(tiny.config(latent_slots=3))
    inputs = tiny.inputs()

    @jax.jit
    @jax.grad
    def gradient(patches, k):
        thoughts = model.apply(
            {"params": params()}, dataclasses.replace(inputs, patches=patches), tiny.GRID
        )
        return thoughts.hidden[0, P + k].var()

    for k in range(3):
        assert jnp.abs(gradient(inputs.patches, k)).max() > 1e-6


def test_scans_gradient_equals_that_of_recomputation():
    inputs = tiny.inputs()
    scanned = LaraVLA(tiny.config(latent_slots=3, remat="full"))

    def loss(p, run):
        return run(p)[:, P - 1 :].var()

    def loop(p):
        return scanned.apply({"params": p}, inputs, tiny.GRID).hidden[:1]

    plain = LaraVLA(tiny.config(latent_slots=3))

    def unrolled(model: LaraVLA):
        layout = model._layout(inputs, tiny.GRID)
        x, deepstack = model._embed_prefix(inputs, layout.is_image[:, :P], tiny.GRID)
        prefix, suffix = slice(0, P), slice(P + 3, P + 3 + S)
        hidden, kv = model.text(
            x, layout.positions[:, :, prefix], layout.mask(prefix, prefix), deepstack=deepstack
        )
        parts, past = [hidden], (kv,)
        for k in range(3):
            at = slice(P + k, P + k + 1)
            mask = layout.mask(at, slice(0, P + k + 1))
            hidden, kv = model.text(parts[-1][:, -1:], layout.positions[:, :, at], mask, past=past)
            parts.append(hidden)
            past = (*past, kv)
        hidden, _ = model.text(
            model.text.embed(inputs.suffix_ids),
            layout.positions[:, :, suffix],
            layout.mask(suffix, slice(0, P + 3 + S)),
            past=past,
        )
        return jnp.concatenate([*parts, hidden], axis=1)[:1]

    def unroll(p):
        return plain.apply({"params": p}, method=unrolled)

    ours, theirs = (jax.jit(jax.grad(lambda p, r=r: loss(p, r)))(params()) for r in (loop, unroll))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_gradients_reach_every_parameter():
    model = LaraVLA(tiny.config())
    inputs = tiny.inputs()

    def loss(p):
        thoughts = model.apply({"params": p}, inputs, tiny.GRID)
        noise = jax.random.normal(jax.random.key(0), (2, 4, 3))
        given = jnp.ones((2, 5)), noise[:, None], jnp.array([[3], [700]])
        flow = model.apply({"params": p}, thoughts, *given, method="act_velocity")
        return thoughts.logits.var() + flow.var()

    gradients = jax.jit(jax.grad(loss))(params())
    zero = {
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_flatten_with_path(gradients)[0]
        if not jnp.abs(g).max() > 0
    }
    assert not zero


@pytest.mark.parametrize("slots", [0, 1, 7, 32])
def test_any_number_of_slots(slots):
    model = LaraVLA(tiny.config(latent_slots=slots))
    inputs = tiny.inputs()
    out = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), inputs, tiny.GRID)[0])
    assert out.hidden.shape == (2, P + slots + S, 32)
    assert out.logits.shape == (2, S, tiny.VOCAB)


@pytest.mark.parametrize("mode", ["mrope", "sequential"])
@pytest.mark.parametrize("slots", [0, 2])
def test_padding_changes_nothing(mode, slots):
    """More pads on either side move no hidden state of a real token."""
    inputs = tiny.inputs()
    more = dataclasses.replace(
        inputs,
        prefix_ids=jnp.pad(inputs.prefix_ids, ((0, 0), (3, 0))),
        prefix_mask=jnp.pad(inputs.prefix_mask, ((0, 0), (3, 0))),
        suffix_ids=jnp.pad(inputs.suffix_ids, ((0, 0), (0, 2))),
        suffix_mask=jnp.pad(inputs.suffix_mask, ((0, 0), (0, 2))),
    )
    few = think(inputs, position_mode=mode, latent_slots=slots)
    many = think(more, position_mode=mode, latent_slots=slots)
    np.testing.assert_allclose(many.hidden[many.valid], few.hidden[few.valid], atol=1e-5)


def test_position_modes_differ():
    inputs = tiny.inputs()
    a, b = (think(inputs, position_mode=m).hidden[0, -1] for m in ("mrope", "sequential"))
    assert jnp.abs(a - b).max() > 1e-4


def test_latent_sources_differ_and_the_head_always_norms():
    inputs = tiny.inputs()
    pre, post = (think(inputs, latent_source=s, latent_slots=0) for s in ("pre_norm", "post_norm"))
    assert jnp.abs(pre.hidden - post.hidden).max() > 1e-3
    np.testing.assert_allclose(pre.logits, post.logits, atol=1e-5)


def test_missing_view_is_not_seen():
    inputs = tiny.inputs()
    masked = dataclasses.replace(inputs, view_mask=inputs.view_mask.at[:, 1].set(False))
    other = dataclasses.replace(masked, patches=masked.patches.at[:, 1].add(1.0))
    a, b = think(masked), think(other)
    np.testing.assert_array_equal(a.hidden[a.valid], b.hidden[b.valid])
    assert int(think(inputs).valid.sum() - a.valid.sum()) == 2 * tiny.TOKENS_PER_VIEW


@pytest.mark.parametrize("views", [1, 2, 3])
def test_any_number_of_views(views):
    """Each view's patches reach the thoughts."""
    inputs = tiny.inputs(views=views)
    before = think(inputs)
    for view in range(views):
        other = dataclasses.replace(inputs, patches=inputs.patches.at[:, view].add(1.0))
        assert jnp.abs(think(other).hidden - before.hidden)[before.valid].max() > 1e-4


def test_img_next_tokens_see_each_other_but_text_stays_causal():
    inputs = tiny.inputs()
    first, last = 3, 3 + tiny.IMG_NEXT_TOKENS - 1
    other = inputs.suffix_ids.at[:, last + 1].set(11)
    a, b = think(inputs), think(dataclasses.replace(inputs, suffix_ids=other))
    moved = jnp.abs(a.hidden - b.hidden).max(axis=(0, 2))
    start = P + 2
    assert (moved[: start + last + 1] == 0).all() and moved[start + last + 1] > 1e-4
    # The first of the block changes with the last: cut the last one's keys out and compare.
    layout_mask = masks.attention_mask
    index = jnp.arange(S)
    valid, block = inputs.suffix_mask, inputs.suffix_ids == tiny.IMG_NEXT
    mask = layout_mask(index, index, valid, valid, block, block)
    assert mask[0, first, last] and not mask[0, first - 1, last]


def test_the_answer_cannot_reach_the_action_expert():
    """Discrete action tokens, and what comes after them, are not in its context."""
    inputs = tiny.inputs()
    answers = [inputs.suffix_ids.at[:, 7].set(token) for token in (38, 39)]
    one, other = (dataclasses.replace(inputs, suffix_ids=ids) for ids in answers)
    state, noise = jnp.zeros((2, 5)), jnp.ones((2, 4, 3))

    def acted(inputs: Inputs, **changes):
        model = LaraVLA(tiny.config(**changes))
        thoughts = think(inputs, **changes)
        return model.apply({"params": params()}, thoughts, state, noise, method="act")

    for attend_padding in (False, True):
        hidden = {"action_ids": (38, 40), "attend_padding": attend_padding}
        np.testing.assert_array_equal(acted(one, **hidden), acted(other, **hidden))
    assert jnp.abs(acted(one) - acted(other)).max() > 1e-6  # where nothing hides it, it shows
    context = think(one, action_ids=(38, 40)).context
    np.testing.assert_array_equal(context[:, -2:], jnp.zeros((2, 2), bool))
    np.testing.assert_array_equal(context[:, :-2], think(one).valid[:, :-2])


def test_compute_dtype():
    thoughts = jax.eval_shape(
        lambda: LaraVLA(tiny.config(dtype="bfloat16")).init_with_output(
            jax.random.key(0), tiny.inputs(), tiny.GRID
        )
    )
    out, variables = thoughts
    assert out.hidden.dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_slots": 33}, "latent_slots is 33; allowed are 0 to 32"),
        ({"latent_mode": "refine"}, "latent_mode is 'refine'"),
        ({"position_mode": "rope"}, "position_mode is 'rope'.*sequential"),
        ({"attention": "flash"}, "attention is 'flash'.*cudnn"),
        ({"remat": "some"}, "remat is 'some'"),
    ],
)
def test_refuses_unknown_choices(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**change)
