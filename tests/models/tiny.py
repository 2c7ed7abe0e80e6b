"""A model small enough to compile in seconds, and inputs that use every kind of token."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax.models.action_expert import ActionExpertConfig
from lara_jax.models.lara_vla import Inputs, LaraVLA, LaraVLAConfig
from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig

IMAGE, IMG_NEXT, VOCAB = 5, 6, 40
GRID = (4, 2)
TOKENS_PER_VIEW = 2
PREFIX, SUFFIX, IMG_NEXT_TOKENS = 12, 9, 4


def config(**changes: Any) -> LaraVLAConfig:
    """K = 2, two layers everywhere, float32; `changes` replace fields of the whole config."""
    text = TextConfig(
        vocab_size=VOCAB,
        width=32,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        mlp=48,
        mrope_section=(2, 1, 1),
    )
    vision = VisionConfig(
        depth=2, width=16, heads=2, mlp=24, out_width=32, patch_size=4, position_table=4,
        deepstack_layers=(0,),
    )  # fmt: skip
    expert = ActionExpertConfig(
        width=16, heads=2, head_dim=8, layers=2, hidden=16, context_width=32, action_dim=3,
        action_horizon=4, state_dim=5, future_tokens=2, max_positions=8, dropout=0.0, noise_draws=2,
    )  # fmt: skip
    whole = LaraVLAConfig(
        vision=vision,
        text=text,
        expert=expert,
        image_id=IMAGE,
        img_next_id=IMG_NEXT,
        latent_slots=2,
        img_next_tokens=IMG_NEXT_TOKENS,
        dtype="float32",
        remat="none",
    )
    return dataclasses.replace(whole, **changes)


def inputs(rows: int = 2, views: int = 2, left_pads: tuple[int, ...] = (0, 2)) -> Inputs:
    """Rows with `left_pads` pads before the prefix and one pad after the suffix of the last row."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(10, VOCAB, (rows, PREFIX))
    mask = np.ones((rows, PREFIX), bool)
    for row, pads in zip(range(rows), left_pads, strict=True):
        mask[row, :pads] = False
        for view in range(views):
            start = pads + 1 + view * (TOKENS_PER_VIEW + 1)
            prefix[row, start : start + TOKENS_PER_VIEW] = IMAGE
    suffix = rng.integers(10, VOCAB, (rows, SUFFIX))
    suffix[:, 3 : 3 + IMG_NEXT_TOKENS] = IMG_NEXT
    suffix_mask = np.ones((rows, SUFFIX), bool)
    suffix_mask[-1, -1] = False
    patches = rng.normal(size=(rows, views, GRID[0] * GRID[1], 3 * 2 * 4 * 4))
    return Inputs(
        patches=jnp.asarray(patches, jnp.float32),
        view_mask=jnp.ones((rows, views), bool),
        prefix_ids=jnp.asarray(prefix, jnp.int32),
        prefix_mask=jnp.asarray(mask),
        suffix_ids=jnp.asarray(suffix, jnp.int32),
        suffix_mask=jnp.asarray(suffix_mask),
    )


def params(model: LaraVLA, seed: int = 0) -> Any:
    """Random parameters, unboxed; biases, too, are not zero, so that none is without effect."""
    made = jax.jit(lambda key: model.init(key, inputs(), GRID, method="init_all"))
    tree = nn.unbox(made(jax.random.key(seed)))["params"]
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return structure.unflatten(noisy)
