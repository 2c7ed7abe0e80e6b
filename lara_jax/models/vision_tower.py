"""Qwen3-VL's vision tower: patches of an image -> a feature per merged 2x2 block, and DeepStack.

    patches -> linear -> + position table, resampled to the grid
            -> L blocks of full attention within the image -> merger -> image tokens
                 `-> after some of the blocks: a merger of its own -> DeepStack features,
                     added to the decoder's first layers at the image tokens

Letters: I images, P patches of an image, M = P / merge^2 merged tokens, W vision width, N heads,
H head dim, F mlp, D text width, L layers. Patches stand in merge-block order
(`lara_jax.image_processing`).

Source: Qwen3-VL technical report; `transformers` Qwen3VLVisionModel is the oracle in the tests.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax.models import rope
from lara_jax.models.attention import attention
from lara_jax.models.layers import (
    COLLECTIONS,
    EMBEDDING_INIT,
    dense,
    layer_norm,
    remat,
    stack,
)
from lara_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tower; `position_table` is the side of the learned table, `out_width` is D."""

    depth: int
    width: int
    heads: int
    mlp: int
    out_width: int
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    position_table: int = 48
    deepstack_layers: tuple[int, ...] = (5, 11, 17)
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(
                f"vision width {self.width} over {self.heads} heads must give a head size "
                "divisible by 4"
            )
        if any(not 0 <= layer < self.depth for layer in self.deepstack_layers):
            raise ValueError(
                f"deepstack_layers {self.deepstack_layers} must lie within the {self.depth} vision "
                f"layers"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Numbers in one flattened patch: 3 channels x frames x side x side."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    def merged(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The merged grid of a patch grid.

        Raises:
          ValueError: a side is not a multiple of `merge_size`.
        """
        if grid[0] % self.merge_size or grid[1] % self.merge_size:
            raise ValueError(f"patch grid {grid} is not a multiple of merge_size {self.merge_size}")
        return grid[0] // self.merge_size, grid[1] // self.merge_size


# Source: Qwen/Qwen3-VL-{2B,4B,8B}-Instruct config.json. `out_width` follows the text decoder.
VARIANTS: dict[str, dict[str, Any]] = {
    "debug": dict(
        depth=3, width=64, heads=4, mlp=128, patch_size=8, position_table=8, deepstack_layers=(0, 1)
    ),
    "2b": dict(depth=24, width=1024, heads=16, mlp=4096),
    "4b": dict(depth=24, width=1024, heads=16, mlp=4096),
    "8b": dict(depth=27, width=1152, heads=16, mlp=4304, deepstack_layers=(8, 16, 24)),
}


@flax.struct.dataclass
class VisionFeatures:
    """embeds: float[I, M, D]. deepstack: float[n, I, M, D], one entry per tapped layer."""

    embeds: jax.Array
    deepstack: jax.Array


class VisionAttention(nn.Module):
    config: VisionConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, angles: rope.Rope) -> jax.Array:
        cfg = self.config
        names = ("vision_embed", None, "vision_heads", "head_dim")
        qkv = dense(
            (3, cfg.heads, cfg.head_dim), names, use_bias=True, dtype=self.dtype, name="qkv"
        )(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        q, k = rope.rotate(q, angles), rope.rotate(k, angles)
        out = attention(q, k, v, implementation=self.implementation)
        out_names = ("vision_heads", "head_dim", "vision_embed")
        return dense(cfg.width, out_names, inputs=2, use_bias=True, dtype=self.dtype, name="proj")(
            out
        )


class VisionMlp(nn.Module):
    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, names = self.config, ("vision_embed", "vision_mlp")
        h = dense(cfg.mlp, names, use_bias=True, dtype=self.dtype, name="fc1")(x)
        h = nn.gelu(h, approximate=True)
        return dense(cfg.width, names[::-1], use_bias=True, dtype=self.dtype, name="fc2")(h)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP. Carries x[I, P, W]; emits it too, for DeepStack."""

    config: VisionConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, angles: rope.Rope) -> tuple[jax.Array, jax.Array]:
        cfg = self.config

        def norm(name: str) -> nn.LayerNorm:
            return layer_norm("vision_embed", epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        x = constrain(x, "batch", "patch", "vision_embed")
        x = x + VisionAttention(cfg, self.dtype, self.implementation, name="attn")(
            norm("norm1")(x), angles
        )
        x = x + VisionMlp(cfg, self.dtype, name="mlp")(norm("norm2")(x))
        return x, x


class PatchMerger(nn.Module):
    """Joins merge x merge neighbours into one feature of the text width: [I, P, W] -> [I, M, D].

    `norm_joined`: the LayerNorm comes after the join (DeepStack) instead of before (the final
    merger).
    """

    config: VisionConfig
    dtype: Any
    norm_joined: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        images, patches, width = x.shape
        block = cfg.merge_size**2
        joined = (images, patches // block, block * width)
        norm = layer_norm("vision_embed", epsilon=cfg.norm_eps, dtype=self.dtype, name="norm")
        x = norm(x.reshape(joined)) if self.norm_joined else norm(x).reshape(joined)
        h = dense(
            block * width,
            ("vision_embed", "vision_mlp"),
            use_bias=True,
            dtype=self.dtype,
            name="fc1",
        )(x)
        h = nn.gelu(h, approximate=False)
        return dense(
            cfg.out_width, ("vision_mlp", "embed"), use_bias=True, dtype=self.dtype, name="fc2"
        )(h)


class VisionTower(nn.Module):
    """Images of one common size -> features. Parameters: see `lara_jax.interop.hf_keys`."""

    config: VisionConfig
    dtype: Any = jnp.float32
    remat: str = "full"
    implementation: str = "xla"

    @nn.compact
    def __call__(self, patches: jax.Array, grid: tuple[int, int]) -> VisionFeatures:
        """Encodes images.

        Args:
          patches: float[I, P, patch_values], merge-block order.
          grid: (rows, columns) of patches, static; rows * columns = P.

        Returns:
          features in the compute dtype.

        Raises:
          ValueError: `patches` and `grid` disagree, or the grid does not divide into merged blocks.
        """
        cfg = self.config
        cfg.merged(grid)
        if patches.shape[1:] != (grid[0] * grid[1], cfg.patch_values):
            raise ValueError(
                f"patches of shape {patches.shape} do not fit a {grid} grid of "
                f"{cfg.patch_values} values"
            )
        x = dense(
            cfg.width,
            ("patch", "vision_embed"),
            use_bias=True,
            dtype=self.dtype,
            name="patch_embed",
        )(patches)
        table = self.param(
            "pos_embed",
            nn.with_logical_partitioning(EMBEDDING_INIT, ("positions", "vision_embed")),
            (cfg.position_table**2, cfg.width),
        )
        x = x + resample_positions(table, cfg.position_table, grid, cfg.merge_size).astype(
            self.dtype
        )

        angles = rope.vision_rope(grid, cfg.merge_size, cfg.head_dim)
        blocks = stack(remat(VisionBlock, self.remat), cfg.depth, in_axes=nn.broadcast)
        x, layers = blocks(cfg, self.dtype, self.implementation, name="blocks")(x, angles)

        embeds = PatchMerger(cfg, self.dtype, name="merger")(x)
        if not cfg.deepstack_layers:
            return VisionFeatures(embeds, jnp.zeros((0, *embeds.shape), embeds.dtype))
        mergers = nn.vmap(
            PatchMerger,
            variable_axes=dict.fromkeys(COLLECTIONS, 0),
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        taps = layers[np.array(cfg.deepstack_layers)]
        deepstack = mergers(cfg, self.dtype, norm_joined=True, name="deepstack_mergers")(taps)
        return VisionFeatures(embeds, deepstack)


def resample_positions(table: jax.Array, side: int, grid: tuple[int, int], merge: int) -> jax.Array:
    """The learned side x side position table, resampled bilinearly to `grid` with aligned ends.

    Args:
      table: float32[side*side, W].
      side: side of the table.
      grid: (rows, columns) of patches.
      merge: side of the merger's blocks.

    Returns:
      float32[P, W], in merge-block order.
    """
    rows, columns = rope.merge_order(grid, merge)
    result = jnp.zeros((), table.dtype)
    places = []
    for count, index in zip(grid, (rows, columns), strict=True):
        at = np.linspace(0, side - 1, count, dtype=np.float32)[index]
        low = at.astype(np.int32)
        places.append((low, np.minimum(low + 1, side - 1), at - low))
    (top, bottom, down), (left, right, along) = places
    for row, row_weight in ((top, 1 - down), (bottom, down)):
        for column, column_weight in ((left, 1 - along), (right, along)):
            weight = (row_weight * column_weight)[:, None]
            result = result + table[row * side + column] * weight
    return result
