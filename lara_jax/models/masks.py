"""Who may attend to whom. Boolean masks, True = may attend; nothing else in the project builds one.

One row of the sequence with two pads, a prefix, one slot, two <img_next> tokens and the end
(queries down, keys across)::

              .  .  a  b  z  i  i  e
    pad    .  -  -  -  -  -  -  -  -      a pad neither attends nor is attended
    pad    .  -  -  -  -  -  -  -  -
    text   a  -  -  x  -  -  -  -  -      text is causal
    text   b  -  -  x  x  -  -  -  -
    slot   z  -  -  x  x  x  -  -  -      so are the latent slots
    next   i  -  -  x  x  x  x  x  -      the <img_next> tokens see each other in both directions
    next   i  -  -  x  x  x  x  x  -
    end    e  -  -  x  x  x  x  x  x
"""

import jax
import jax.numpy as jnp


def attention_mask(
    query_index: jax.Array,
    key_index: jax.Array,
    query_valid: jax.Array,
    key_valid: jax.Array,
    query_block: jax.Array | None = None,
    key_block: jax.Array | None = None,
) -> jax.Array:
    """Causal over valid tokens, with one block whose members also see forwards.

    Args:
      query_index: int32[T], place of each query in the whole sequence.
      key_index: int32[S], place of each key in the whole sequence.
      query_valid: bool[B, T], False at pads.
      key_valid: bool[B, S], False at pads.
      query_block: bool[B, T], True at the members of the bidirectional block; None = no block.
      key_block: bool[B, S], likewise for keys.

    Returns:
      bool[B, T, S].
    """
    allowed = (key_index[None, None, :] <= query_index[None, :, None]) | jnp.zeros(
        (query_valid.shape[0], 1, 1), bool
    )
    if query_block is not None and key_block is not None:
        allowed = allowed | (query_block[:, :, None] & key_block[:, None, :])
    return allowed & query_valid[:, :, None] & key_valid[:, None, :]


def slot_mask(prefix_valid: jax.Array, slots: int, step: jax.Array) -> jax.Array:
    """What slot `step` sees: the valid prefix, the slots before it, itself.

    The keys are ordered as the latent loop holds them: prefix [P], all K slots (those from `step`
      on not yet
    written), then the slot itself.

    Args:
      prefix_valid: bool[B, P].
      slots: K, the number of slots.
      step: int32[], which slot is being computed, 0..K-1.

    Returns:
      bool[B, 1, P + K + 1].
    """
    batch = prefix_valid.shape[0]
    earlier = jnp.broadcast_to(jnp.arange(slots) < step, (batch, slots))
    itself = jnp.ones((batch, 1), bool)
    return jnp.concatenate([prefix_valid, earlier, itself], axis=1)[:, None]
