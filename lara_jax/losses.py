"""The three losses, each a sum and its divisor, so that micro-batches add up exactly.

    token   cross-entropy of what stands after the slots            -log p(suffix_i | before)
    visual  mean |imagined - teacher| over rows with a next frame   L1 in feature space
    action  mean (v_hat - v)^2 over valid numbers of the chunk      flow matching, v = a - e

All in float32. Letters: B batch, S suffix, V vocabulary, Q <img_next> tokens, D width, R noise
draws, C chunk, A action.

Source: arXiv 2602.01166, training objectives.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lara_jax.batch import Batch


@flax.struct.dataclass
class Sum:
    """A loss of every row, [B] each: its sum, and the number of what was summed."""

    totals: jax.Array
    counts: jax.Array

    @property
    def total(self) -> jax.Array:
        """The sum over all rows."""
        return self.totals.sum()

    @property
    def count(self) -> jax.Array:
        """What to divide it by."""
        return self.counts.sum()

    def mean(self) -> jax.Array:
        """total / count, and 0 where nothing was counted."""
        return self.total / jnp.maximum(self.count, 1)


def token_loss(logits: jax.Array, ids: jax.Array, mask: jax.Array) -> Sum:
    """Cross-entropy summed over marked tokens.

    Args:
      logits: float32[B, S, V]; logits[:, i] predicts ids[:, i].
      ids: int32[B, S].
      mask: bool[B, S], True where a token counts.
    """
    each = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
    return Sum(jnp.where(mask, each, 0).sum(axis=1), mask.sum(axis=1))


def visual_loss(imagined: jax.Array, target: jax.Array, mask: jax.Array) -> Sum:
    """Absolute error summed over rows that have a next frame; counts numbers, not rows.

    Args:
      imagined: float[B, Q, D], hidden states at <img_next>.
      target: float[B, Q, D], the teacher's pooled features of the next frame.
      mask: bool[B].
    """
    error = jnp.abs(imagined.astype(jnp.float32) - target.astype(jnp.float32))
    numbers = imagined.shape[1] * imagined.shape[2]
    return Sum(jnp.where(mask[:, None, None], error, 0).sum(axis=(1, 2)), mask * numbers)


def action_loss(velocity: jax.Array, target: jax.Array, mask: jax.Array) -> Sum:
    """Squared error summed over valid numbers of the chunk and all noise draws.

    Args:
      velocity: float32[B, R, C, A].
      target: float32[B, R, C, A].
      mask: bool[B, C, A].
    """
    error = jnp.square(velocity - target)
    counts = mask.sum(axis=(1, 2)) * velocity.shape[1]
    return Sum(jnp.where(mask[:, None], error, 0).sum(axis=(1, 2, 3)), counts)


def by_dataset(sums: Sum, batch: Batch, datasets: int) -> jax.Array:
    """A loss of each dataset's rows apart, and of those with and without annotated reasoning.

    Args:
      sums: of a batch's rows.
      batch: the batch.
      datasets: of the mixture.

    Returns:
      float32[datasets, 2, 2]: of rows that are not annotated and that are, sum and count.
    """
    rows = jnp.stack([sums.totals, sums.counts.astype(jnp.float32)], axis=1)
    own = 2 * batch.dataset + batch.annotated
    own = own[:, None] == jnp.arange(2 * datasets)
    parts = jnp.where(own[:, :, None], rows[:, None], 0).sum(axis=0)
    return parts.reshape(datasets, 2, 2)


def counts(batch: Batch, *, visual_numbers: int, noise_draws: int) -> dict[str, jax.Array]:
    """What the three losses of a whole batch are divided by, known before any forward pass.

    Args:
      batch: the batch, of any number of rows.
      visual_numbers: Q * D, numbers in one imagined frame.
      noise_draws: R, of each sample.
    """
    return {
        "token": batch.loss_mask.sum(),
        "visual": batch.next_mask[:, 0].sum() * visual_numbers,
        "action": batch.action_mask.sum() * noise_draws,
    }
