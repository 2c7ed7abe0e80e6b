"""The action expert: a flow-matching diffusion transformer that reads the backbone's hidden states.

    x_t = (1 - t) e + t a     t = 0 noise, t = 1 data; e ~ N(0, I), a the normalised action chunk
    v   = a - e               what the network predicts; loss = mean (v_hat - v)^2
    t   = (0.999 - s) / 0.999,  s ~ Beta(1.5, 1)
    x  <- x + v_hat / n       sampling: n Euler steps from x_0 = e

The network sees the time as a bucket, 1000 t cut off after the point.

Tokens: [state (1)] [learned future tokens (32)] [action tokens (C)]. Even blocks cross-attend to
the backbone's hidden states, odd blocks attend among the tokens; every block is modulated by the
flow time.

Letters: B batch, R noise draws of one sample, Q tokens, S context length, C action chunk, A action,
J state, E expert width, N heads, H head dim, D backbone width. The R draws share a row's context,
so the keys and values of the context are computed once for all of them.

Source: arXiv 2602.01166, section 3; GR00T N1 (arXiv 2503.14734) for the network.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax.models.attention import attention
from lara_jax.models.layers import Dense, dense, layer_norm, stack
from lara_jax.sharding import constrain

TIME_SCALE = 0.999  # s in t = (s - Beta) / s
BETA_A = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionExpertConfig:
    """Sizes of the action expert.

    `hidden` is the width of the state encoder's and action decoder's hidden layers and of the
    transformer's output.
    """

    width: int
    heads: int
    head_dim: int
    layers: int
    hidden: int
    context_width: int
    action_dim: int = 7
    action_horizon: int = 16
    state_dim: int = 8
    future_tokens: int = 32
    max_positions: int = 1024
    time_buckets: int = 1000
    euler_steps: int = 4
    noise_draws: int = 4
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.action_horizon > self.max_positions:
            raise ValueError(
                f"action_horizon {self.action_horizon} exceeds max_positions {self.max_positions}"
            )
        if self.heads * self.head_dim != self.width or self.width % 2:
            raise ValueError(
                f"{self.heads} heads of {self.head_dim} must make up the even width {self.width}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")


# Source: DiT-B and DiT-L of the reference's action header.
VARIANTS: dict[str, dict[str, Any]] = {
    "debug": dict(width=64, heads=4, head_dim=16, layers=4, hidden=128, future_tokens=4),
    "B": dict(width=768, heads=12, head_dim=64, layers=16, hidden=1024),
    "L": dict(width=1536, heads=32, head_dim=48, layers=16, hidden=1024),
}


def flow_time(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws flow times t = (0.999 - s)/0.999, s ~ Beta(1.5, 1): float32 of `shape`, in [-0.001, 1].

    With b = 1 the distribution function of Beta(a, b) is s^a, so s is a power of a uniform number.
    """
    s = jax.random.uniform(key, shape) ** (1 / BETA_A)
    return (TIME_SCALE - s) / TIME_SCALE


def sinusoid(x: jax.Array, width: int, *, cos_first: bool, shift: int) -> jax.Array:
    """Sinusoids of base 10,000: float32[...] -> float32[..., width]."""
    half = width // 2
    frequency = np.exp(-np.log(10_000.0) * np.arange(half) / (half - shift)).astype(np.float32)
    angle = x.astype(jnp.float32)[..., None] * frequency
    parts = (jnp.cos(angle), jnp.sin(angle)) if cos_first else (jnp.sin(angle), jnp.cos(angle))
    return jnp.concatenate(parts, axis=-1)


class Mlp(nn.Module):
    """Linear, ReLU, Linear."""

    hidden: int
    out: int
    names: tuple[str, str, str]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first, middle, last = self.names
        h = dense(self.hidden, (first, middle), use_bias=True, dtype=self.dtype, name="layer1")(x)
        return dense(self.out, (middle, last), use_bias=True, dtype=self.dtype, name="layer2")(
            nn.relu(h)
        )


