"""Visual thoughts: <img_next> tokens imagine the next frame as a slow vision tower would see it.

    target  = pool_g(teacher(next frame))
    loss    = mean |hidden[img_next] - target|       over rows that have a next frame
    teacher <- m teacher + (1 - m) student           every n-th step, in float32

g x g <img_next> tokens (4 x 4 as published) stand for the cells of the pooled grid, row by row. The
teacher is kept in float32: at momentum 0.999 a bfloat16 copy never moves, because the update is
below half a unit in the last place.

Letters: B batch, T tokens, Q = g*g, M merged tokens, D text width.

Source: arXiv 2602.01166, visual latents.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp


def gather_block(hidden: jax.Array, block: jax.Array, size: int) -> jax.Array:
    """The hidden states at the one run of `size` marked tokens of each row.

    Args:
      hidden: float[B, T, D].
      block: bool[B, T], True at exactly `size` consecutive tokens a row.
      size: length of the run.

    Returns:
      float[B, size, D].
    """
    start = jnp.argmax(block, axis=1)
    index = start[:, None] + jnp.arange(size)
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def pool_grid(features: jax.Array, grid: tuple[int, int], cells: int) -> jax.Array:
    """Average-pools merged features to a square of `cells` cells.

    Args:
      features: float[B, M, D], row by row.
      grid: (rows, columns) of the merged grid.
      cells: a square number g*g; g divides both sides of the grid.

    Returns:
      float[B, cells, D].

    Raises:
      ValueError: `cells` is not a square whose side divides the grid.
    """
    side = math.isqrt(cells)
    h, w = grid
    if side * side != cells or h % side or w % side:
        raise ValueError(f"cannot pool a {h}x{w} feature grid to {cells} cells in a square")
    B, _, D = features.shape
    blocks = features.reshape(B, side, h // side, side, w // side, D)
    return blocks.mean(axis=(2, 4)).reshape(B, cells, D)


def update_teacher(teacher: Any, student: Any, momentum: float) -> Any:
    """Exponential moving average of the parameters, float32 in and out."""
    return jax.tree.map(
        lambda t, s: t * momentum + s.astype(jnp.float32) * (1 - momentum), teacher, student
    )
