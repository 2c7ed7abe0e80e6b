"""LaRA-VLA: see, think, imagine, act.

    images --vision tower--> image tokens
                                  v
    [ prefix: views, instruction, start ][ K slots ][ suffix: end, text, <img_next>*16, ... ]
      one pass, keys and values kept      nn.scan    one pass over everything before
                                  v
    hidden states [B, P+K+S, D] --> logits (suffix)
                                --> visual thoughts (<img_next>)
                                --> actions (expert)

The latent loop: the input embedding of slot k is the last hidden state of the position before it,
so a thought is a hidden state fed back without becoming a word. The prefix's keys and values do not
change inside the loop: they are a broadcast input of the scan, saved once for the backward pass.
The carry is only the previous hidden state and the slots' own keys and values. Parameters are
broadcast, so the K steps share them and compile once.

Letters: B batch, V views, P prefix, K slots, S suffix, T = P+K+S, D width, M merged image tokens,
L layers.

Source: arXiv 2602.01166, section 3.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lara_jax.models import masks, rope
from lara_jax.models.action_expert import ActionExpert, ActionExpertConfig
from lara_jax.models.attention import IMPLEMENTATIONS
from lara_jax.models.latent_loop import LatentLoop, think
from lara_jax.models.layers import COLLECTIONS, REMAT_POLICIES
from lara_jax.models.text_decoder import TextConfig, TextDecoder
from lara_jax.models.vision_tower import VisionConfig, VisionFeatures, VisionTower
from lara_jax.sharding import constrain

MAX_SLOTS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaraVLAConfig:
    """The whole model.

    Attributes:
      latent_slots: K, 0 to 32. 0 = the whole sequence in one pass.
      position_mode: "mrope" (true 3-D positions), or "sequential" (a running count on all axes, as
        the released checkpoints saw in their latent stages).
      latent_source: which "last hidden state" is fed back and read by the heads: "pre_norm" (output
        of the last layer, as in the released checkpoints) or "post_norm". The language head always
        norms.
      latent_mode: "append": slot k feeds slot k+1 (the paper).
      image_id, img_next_id: token ids of an image token and of <img_next>.
      action_ids: first discrete action token's id, and one past the last; (0, 0) for none.
      attend_padding: the action expert sees pads too, as released checkpoints were trained.
      img_next_tokens: how many <img_next> tokens a row holds.
      dtype: compute dtype; parameters, norms, softmax, positions and losses are float32.
      remat: what the backward pass recomputes, one of `lara_jax.models.layers.REMAT_POLICIES`.
      attention: implementation, see `lara_jax.models.attention`.
    """

    vision: VisionConfig
    text: TextConfig
    expert: ActionExpertConfig
    image_id: int
    img_next_id: int
    action_ids: tuple[int, int] = (0, 0)
    latent_slots: int = 3
    position_mode: str = "mrope"
    latent_source: str = "pre_norm"
    latent_mode: str = "append"
    attend_padding: bool = False
    img_next_tokens: int = 16
    dtype: str = "bfloat16"
    remat: str = "full"
    attention: str = "xla"

    def __post_init__(self) -> None:
        if not 0 <= self.latent_slots <= MAX_SLOTS:
            raise ValueError(f"latent_slots is {self.latent_slots}; allowed are 0 to {MAX_SLOTS}")
        choices = {
            "position_mode": ("mrope", "sequential"),
            "latent_source": ("pre_norm", "post_norm"),
            "latent_mode": ("append",),
            "dtype": ("float32", "bfloat16"),
            "remat": tuple(REMAT_POLICIES),
            "attention": tuple(IMPLEMENTATIONS),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; choose one of {allowed}")
        widths = (self.vision.out_width, self.expert.context_width)
        if widths != (self.text.width, self.text.width):
            raise ValueError(
                f"vision.out_width and expert.context_width are {widths}; both must be the text "
                f"width {self.text.width}"
            )


@flax.struct.dataclass
class Inputs:
    """What the backbone reads; see `lara_jax.batch.Batch` for the fields' meaning.

    patches: float[B, V, P_img, patch_values] (`lara_jax.image_processing`).
    """

    patches: jax.Array
    view_mask: jax.Array
    prefix_ids: jax.Array
    prefix_mask: jax.Array
    suffix_ids: jax.Array
    suffix_mask: jax.Array


@flax.struct.dataclass
class Thoughts:
    """What the backbone returns.

    Attributes:
      hidden: float[B, T, D], hidden states of `latent_source` at every position (meaningless at
        pads).
      context: bool[B, T], what the action expert sees: no pads, unless asked for, and never a
        discrete action token or what comes after one, which is the answer.
      valid: bool[B, T], False at pads.
      img_next: bool[B, T], True at the <img_next> tokens.
      logits: float32[B, S, vocabulary]; logits[:, i] predicts suffix_ids[:, i].
    """

    hidden: jax.Array
    context: jax.Array
    valid: jax.Array
    img_next: jax.Array
    logits: jax.Array


class LaraVLA(nn.Module):
    """The whole model: `__call__` thinks, `act_velocity` and `act` turn thoughts into actions."""

    config: LaraVLAConfig

    def setup(self) -> None:
        cfg = self.config
        dtype = jnp.dtype(cfg.dtype)
        self.vision = VisionTower(cfg.vision, dtype, cfg.remat, cfg.attention)
        self.text = TextDecoder(cfg.text, dtype, cfg.remat, cfg.attention)
        self.action_expert = ActionExpert(cfg.expert, dtype)

    def __call__(self, inputs: Inputs, grid: tuple[int, int]) -> Thoughts:
        """Runs prefix, latent loop and suffix.

        Args:
          inputs: tokens and image patches.
          grid: (rows, columns) of an image's patches, static.

        Returns:
          Thoughts in the compute dtype, logits in float32.
        """
        cfg = self.config
        P, K = inputs.prefix_ids.shape[1], cfg.latent_slots
        layout = self._layout(inputs, grid)
        x, deepstack = self._embed_prefix(inputs, layout.is_image[:, :P], grid)
        if K == 0:
            hidden = self._single_pass(x, deepstack, inputs.suffix_ids, layout)
        else:
            hidden = self._prefix_slots_suffix(x, deepstack, inputs.suffix_ids, layout)
        predicting = hidden[:, P + K - 1 : -1]
        return Thoughts(
            hidden=self._source(hidden),
            context=self._context(inputs, layout.valid),
            valid=layout.valid,
            img_next=layout.img_next,
            logits=self.text.logits(predicting),
        )

    def act_velocity(
        self,
        thoughts: Thoughts,
        state: jax.Array,
        noisy: jax.Array,
        bucket: jax.Array,
        *,
        train: bool = False,
    ) -> jax.Array:
        """The expert's flow velocity; see `ActionExpert.__call__` for shapes."""
        return self.action_expert(
            noisy, bucket, state, thoughts.hidden, thoughts.context, train=train
        )

    def act(self, thoughts: Thoughts, state: jax.Array, noise: jax.Array) -> jax.Array:
        """Samples a normalised action chunk float32[B, C, A] from `noise` of that shape."""
        return self.action_expert.sample(noise, state, thoughts.hidden, thoughts.context)

    def encode_images(self, patches: jax.Array, grid: tuple[int, int]) -> VisionFeatures:
        """Vision features of float[I, P_img, patch_values]."""
        return self.vision(patches, grid)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float[B, T, D] before the final norm -> float32[B, T, vocabulary]."""
        return self.text.logits(hidden)

    def init_all(self, inputs: Inputs, grid: tuple[int, int]) -> None:
        """Touches every parameter; pass as `method` to `init`."""
        cfg = self.config.expert
        B = inputs.prefix_ids.shape[0]
        noise = jnp.zeros((B, cfg.action_horizon, cfg.action_dim))
        self.act(self(inputs, grid), jnp.zeros((B, cfg.state_dim)), noise)

    def _context(self, inputs: Inputs, valid: jax.Array) -> jax.Array:
        """bool[B, T]: the positions that the action expert may attend to."""
        first, end = self.config.action_ids
        is_action = (inputs.suffix_ids >= first) & (inputs.suffix_ids < end)
        answer = jnp.cumsum(is_action, axis=1) > 0
        before = jnp.zeros_like(valid[:, : -answer.shape[1]])
        answer = jnp.concatenate([before, answer], axis=1)
        return ~answer if self.config.attend_padding else valid & ~answer

    def _layout(self, inputs: Inputs, grid: tuple[int, int]) -> "_Layout":
        """Where every kind of token stands, over the whole sequence."""
        cfg = self.config
        B, K = inputs.prefix_ids.shape[0], cfg.latent_slots
        slots = jnp.ones((B, K), bool)

        def over_sequence(prefix: jax.Array, slot: jax.Array, suffix: jax.Array) -> jax.Array:
            return jnp.concatenate([prefix, slot, suffix], axis=1)

        is_image = inputs.prefix_ids == cfg.image_id
        tokens = inputs.patches.shape[2] // cfg.vision.merge_size**2
        view = (jnp.cumsum(is_image, axis=1) - 1) // tokens
        present = jnp.take_along_axis(inputs.view_mask, jnp.maximum(view, 0), axis=1, mode="clip")
        prefix_valid = inputs.prefix_mask & (present | ~is_image)
        valid = over_sequence(prefix_valid, slots, inputs.suffix_mask)
        img_next = inputs.suffix_ids == cfg.img_next_id
        img_next = over_sequence(
            jnp.zeros_like(prefix_valid), ~slots, img_next & inputs.suffix_mask
        )
        is_image = over_sequence(is_image, ~slots, jnp.zeros_like(inputs.suffix_mask))
        if cfg.position_mode == "mrope":
            positions = rope.mrope_positions(is_image, valid, cfg.vision.merged(grid))
        else:
            positions = rope.sequential_positions(valid)
        return _Layout(is_image, valid, img_next, positions)

    def _embed_prefix(
        self, inputs: Inputs, is_image: jax.Array, grid: tuple[int, int]
    ) -> tuple[jax.Array, jax.Array]:
        """Prefix embeddings with the image features in place; DeepStack features beside them."""
        B, V, P_img, values = inputs.patches.shape
        features = self.vision(inputs.patches.reshape(B * V, P_img, values), grid)
        x = self.text.embed(inputs.prefix_ids)
        D = x.shape[-1]
        ordinal = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)[..., None]

        def place(image_features: jax.Array) -> jax.Array:
            return jnp.take_along_axis(
                image_features.reshape(B, -1, D), ordinal, axis=1, mode="clip"
            )

        at_image = is_image[..., None]
        x = jnp.where(at_image, place(features.embeds), x)
        deepstack = jnp.where(at_image, jax.vmap(place)(features.deepstack), 0)
        return x, deepstack

    def _single_pass(
        self, x: jax.Array, deepstack: jax.Array, suffix_ids: jax.Array, layout: "_Layout"
    ) -> jax.Array:
        """K = 0: prefix and suffix as one segment."""
        S = suffix_ids.shape[1]
        x = jnp.concatenate([x, self.text.embed(suffix_ids)], axis=1)
        deepstack = jnp.pad(deepstack, ((0, 0), (0, 0), (0, S), (0, 0)))
        everything = slice(0, x.shape[1])
        hidden, _ = self.text(
            x, layout.positions, layout.mask(everything, everything), deepstack=deepstack
        )
        return hidden

    def _prefix_slots_suffix(
        self, x: jax.Array, deepstack: jax.Array, suffix_ids: jax.Array, layout: "_Layout"
    ) -> jax.Array:
        """Prefix once, K slots in a scan, suffix once."""
        cfg = self.config
        P, K = x.shape[1], cfg.latent_slots
        T = P + K + suffix_ids.shape[1]
        prefix, everything, suffix = slice(0, P), slice(0, T), slice(P + K, T)
        positions = layout.positions
        prefix_hidden, prefix_kv = self.text(
            x, positions[:, :, prefix], layout.mask(prefix, prefix), deepstack=deepstack
        )
        loop = LatentLoop(
            config=cfg.text,
            slots=K,
            source=cfg.latent_source,
            dtype=jnp.dtype(cfg.dtype),
            recompute=cfg.remat != "none",
            implementation=cfg.attention,
            parent=None,
        )
        slot_hidden, slot_kv = think(
            loop,
            nn.unbox({name: self.text.variables.get(name, {}) for name in COLLECTIONS}),
            prefix_hidden[:, -1:],
            prefix_kv,
            layout.valid[:, prefix],
            positions[:, :, P : P + K],
        )
        slot_hidden = constrain(slot_hidden, "batch", "slots", "embed")
        suffix_hidden, _ = self.text(
            self.text.embed(suffix_ids),
            positions[:, :, suffix],
            layout.mask(suffix, everything),
            past=(prefix_kv, slot_kv),
        )
        return jnp.concatenate([prefix_hidden, slot_hidden, suffix_hidden], axis=1)

    def _source(self, hidden: jax.Array) -> jax.Array:
        """Hidden states before the final norm -> those of `latent_source`."""
        return hidden if self.config.latent_source == "pre_norm" else self.text.final_norm(hidden)


@flax.struct.dataclass
class _Layout:
    """Kind and place of every token of the sequence: bool[B, T] each, positions int32[3, B, T]."""

    is_image: jax.Array
    valid: jax.Array
    img_next: jax.Array
    positions: jax.Array

    def mask(self, queries: slice, keys: slice) -> jax.Array:
        """bool[B, T, S]: the attention mask between two ranges of the sequence."""
        index = jnp.arange(self.valid.shape[1])
        return masks.attention_mask(
            index[queries],
            index[keys],
            self.valid[:, queries],
            self.valid[:, keys],
            self.img_next[:, queries],
            self.img_next[:, keys],
        )
