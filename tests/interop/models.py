"""Models and parameters that the tests of this folder share. Nothing of full size is allocated."""

import dataclasses
from functools import cache
from typing import Any

import jax
import numpy as np

from lara_jax.interop import convert
from lara_jax.interop.hf_keys import flatten
from lara_jax.models import action_expert, text_decoder, vision_tower
from lara_jax.models.action_expert import ActionExpertConfig
from lara_jax.models.lara_vla import LaraVLAConfig
from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig


def published(backbone: str, expert: str, *, vocab_size: int, **changes: Any) -> LaraVLAConfig:
    """A model of published sizes; `changes` go to the action expert."""
    text = TextConfig(vocab_size=vocab_size, **text_decoder.VARIANTS[backbone])
    sizes = action_expert.VARIANTS[expert] | changes
    return LaraVLAConfig(
        vision=VisionConfig(out_width=text.width, **vision_tower.VARIANTS[backbone]),
        text=text,
        expert=ActionExpertConfig(context_width=text.width, **sizes),
        image_id=5,
        img_next_id=6,
        latent_slots=0,
        dtype="float32",
        remat="none",
    )


def debug_model(*, tied: bool = True, vocab_size: int = 64, **changes: Any) -> LaraVLAConfig:
    """The debug size with a small vocabulary."""
    config = published("debug", "debug", vocab_size=vocab_size, **changes)
    text = dataclasses.replace(config.text, tied_embeddings=tied)
    return dataclasses.replace(config, text=text)


abstract_params = cache(convert.abstract_params)


def random_params(abstract: Any, seed: int = 0) -> Any:
    """Standard-normal parameters of these shapes, scaled down to the inverse root of their rows."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        scale = 1 / np.sqrt(leaf.shape[-2] if len(leaf.shape) > 1 else 4)
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, abstract)


def assert_same(a: Any, b: Any) -> None:
    """Two trees have the same leaves, bit for bit."""
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)
