"""A recipe as shapes alone: its networks, state and batches, for counting, planning and compiling.

Needs no data, and no tokenizer: without one the vocabulary has its published size. Frames have the
size that the recipe brings them to.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from lara_jax import assemble
from lara_jax.batch import Batch
from lara_jax.config import Recipe
from lara_jax.curriculum import Stage
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.optimizer import make_optimizer
from lara_jax.tokenizers.qwen import (
    ACTION_TOKENS,
    QWEN_EMBEDDING_ROWS,
    THOUGHT_TOKENS,
    load_tokenizer,
)
from lara_jax.train_step import TrainState, init_state

# Rows of Qwen3-VL's embedding, the action tokens and those of the thoughts.
PUBLISHED_VOCABULARY = QWEN_EMBEDDING_ROWS + ACTION_TOKENS + len(THOUGHT_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A stage of a recipe.

    Attributes:
      stage: losses and prompt.
      model: with the stage's slots.
      batch: its shapes, a `Batch` of `jax.ShapeDtypeStruct`.
    """

    stage: Stage
    model: LaraVLA
    batch: Batch

    def rows(self, count: int) -> Batch:
        """The shapes of a batch of so many rows."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), self.batch
        )


def outlines(recipe: Recipe) -> tuple[Outline, ...]:
    """Each stage of a recipe, in order.

    Raises:
      ValueError: neither `data.frame_px` nor `data.resize_px` says how large a frame is.
    """
    frame = recipe.data.image_px
    if not frame:
        raise ValueError(
            "config.data.frame_px and config.data.resize_px are empty, so it is up to the data how "
            "large a frame is; give --config.data.frame_px=HEIGHT,WIDTH"
        )
    frames: dict[str, Any] = {"views": len(recipe.data.views), "image_size": (frame[0], frame[1])}
    tokenizer = load_tokenizer(recipe.tokenizer.path or None)
    found = []
    for stage in recipe.stages:
        prompt = assemble.prompt_builder(recipe, tokenizer, stage, **frames)
        config = assemble.model_config(recipe, tokenizer, latent_slots=prompt.latent_slots)
        if not recipe.tokenizer.path and recipe.model.backbone != "debug":
            text = dataclasses.replace(config.text, vocab_size=PUBLISHED_VOCABULARY)
            config = dataclasses.replace(config, text=text)
        batch = assemble.batch_spec(recipe, stage, **frames)
        found.append(Outline(stage=stage, model=LaraVLA(config), batch=batch))
    return tuple(found)


def state_outline(recipe: Recipe, outline: Outline) -> TrainState:
    """The shapes of the state that trains; alike for all stages of a recipe."""
    init = partial(init_state, outline.model, make_optimizer(recipe), recipe)
    return jax.eval_shape(init, jax.random.key(recipe.seed))
