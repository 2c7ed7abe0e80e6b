"""Rotary positions: interleaved M-RoPE for the decoder, 2-D rotary for the vision tower; float32.

M-RoPE gives a token three positions (time, height, width). Text tokens have all three equal. The
tokens of an image share the time of the image's start, and add their merged-grid row to the height
and their column to the width; after an image of h x w tokens the text goes on at
start + max(h, w)::

      text text  img(2x2)            text
    T 0    1     2   2   2   2       4
    H 0    1     2   2   3   3       4
    W 0    1     2   3   2   3       4

Interleaved: of the H/2 frequencies, number i reads the height if i % 3 == 1, the width if
i % 3 == 2 (each while i < 3 * section), else the time.

Source: Qwen3-VL; arXiv 2602.01166 uses it unchanged.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[jax.Array, jax.Array]


def sequential_positions(valid: jax.Array) -> jax.Array:
    """Running count of valid tokens on all three axes: what released LaRA-VLA checkpoints saw in
    their latent stages.

    Args:
      valid: bool[B, T].

    Returns:
      int32[3, B, T]. Pads before the text stand at 1, pads after it go on counting, as in the
      reference.
    """
    follows = jnp.cumsum(valid[:, ::-1], axis=1)[:, ::-1] > 0  # a valid token here or later
    counted = valid | ~follows
    count = jnp.cumsum(counted.astype(jnp.int32), axis=1) - 1
    return jnp.broadcast_to(jnp.where(counted, count, 1), (3, *valid.shape))


def mrope_positions(is_image: jax.Array, valid: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Three positions for every token of sequences whose images all have the same merged grid.

    Args:
      is_image: bool[B, T], True at image tokens; each image is a run of h*w of them.
      valid: bool[B, T], False at pads.
      grid: (h, w), the merged grid of one image.

    Returns:
      int32[3, B, T], axes (time, height, width); 1 at pads (never read).
    """
    h, w = grid
    is_image = is_image & valid
    ordinal = jnp.cumsum(is_image.astype(jnp.int32), axis=1) - 1
    inside = ordinal % (h * w)  # place within its image
    # A text token moves the position on by one, an image by max(h, w), counted at its last token.
    closes = is_image & (inside == h * w - 1)
    advance = jnp.where(is_image, jnp.where(closes, max(h, w), 0), valid.astype(jnp.int32))
    start = jnp.cumsum(advance, axis=1) - advance
    row = jnp.where(is_image, inside // w, 0)
    column = jnp.where(is_image, inside % w, 0)
    return jnp.where(valid, jnp.stack([start, start + row, start + column]), 1)


@functools.cache
def _mrope_axis(half: int, section: tuple[int, int, int]) -> np.ndarray:
    """int[half]: which of the three positions each frequency reads."""
    axis = np.zeros(half, np.int32)
    for which in (1, 2):
        axis[which : 3 * section[which] : 3] = which
    return axis


def text_rope(
    positions: jax.Array, head_dim: int, theta: float, section: tuple[int, int, int]
) -> Rope:
    """Cosines and sines of the text decoder.

    Args:
      positions: int32[3, B, T].
      head_dim: H.
      theta: base of the frequencies.
      section: how many frequencies belong to time, height and width; their sum is H/2.

    Returns:
      two float32[B, T, 1, H].
    """
    half = head_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) * 2 / head_dim)
    chosen = positions[_mrope_axis(half, tuple(section))]  # [half, B, T]
    angle = jnp.einsum("FBT,F->BTF", chosen.astype(jnp.float32), frequency)
    angle = jnp.concatenate([angle, angle], axis=-1)[:, :, None]
    return jnp.cos(angle), jnp.sin(angle)


def merge_order(grid: tuple[int, int], merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch in the order in which merge x merge blocks stand together.

    >>> merge_order((2, 4), 2)[1].tolist()
    [0, 1, 0, 1, 2, 3, 2, 3]
    """
    h, w = grid
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

    def blocks(x: np.ndarray) -> np.ndarray:
        return x.reshape(h // merge, merge, w // merge, merge).swapaxes(1, 2).reshape(-1)

    return blocks(rows), blocks(columns)


def vision_rope(grid: tuple[int, int], merge: int, head_dim: int, theta: float = 1e4) -> Rope:
    """Cosines and sines of the vision tower: half of the frequencies turn with the row, half with
    the column.

    Args:
      grid: (rows, columns) of patches.
      merge: side of the blocks that the merger joins; patches are in block order.
      head_dim: H, a multiple of 4.
      theta: base of the frequencies.

    Returns:
      two float32[1, patches, 1, H].
    """
    quarter = head_dim // 4
    frequency = (theta ** (-np.arange(quarter, dtype=np.float32) * 2 / (head_dim // 2))).astype(
        np.float32
    )
    rows, columns = merge_order(grid, merge)
    half = np.concatenate([rows[:, None] * frequency, columns[:, None] * frequency], axis=-1)
    angle = jnp.asarray(np.concatenate([half, half], axis=-1)[None, :, None], jnp.float32)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Turns float[B, T, N, H] by `rope`, in float32; the first half of H pairs with the second."""
    cos, sin = rope
    x32 = x.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos + turned * sin).astype(x.dtype)
