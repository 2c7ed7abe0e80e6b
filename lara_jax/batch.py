"""The data contract: what a loader yields and the model reads, in training and in serving.

Axis letters: B batch, V views, H W image, P prefix, K slots, S suffix, C action chunk, A action,
J state.

The token sequence of a row is three static segments. The K slots have no ids: the latent loop fills
them::

    [ prefix: left-padded to P ...... ][ K slots ][ suffix: right-padded to S ............... ]
      pads chat views instruction start  z1 .. zK   end  explicit reasoning  <img_next>*16  end
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = Any  # np.ndarray on the host, jax.Array in a step


@flax.struct.dataclass
class Batch:
    """A batch of robot steps: NumPy arrays from a loader, JAX arrays in a step.

    Attributes:
      images: uint8[B, V, H, W, 3], the current frame of each view, RGB, as stored (resized on
        device).
      view_mask: bool[B, V], True where the view exists; tokens of a missing view are not attended.
      next_images: uint8[B, V, H, W, 3], the frame one step later (the same frame where there is
        none).
      next_mask: bool[B, V], True where a next frame exists and differs; else the visual loss skips
        it.
      state: float32[B, J], normalised proprioceptive state.
      actions: float32[B, C, A], normalised action chunk that starts at the current step.
      action_mask: bool[B, C, A], True where the number is the data's own: inside the episode, and a
        dimension that the dataset has.
      prefix_ids: int32[B, P] token ids, left-padded.   prefix_mask: bool[B, P], True at real
        tokens.
      suffix_ids: int32[B, S] token ids, right-padded.  suffix_mask: bool[B, S], True at real
        tokens.
      loss_mask: bool[B, S], True at suffix tokens that carry cross-entropy.
      annotated: bool[B], True where reasoning is annotated.
      dataset: int32[B], the number of the dataset in the mixture.
      sample_id: int32[B], the dataset's running index of the step, for reports of bad samples.
    """

    images: Array
    view_mask: Array
    next_images: Array
    next_mask: Array
    state: Array
    actions: Array
    action_mask: Array
    prefix_ids: Array
    prefix_mask: Array
    suffix_ids: Array
    suffix_mask: Array
    loss_mask: Array
    annotated: Array
    dataset: Array
    sample_id: Array

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.actions.shape[0]


def spec(
    *,
    batch_size: int,
    views: int,
    image_size: tuple[int, int],
    state_dim: int,
    action_horizon: int,
    action_dim: int,
    prefix_tokens: int,
    suffix_tokens: int,
) -> Batch:
    """Shapes and dtypes of a batch as `jax.ShapeDtypeStruct` leaves; needs no data."""

    def of(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype)

    frame = (views, *image_size, 3)
    return Batch(
        images=of(jnp.uint8, *frame),
        view_mask=of(jnp.bool_, views),
        next_images=of(jnp.uint8, *frame),
        next_mask=of(jnp.bool_, views),
        state=of(jnp.float32, state_dim),
        actions=of(jnp.float32, action_horizon, action_dim),
        action_mask=of(jnp.bool_, action_horizon, action_dim),
        prefix_ids=of(jnp.int32, prefix_tokens),
        prefix_mask=of(jnp.bool_, prefix_tokens),
        suffix_ids=of(jnp.int32, suffix_tokens),
        suffix_mask=of(jnp.bool_, suffix_tokens),
        loss_mask=of(jnp.bool_, suffix_tokens),
        annotated=of(jnp.bool_),
        dataset=of(jnp.int32),
        sample_id=of(jnp.int32),
    )
