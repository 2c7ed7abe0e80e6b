"""Pooling, gathering and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models.visual_latent import gather_block, pool_grid, update_teacher


def test_pool_grid_averages_cells_row_by_row():
    grid = jnp.arange(8.0).reshape(2, 4)  # rows 0 1 2 3 / 4 5 6 7
    pooled = pool_grid(grid.reshape(1, 8, 1), (2, 4), 4)
    assert pooled[0, :, 0].tolist() == [0.5, 2.5, 4.5, 6.5]
    assert pool_grid(grid.reshape(1, 8, 1), (2, 4), 1)[0, 0, 0] == 3.5


@pytest.mark.parametrize(("grid", "cells"), [((8, 8), 12), ((6, 8), 16), ((2, 2), 16)])
def test_pool_grid_refuses_uneven_cells(grid, cells):
    with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} feature grid to {cells}"):
        pool_grid(jnp.zeros((1, grid[0] * grid[1], 2)), grid, cells)


def test_gather_block_finds_each_rows_run():
    hidden = jnp.arange(12.0).reshape(2, 6, 1)
    block = jnp.array([[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]], bool)
    assert gather_block(hidden, block, 2)[..., 0].tolist() == [[1, 2], [10, 11]]


def test_teacher_moves_in_float32_where_bfloat16_would_not():
    student = {"w": jnp.full(4, 1.01)}
    teacher = {"w": jnp.ones(4)}
    moved = jax.jit(update_teacher, static_argnums=2)(teacher, student, 0.999)
    np.testing.assert_allclose(moved["w"], 1 + 0.01e-3, rtol=1e-7)
    assert moved["w"].dtype == jnp.float32 and float(moved["w"][0]) != 1.0
    low = teacher["w"].astype(jnp.bfloat16)
    assert (low * 0.999 + student["w"].astype(jnp.bfloat16) * 0.001 == low).all()