class ActionEncoder(nn.Module):
    """Noisy actions and their flow time -> action tokens: [..., C, A], [...] -> [..., C, E]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, actions: jax.Array, bucket: jax.Array) -> jax.Array:
        def layer(name: str, inputs: str) -> Dense:
            names = (inputs, "expert_embed")
            return dense(self.width, names, use_bias=True, dtype=self.dtype, name=name)

        embedded = layer("layer1", "action")(actions)
        time = sinusoid(bucket, self.width, cos_first=False, shift=0).astype(self.dtype)
        time = jnp.broadcast_to(time[..., None, :], embedded.shape)
        x = nn.silu(layer("layer2", "expert_mlp")(jnp.concatenate([embedded, time], axis=-1)))
        return layer("layer3", "expert_mlp")(x)


class TimeEncoder(nn.Module):
    """Time bucket -> conditioning vector: int32[...] -> float[..., E]."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, bucket: jax.Array) -> jax.Array:
        x = sinusoid(bucket, 256, cos_first=True, shift=1).astype(self.dtype)
        names = ("expert_mlp", "expert_embed")
        x = dense(self.width, names, use_bias=True, dtype=self.dtype, name="linear_1")(x)
        return dense(self.width, names, use_bias=True, dtype=self.dtype, name="linear_2")(
            nn.silu(x)
        )


class ExpertAttention(nn.Module):
    """Multi-head attention with biases; keys and values from `context`."""

    config: ActionExpertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        cfg = self.config

        def project(name: str, inputs: jax.Array, axis: str) -> jax.Array:
            names = (axis, "expert_heads", "head_dim")
            shape = (cfg.heads, cfg.head_dim)
            return dense(shape, names, use_bias=True, dtype=self.dtype, name=name)(inputs)

        source = "expert_embed" if context is x else "embed"
        q = project("to_q", x, "expert_embed")
        k, v = project("to_k", context, source), project("to_v", context, source)
        names = ("expert_heads", "head_dim", "expert_embed")
        out = dense(cfg.width, names, inputs=2, use_bias=True, dtype=self.dtype, name="to_out")
        return out(attention(q, k, v, mask))


class ExpertMlp(nn.Module):
    """Linear to 4E, GELU, linear back; dropout after each."""

    config: ActionExpertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        E, names = self.config.width, ("expert_embed", "expert_mlp")
        drop = nn.Dropout(self.config.dropout, deterministic=not train)
        h = dense(4 * E, names, use_bias=True, dtype=self.dtype, name="fc1")(x)
        h = drop(nn.gelu(h, approximate=True))
        return drop(dense(E, names[::-1], use_bias=True, dtype=self.dtype, name="fc2")(h))


class ExpertBlock(nn.Module):
    """Modulated norm -> attention -> + -> norm -> MLP -> +, over x[B, R, Q, E] and time[B, R, E].

    With a context[B, S, D] it cross-attends, all R draws against one set of keys; without one it
    attends within a draw.
    """

    config: ActionExpertConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
        context: jax.Array | None,
        context_mask: jax.Array,
        *,
        train: bool,
    ) -> jax.Array:
        cfg = self.config
        B, R, Q, E = x.shape

        def norm() -> nn.LayerNorm:
            return layer_norm(None, epsilon=1e-5, dtype=self.dtype)

        names = ("expert_embed", "expert_mlp")
        modulation = dense(2 * E, names, use_bias=True, dtype=self.dtype, name="norm")(
            nn.silu(time)
        )
        scale, shift = jnp.split(modulation[:, :, None], 2, axis=-1)
        h = norm()(x) * (1 + scale) + shift
        attend = ExpertAttention(cfg, self.dtype, name="attn")
        if context is None:
            h = h.reshape(B * R, Q, E)
            h = attend(h, h, None)
        else:
            h = h.reshape(B, R * Q, E)
            S = context_mask.shape[-1]
            context_mask = jnp.broadcast_to(context_mask[:, None], (B, R * Q, S))
            h = attend(h, context, context_mask)
        # The reference drops the attention output twice in a row: kept with probability (1 - p)^2.
        rate = 1 - (1 - cfg.dropout) ** 2
        x = x + nn.Dropout(rate, deterministic=not train)(h.reshape(B, R, Q, E))
        return x + ExpertMlp(cfg, self.dtype, name="mlp")(norm()(x), train=train)


