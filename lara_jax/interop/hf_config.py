"""`config.json` of an exported backbone, from which transformers builds the same network.

The rotary base stands where transformers 4.57 looks for it (`rope_theta` beside `rope_scaling`);
5.x reads that form too and turns it into its own `rope_parameters`.

Source: config.json of Qwen/Qwen3-VL-4B-Instruct; `Qwen3VLConfig` of transformers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lara_jax.models.text_decoder import TextConfig
from lara_jax.models.vision_tower import VisionConfig

MAX_POSITIONS = 262_144


@dataclass(frozen=True, kw_only=True)
class VisionTokens:
    """Token ids around an image; the defaults are those of Qwen3-VL's tokenizer.

    Attributes:
      image: of an image token.   video: of a video token (never used here).
      start, end: of `<|vision_start|>` and `<|vision_end|>`.
    """

    image: int = 151_655
    video: int = 151_656
    start: int = 151_652
    end: int = 151_653


def hf_config(
    vision: VisionConfig,
    text: TextConfig,
    *,
    tokens: VisionTokens = VisionTokens(),
    dtype: Any = np.float32,
) -> dict[str, Any]:
    """The content of `config.json` for `Qwen3VLForConditionalGeneration`.

    Args:
      vision, text: sizes of the exported networks.
      tokens: ids by which transformers finds images in a prompt.
      dtype: of the exported arrays.
    """
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": np.dtype(dtype).name,
        "image_token_id": tokens.image,
        "video_token_id": tokens.video,
        "vision_start_token_id": tokens.start,
        "vision_end_token_id": tokens.end,
        "tie_word_embeddings": text.tied_embeddings,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.mlp,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": text.norm_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_theta": text.rope_theta,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": list(text.mrope_section),
            },
            "tie_word_embeddings": text.tied_embeddings,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp,
            "num_heads": vision.heads,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "spatial_merge_size": vision.merge_size,
            "num_position_embeddings": vision.position_table**2,
            "deepstack_visual_indexes": list(vision.deepstack_layers),
            "out_hidden_size": vision.out_width,
        },
    }
