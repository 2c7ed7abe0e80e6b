"""Qwen3-VL's text decoder: token embeddings -> hidden states -> logits, a segment at a time.

The decoder runs over a segment given the keys and values of what came before. The latent loop needs
just that: the prefix once, then one slot at a time, then the suffix.

    x [B, T, D] -> L x ( norm -> attention over [past..., this segment] -> +
                         norm -> SwiGLU -> + -> + DeepStack )
                -> hidden states before the final norm, and this segment's keys and values

Letters: B batch, T tokens of this segment, S keys seen, N heads, K kv heads, H head dim, D width,
F mlp, V vocab, L layers, n DeepStack layers.

Source: Qwen3-VL technical report (q/k norm, GQA, interleaved M-RoPE, DeepStack); the oracle is
`transformers`.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lara_jax.models import rope
from lara_jax.models.attention import attention
from lara_jax.models.layers import EMBEDDING_INIT, dense, remat, rms_norm, stack
from lara_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the decoder. `mrope_section` sums to half the head size."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 5e6
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    tied_embeddings: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section {self.mrope_section} must sum to head_dim / 2 = {self.head_dim / 2}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads are not a multiple of {self.kv_heads} kv heads")


# Source: Qwen/Qwen3-VL-{2B,4B,8B}-Instruct config.json.
VARIANTS: dict[str, dict[str, Any]] = {
    "debug": dict(
        width=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=128, mrope_section=(3, 3, 2)
    ),
    "2b": dict(width=2048, layers=28, heads=16, kv_heads=8, head_dim=128, mlp=6144),
    "4b": dict(width=2560, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=9728),
    "8b": dict(
        width=4096, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=12288, tied_embeddings=False
    ),
}


@flax.struct.dataclass
class KeyValues:
    """Rotated keys, and values, of a segment: float[L, B, T, K, H]; inside a layer without L."""

    key: jax.Array
    value: jax.Array


class SelfAttention(nn.Module):
    config: TextConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self, x: jax.Array, past: tuple[KeyValues, ...], angles: rope.Rope, mask: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        cfg = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            names = ("embed", axis, "head_dim")
            return dense((heads, cfg.head_dim), names, dtype=self.dtype, name=name)(x)

        def norm(name: str) -> nn.RMSNorm:
            return rms_norm("head_dim", epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        q = rope.rotate(norm("q_norm")(project("q_proj", cfg.heads, "heads")), angles)
        k = rope.rotate(norm("k_norm")(project("k_proj", cfg.kv_heads, "kv_heads")), angles)
        new = KeyValues(k, project("v_proj", cfg.kv_heads, "kv_heads"))
        seen = (*past, new)
        keys, values = (tuple(getattr(kv, part) for kv in seen) for part in ("key", "value"))
        out = attention(q, keys, values, mask, implementation=self.implementation)
        names = ("heads", "head_dim", "embed")
        return dense(cfg.width, names, inputs=2, dtype=self.dtype, name="o_proj")(out), new


class GatedMlp(nn.Module):
    """SwiGLU."""

    config: TextConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, names = self.config, ("embed", "mlp")
        gate = dense(cfg.mlp, names, dtype=self.dtype, name="gate_proj")(x)
        up = dense(cfg.mlp, names, dtype=self.dtype, name="up_proj")(x)
        return dense(cfg.width, names[::-1], dtype=self.dtype, name="down_proj")(nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    """One layer: carries x[B, T, D], takes its past, emits this segment's keys and values."""

    config: TextConfig
    dtype: Any
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        layer: jax.Array,
        past: tuple[KeyValues, ...],
        angles: rope.Rope,
        mask: jax.Array,
        deepstack: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        cfg = self.config

        def norm(name: str) -> nn.RMSNorm:
            return rms_norm("embed", epsilon=cfg.norm_eps, dtype=self.dtype, name=name)

        x = constrain(x, "batch", "length", "embed")
        attended, new = SelfAttention(cfg, self.dtype, self.implementation, name="attn")(
            norm("input_norm")(x), past, angles, mask
        )
        x = x + attended
        x = x + GatedMlp(cfg, self.dtype, name="mlp")(norm("post_norm")(x))
        if deepstack is not None:
            count = deepstack.shape[0]
            added = deepstack[jnp.minimum(layer, count - 1)]
            x = x + jnp.where(layer < count, added, 0)
        return x, new


