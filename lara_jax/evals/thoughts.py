"""What a policy thought in an episode, put into pictures and words.

    slot k            hidden state --language head--> its likeliest tokens
    <img_next> * Q    hidden states, compared with what the teacher sees in each frame of the
                      episode--> the frame that the imagined next one is nearest to

The teacher is the one that the training compared with, a slow average of the vision tower; where a
checkpoint has none, the policy's own tower stands in. Nothing here changes what the policy does:
its thoughts are computed anew from the observations at which it was asked.

Letters: E rows, K slots, Q <img_next> tokens, D width, N frames.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from lara_jax.augment import evaluation_crop
from lara_jax.batch import Batch
from lara_jax.config import Recipe
from lara_jax.evals.latents import nearest_of
from lara_jax.evals.rollout import Episode
from lara_jax.evals.rollout_report import Thought
from lara_jax.image_processing import ImageConfig
from lara_jax.inference.policy import Policy
from lara_jax.models.lara_vla import LaraVLA
from lara_jax.models.visual_latent import gather_block
from lara_jax.train_step import model_inputs, teacher_target

WORDS = 3  # likeliest tokens of a slot


class ThoughtReader:
    """Reads a policy's thoughts.

    Args:
      policy: whose.
      teacher: parameters of the teacher's vision tower, or None.
      rows: observations at a time, always as many, so that it compiles once.
    """

    def __init__(self, policy: Policy, teacher: Any | None, *, rows: int) -> None:
        self._policy, self._rows = policy, rows
        own = policy.params["vision"]
        self._teacher = jax.device_put(own if teacher is None else teacher)

    def __call__(self, episode: Episode) -> tuple[Thought, ...]:
        """The thoughts at each of the observations that an episode has kept (`asked`, `seen`)."""
        policy, model = self._policy, self._policy.model
        ids, imagined = [], []
        for batch, count in self._batches([observation for _, observation in episode.asked]):
            words, frames = think(model, policy.images, policy.recipe, policy.params, batch)
            ids.append(np.asarray(words)[:count])
            imagined.append(np.asarray(frames, np.float32)[:count])
        words = [
            tuple(" / ".join(self._word(i) for i in slot) for slot in row)
            for row in np.concatenate(ids).tolist()
        ]
        if not model.config.img_next_tokens:
            return tuple(Thought(words=of) for of in words)
        return tuple(
            Thought(words=of, imagined=int(frame))
            for of, frame in zip(
                words, nearest_of(np.concatenate(imagined), self._features(episode)), strict=True
            )
        )

    def _features(self, episode: Episode) -> np.ndarray:
        """float32[N, Q, D] of the frames of the episode."""
        primary, found = self._policy.views[0], []
        _, observation = episode.asked[0]
        views = [{**observation, primary: frame} for frame in episode.seen]
        for batch, count in self._batches(views):
            features = see(self._policy.model, self._policy.recipe, self._teacher, batch)
            found.append(np.asarray(features, np.float32)[:count])
        return np.concatenate(found)

    def _batches(self, observations: Sequence[Any]) -> Iterator[tuple[Batch, int]]:
        """Batches of constant size, and how many rows of each count."""
        for start in range(0, len(observations), self._rows):
            some = list(observations[start : start + self._rows])
            filled = some + some[:1] * (self._rows - len(some))
            yield self._policy.batch(filled), len(some)

    def _word(self, token: int) -> str:
        return self._policy.tokenizer.decode([token]).strip() or repr(
            self._policy.tokenizer.decode([token])
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def think(
    model: LaraVLA, images: ImageConfig, recipe: Recipe, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """int32[E, K, WORDS] likeliest tokens of the slots; float[E, Q, D] imagined next frames."""
    batch = dataclasses.replace(batch, images=evaluation_crop(batch.images, recipe.augment))
    thoughts = model.apply({"params": params}, *model_inputs(batch, images))
    start = batch.prefix_ids.shape[1]
    slots = thoughts.hidden[:, start : start + model.config.latent_slots]
    _, ids = jax.lax.top_k(slot_logits(model, params, slots), WORDS)
    imagined = gather_block(thoughts.hidden, thoughts.img_next, model.config.img_next_tokens)
    return ids, imagined


def slot_logits(model: LaraVLA, params: Any, slots: jax.Array) -> jax.Array:
    """The language head on hidden states as the model returns them, float[E, K, D].

    Returns:
      float32[E, K, vocabulary].
    """
    if model.config.latent_source == "post_norm":
        # The head norms what it is given: without its scale, a normed state is normed to itself.
        slots = slots / params["text"]["norm"]["scale"]
    return model.apply({"params": params}, slots, method="logits")


@partial(jax.jit, static_argnums=(0, 1))
def see(model: LaraVLA, recipe: Recipe, teacher: Any, batch: Batch) -> jax.Array:
    """float[E, Q, D], what the teacher sees in the frame of the first view."""
    batch = dataclasses.replace(
        batch, next_images=evaluation_crop(batch.next_images, recipe.augment)
    )
    return teacher_target(teacher, batch, model, recipe)
