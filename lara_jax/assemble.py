"""A recipe's parts, built in one place: training, evaluation and serving call the same functions.

recipe + tokenizer -> model           recipe + frame size -> image processing, tokens per view
                   -> prompt builder                      -> shapes of a batch
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from lara_jax import batch
from lara_jax.config import Recipe
from lara_jax.curriculum import Stage
from lara_jax.image_processing import ImageConfig
from lara_jax.models import action_expert, text_decoder, vision_tower
from lara_jax.models.action_expert import ActionExpertConfig
from lara_jax.models.lara_vla import LaraVLAConfig
from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig
from lara_jax.tokenizers.fast import FastTokenizer, to_vocabulary
from lara_jax.tokenizers.prompt import PromptBuilder, split_slots
from lara_jax.tokenizers.qwen import Tokenizer, load_tokenizer

TOKENIZER_FILE = "tokenizer.json"
FAST_FOLDER = "fast"


def load_recipe_tokenizer(recipe: Recipe) -> Tokenizer:
    """The tokenizer at `config.tokenizer.path`, or, for the debug backbone, the built-in one.

    Raises:
      ValueError: no path, and a backbone of published size.
    """
    if not recipe.tokenizer.path and recipe.model.backbone != "debug":
        raise ValueError(
            f"config.tokenizer.path is empty, but the {recipe.model.backbone} backbone reads "
            "Qwen's tokens: give the directory that holds its tokenizer.json"
        )
    return load_tokenizer(recipe.tokenizer.path or None)


def tokenizer_to_text(tokenizer: Tokenizer, fast: FastTokenizer | None = None) -> dict[str, str]:
    """Its files by name, as a checkpoint holds them (`lara_jax.checkpoint.RunInfo`).

    Args:
      tokenizer: of the text.
      fast: of the discrete actions, where a stage has some.
    """
    own = {} if fast is None else fast.to_files()
    return {
        **{f"{FAST_FOLDER}/{name}": text for name, text in own.items()},
        TOKENIZER_FILE: tokenizer.to_text(),
    }


def tokenizer_from_text(files: Mapping[str, str]) -> Tokenizer:
    """The inverse of `tokenizer_to_text`."""
    return Tokenizer(tokenizers.Tokenizer.from_str(files[TOKENIZER_FILE]))


def has_fast(files: Mapping[str, str]) -> bool:
    """Whether there is an action tokenizer among a checkpoint's files."""
    return any(name.startswith(f"{FAST_FOLDER}/") for name in files)


def fast_from_text(files: Mapping[str, str]) -> FastTokenizer:
    """The action tokenizer among a checkpoint's files.

    Raises:
      ValueError: there is none: no stage of that run had discrete actions.
    """
    prefix = f"{FAST_FOLDER}/"
    own = {name.removeprefix(prefix): files[name] for name in files if name.startswith(prefix)}
    if not own:
        raise ValueError(
            "the checkpoint has no FAST action tokenizer: none of its stages had discrete_actions"
        )
    return FastTokenizer.from_files(own)


@dataclass(frozen=True)
class ActionTokens:
    """From normalised action chunks float32[N, C, A] to the ids of N lists of tokens."""

    fast: FastTokenizer
    ids: tuple[int, int]

    def __call__(self, chunks: np.ndarray) -> list[np.ndarray]:
        ids = np.arange(*self.ids, dtype=np.int32)
        return [to_vocabulary(tokens, ids) for tokens in self.fast.encode_batch(chunks)]


def image_config(recipe: Recipe) -> ImageConfig:
    """How camera frames become patches."""
    vision = vision_tower.VARIANTS[recipe.model.backbone]
    sizes = {name: vision[name] for name in ("patch_size", "merge_size") if name in vision}
    resize = recipe.data.resize_px
    return ImageConfig(
        min_pixels=recipe.data.min_pixels,
        resize_px=(resize[0], resize[1]) if resize else None,
        **sizes,
    )


def component_slots(recipe: Recipe) -> dict[str, int]:
    """Latent slots of each reasoning component."""
    model = recipe.model
    if model.slots_per_component:
        return dict(zip(model.component_order, model.slots_per_component, strict=True))
    return split_slots(model.latent_slots, model.component_order)


def prompt_builder(
    recipe: Recipe,
    tokenizer: Tokenizer,
    stage: Stage,
    *,
    views: int,
    image_size: tuple[int, int],
    slots: Mapping[str, int] | None = None,
    spoken_stage: int = 0,
) -> PromptBuilder:
    """What turns instruction and annotation into a stage's token segments.

    Args:
      recipe: the run's settings.
      tokenizer: its tokenizer.
      stage: of the curriculum; when acting, the last one.
      views: number of cameras.
      image_size: (height, width) px of a camera's frame.
      slots: latent slots of each component; None takes the recipe's.
      spoken_stage: see `PromptBuilder`: reasoning stage of the stage before.
    """
    return PromptBuilder(
        tokenizer=tokenizer,
        prefix_tokens=recipe.data.prefix_tokens,
        suffix_tokens=recipe.suffix_tokens(stage),
        views=views,
        tokens_per_view=image_config(recipe).tokens_per_view(image_size),
        reasoning_stage=stage.reasoning_stage,
        component_order=recipe.model.component_order,
        slots_per_component=component_slots(recipe) if slots is None else slots,
        img_next_tokens=recipe.model.img_next_tokens,
        base_prompt=recipe.model.base_prompt,
        box_decimals=recipe.model.box_decimals,
        spoken_stage=spoken_stage,
    )


def model_config(recipe: Recipe, tokenizer: Tokenizer, *, latent_slots: int) -> LaraVLAConfig:
    """The networks. Slots have no weights of their own, so stages share one set of parameters.

    Args:
      recipe: the run's settings.
      tokenizer: gives the vocabulary's size and the ids of image tokens.
      latent_slots: K of the stage (`PromptBuilder.latent_slots`).
    """
    model = recipe.model
    text = TextConfig(vocab_size=tokenizer.vocab_size, **text_decoder.VARIANTS[model.backbone])
    return LaraVLAConfig(
        vision=VisionConfig(out_width=text.width, **vision_tower.VARIANTS[model.backbone]),
        text=text,
        expert=ActionExpertConfig(
            context_width=text.width,
            action_dim=model.action_dim,
            action_horizon=model.action_horizon,
            state_dim=model.state_dim,
            dropout=model.dropout,
            **action_expert.VARIANTS[model.expert],
        ),
        image_id=tokenizer.image_pad_id,
        img_next_id=tokenizer.img_next_id,
        action_ids=tokenizer.action_range,
        latent_slots=latent_slots,
        position_mode=model.position_mode,
        latent_source=model.latent_source,
        latent_mode=model.latent_mode,
        attend_padding=model.attend_padding,
        img_next_tokens=model.img_next_tokens,
        dtype=model.compute_dtype,
        remat=model.remat,
        attention=model.attention,
    )


def batch_spec(
    recipe: Recipe, stage: Stage, *, views: int, image_size: Sequence[int]
) -> batch.Batch:
    """Shapes of a stage's batches."""
    height, width = image_size
    return batch.spec(
        batch_size=recipe.data.batch_size,
        views=views,
        image_size=(height, width),
        state_dim=recipe.model.state_dim,
        action_horizon=recipe.model.action_horizon,
        action_dim=recipe.model.action_dim,
        prefix_tokens=recipe.data.prefix_tokens,
        suffix_tokens=recipe.suffix_tokens(stage),
    )
