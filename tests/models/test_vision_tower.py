"""The vision tower: shapes at every size, images apart. Numbers: the golden files."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lara_jax.models import vision_tower
from lara_jax.models.vision_tower import VisionConfig, VisionTower, resample_positions
from tests.models import tiny

CONFIG = tiny.config().vision


@pytest.fixture(scope="module")
def tower_and_params():
    tower = VisionTower(CONFIG, remat="none")
    patches = jax.random.normal(jax.random.key(1), (3, 8, CONFIG.patch_values))
    params = nn.unbox(jax.jit(lambda k: tower.init(k, patches, tiny.GRID))(jax.random.key(0)))
    return tower, params, patches


@pytest.mark.parametrize("size", ["debug", "2b", "4b", "8b"])
def test_shapes_at_full_size(size):
    config = VisionConfig(out_width=64, **vision_tower.VARIANTS[size])
    tower = VisionTower(config)
    patches = jax.ShapeDtypeStruct((2, 256, config.patch_values), jnp.float32)
    features, params = jax.eval_shape(
        lambda k, x: tower.init_with_output(k, x, (16, 16)), jax.random.key(0), patches
    )
    assert features.embeds.shape == (2, 64, 64)
    assert features.deepstack.shape == (len(config.deepstack_layers), 2, 64, 64)
    if size == "4b":  # 415 M with a text width of 2560: facts of the published model
        big = VisionTower(VisionConfig(out_width=2560, **vision_tower.VARIANTS[size]))
        params = jax.eval_shape(lambda k, x: big.init(k, x, (16, 16)), jax.random.key(0), patches)
        assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == 415


def test_images_do_not_see_each_other(tower_and_params):
    tower, params, patches = tower_and_params
    apply = jax.jit(lambda x: tower.apply(params, x, tiny.GRID))
    before, after = apply(patches), apply(patches.at[1].set(0))
    for was, now in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        moved = jnp.abs(was - now).max(axis=(-1, -2)).reshape(-1, 3).max(axis=0)
        assert moved[1] > 1e-3 and moved[0] == 0 and moved[2] == 0


def test_every_patch_reaches_every_token(tower_and_params):
    """Attention within an image is full."""
    tower, params, patches = tower_and_params
    jacobian = jax.jacrev(lambda x: tower.apply(params, x, tiny.GRID).embeds[0].sum(-1))(patches)
    assert (jnp.abs(jacobian[:, 0]).max(axis=-1) > 0).all()


def test_positions_resampled_to_the_tables_own_grid_are_the_table():
    table = jax.random.normal(jax.random.key(0), (16, 3))
    rows, columns = vision_tower.rope.merge_order((4, 4), 2)
    np.testing.assert_allclose(
        resample_positions(table, 4, (4, 4), 2), table[rows * 4 + columns], atol=1e-6
    )


def test_positions_are_interpolated_with_aligned_ends():
    table = jnp.arange(4.0)[:, None]  # 2 x 2: 0 1 / 2 3
    got = resample_positions(table, 2, (2, 4), 2)[:, 0]
    expected = {(0, 0): 0, (0, 1): 1 / 3, (0, 2): 2 / 3, (0, 3): 1}
    expected |= {(1, column): value + 2 for (_, column), value in expected.items()}
    rows, columns = vision_tower.rope.merge_order((2, 4), 2)
    want = [expected[at] for at in zip(rows.tolist(), columns.tolist(), strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_refuses_patches_that_do_not_fit():
    tower = VisionTower(CONFIG)
    with pytest.raises(ValueError, match=r"\(3, 4\) is not a multiple of merge_size 2"):
        tower.init(jax.random.key(0), jnp.zeros((1, 12, CONFIG.patch_values)), (3, 4))
    with pytest.raises(ValueError, match=r"do not fit a \(4, 4\) grid"):
        tower.init(jax.random.key(0), jnp.zeros((1, 8, CONFIG.patch_values)), (4, 4))
    with pytest.raises(ValueError, match=r"deepstack_layers \(5, 11, 17\).*2 vision layers"):
        VisionConfig(depth=2, width=16, heads=2, mlp=8, out_width=8)