def decoder_layers(layer: type[nn.Module], count: int) -> type[nn.Module]:
    """The class of so many layers; `layer` is `DecoderLayer`, or one that recomputes its inside."""
    return stack(layer, count, (0, 0, nn.broadcast, nn.broadcast, nn.broadcast))


def cast_kernels(dtype: Any, variables: Any) -> Any:
    """A tree of variables whose leaves called `kernel` have this dtype."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if "kernel" in jax.tree_util.keystr(path) else leaf

    return jax.tree.map_with_path(cast, variables)


def run_layers(
    layers: Any,
    config: TextConfig,
    x: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    past: tuple[KeyValues, ...] = (),
    deepstack: jax.Array | None = None,
) -> tuple[jax.Array, KeyValues]:
    """What `decoder_layers` made, over one segment; arguments of `TextDecoder.__call__`."""
    angles = rope.text_rope(positions, config.head_dim, config.rope_theta, config.mrope_section)
    if deepstack is not None and deepstack.shape[0] == 0:
        deepstack = None
    return layers(x, jnp.arange(config.layers), past, angles, mask, deepstack)


class TextDecoder(nn.Module):
    """Embedding, layers, final norm and head. Parameters: see `lara_jax.interop.hf_keys`."""

    config: TextConfig
    dtype: Any = jnp.float32
    remat: str = "full"
    implementation: str = "xla"

    def setup(self) -> None:
        cfg = self.config
        self.embed_tokens = self.param(
            "embed_tokens",
            nn.with_logical_partitioning(EMBEDDING_INIT, ("vocab", "embed")),
            (cfg.vocab_size, cfg.width),
        )
        layers = decoder_layers(remat(DecoderLayer, self.remat), cfg.layers)
        # Kernels are cast all at once, so that their gradients stay stacked in the compute dtype
        # until the passes over the decoder are summed, in float32.
        if not self.is_initializing():
            layers = nn.map_variables(layers, "params", partial(cast_kernels, self.dtype))
        self.layers = layers(cfg, self.dtype, self.implementation)
        self.norm = rms_norm("embed", epsilon=cfg.norm_eps, dtype=self.dtype)
        if not cfg.tied_embeddings:
            self.lm_head = dense(cfg.vocab_size, ("embed", "vocab"), dtype=self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32[B, T] -> float[B, T, D]."""
        return constrain(self.embed_tokens.astype(self.dtype)[ids], "batch", "length", "embed")

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        past: tuple[KeyValues, ...] = (),
        deepstack: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Runs the layers over one segment.

        Args:
          x: float[B, T, D] input embeddings.
          positions: int32[3, B, T].
          mask: bool[B, T, S], over the keys of `past` in order, then this segment's.
          past: keys and values of earlier segments.
          deepstack: float[n, B, T, D] added after the first n layers (zero where there is no
            image); None = none.

        Returns:
          hidden states float[B, T, D] BEFORE the final norm, and this segment's keys and values.
        """
        return run_layers(self.layers, self.config, x, positions, mask, past, deepstack)

    def final_norm(self, hidden: jax.Array) -> jax.Array:
        """Hidden states after the final norm, float[B, T, D]."""
        return self.norm(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[B, T, D] before the final norm -> float32[B, T, V]."""
        hidden = self.norm(hidden)
        if self.config.tied_embeddings:
            table = self.embed_tokens.astype(self.dtype)
            out = jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
        else:
            out = self.lm_head(hidden).astype(jnp.float32)
        return constrain(out, "batch", "length", "vocab")