class BlockPair(nn.Module):
    """One cross-attending and one self-attending block: the unit that is scanned."""

    config: ActionExpertConfig
    dtype: Any
    train: bool

    @nn.compact
    def __call__(
        self, x: jax.Array, time: jax.Array, context: jax.Array, context_mask: jax.Array
    ) -> tuple[jax.Array, None]:
        x = constrain(x, "batch", None, "length", "expert_embed")
        block = ExpertBlock(self.config, self.dtype, name="cross")
        x = block(x, time, context, context_mask, train=self.train)
        block = ExpertBlock(self.config, self.dtype, name="self")
        return block(x, time, None, None, train=self.train), None


class ActionExpert(nn.Module):
    """Predicts flow velocities and samples action chunks."""

    config: ActionExpertConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        noisy: jax.Array,
        bucket: jax.Array,
        state: jax.Array,
        context: jax.Array,
        context_mask: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Velocity of the flow at `noisy`.

        Args:
          noisy: float32[B, R, C, A], R noisy versions of each sample's chunk.
          bucket: int32[B, R], 1000 t cut off after the point, -1..1000.
          state: float32[B, J].
          context: float[B, S, D], the backbone's hidden states.
          context_mask: bool[B, S], True where it may be attended to.
          train: whether dropout is on (needs the `dropout` rng).

        Returns:
          float32[B, R, C, A].
        """
        cfg, dtype = self.config, self.dtype
        B, R, C, _ = noisy.shape
        E = cfg.width

        def table(name: str, rows: int) -> jax.Array:
            init = nn.with_logical_partitioning(
                nn.initializers.normal(0.02), ("positions", "expert_embed")
            )
            return self.param(name, init, (rows, E)).astype(dtype)

        names = ("state", "expert_mlp", "expert_embed")
        state_token = Mlp(cfg.hidden, E, names, dtype, name="state_encoder")(state[:, None])
        action_tokens = ActionEncoder(E, dtype, name="action_encoder")(noisy, bucket)
        action_tokens += table("position_embedding", cfg.max_positions)[:C]
        x = jnp.concatenate(
            [
                jnp.broadcast_to(state_token[:, None], (B, R, 1, E)),
                jnp.broadcast_to(
                    table("future_tokens", cfg.future_tokens), (B, R, cfg.future_tokens, E)
                ),
                action_tokens,
            ],
            axis=2,
        )
        time = TimeEncoder(E, dtype, name="time_encoder")(bucket)
        context = context.astype(dtype)

        pairs = stack(BlockPair, cfg.layers // 2, in_axes=nn.broadcast)
        x, _ = pairs(cfg, dtype, train, name="blocks")(x, time, context, context_mask)
        if cfg.layers % 2:
            x = ExpertBlock(cfg, dtype, name="last_cross")(
                x, time, context, context_mask, train=train
            )

        shift_scale = dense(
            2 * E, ("expert_embed", "expert_mlp"), use_bias=True, dtype=dtype, name="proj_out_1"
        )(nn.silu(time))
        shift, scale = jnp.split(shift_scale[:, :, None], 2, axis=-1)
        x = layer_norm(None, epsilon=1e-6, dtype=dtype)(x[:, :, -C:]) * (1 + scale) + shift
        x = dense(
            cfg.hidden,
            ("expert_embed", "expert_mlp"),
            use_bias=True,
            dtype=dtype,
            name="proj_out_2",
        )(x)
        names = ("expert_embed", "expert_mlp", "action")
        out = Mlp(cfg.hidden, cfg.action_dim, names, dtype, name="action_decoder")(x)
        return out.astype(jnp.float32)

    def sample(
        self, noise: jax.Array, state: jax.Array, context: jax.Array, context_mask: jax.Array
    ) -> jax.Array:
        """Integrates the flow from `noise` with `euler_steps` Euler steps.

        Args:
          noise: float32[B, C, A], a draw from N(0, I).
          state: float32[B, J].
          context: float[B, S, D].
          context_mask: bool[B, S].

        Returns:
          float32[B, C, A], normalised actions.
        """
        cfg = self.config
        x = noise[:, None]
        for step in range(cfg.euler_steps):
            bucket = jnp.full(x.shape[:2], int(step / cfg.euler_steps * cfg.time_buckets))
            x = x + self(x, bucket, state, context, context_mask) / cfg.euler_steps
        return x[:, 0]
