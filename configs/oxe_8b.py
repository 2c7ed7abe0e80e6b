"""Pretraining a 8B policy on Open X-Embodiment: actions and visual thoughts, no reasoning.

Paper      arXiv 2602.01166 (LaRA-VLA) starts its curriculum from a pretrained policy; data are
           those of arXiv 2310.08864 (Open X-Embodiment), which carry no reasoning annotations.
Model      8b backbone from Qwen3-VL-8B-Instruct, DiT-L expert, one view of 256 px (64 tokens).
Hardware   planned for a TPU v5p-128 or 64 GPUs of 80 GB; fsdp takes all devices.
Steps      100k in one stage: discrete actions + 0.1 visual + flow matching, everything trains.
Batch      1024 rows.
Expected   no published number: the paper does not report this stage by itself. Its result is the
           start (`--config.init.path`) of bridge_4b or libero_4b. Nobody has trained it here.
Command    lara train --config configs/oxe_8b.py --workdir DIR --config.data.path=DATA
           --config.tokenizer.path=TOKENIZER --config.init.path=IMPORTED
"""

from ml_collections import ConfigDict

from lara_jax.config import default_config
from lara_jax.curriculum import paper_stages, pretrain_stage


def get_config() -> ConfigDict:
    """Values of the run."""
    config = default_config()
    config.train.steps = 100_000
    # For a run that goes on to annotated datasets (docs/training.md).
    config.stages = paper_stages(
        explicit=10,
        latent=(5, 5, 10),
        action=20,
        suffix_tokens=(320, 288, 224, 160, 32),
    )
    # 16 x 7 actions are at most 112 tokens.
    config.stages.pretrain = pretrain_stage(suffix_tokens=160)
    config.train.stages = ("pretrain",)

    config.model.backbone = "8b"
    config.model.expert = "L"
    config.model.action_horizon = 16
    config.model.state_dim = 8

    config.data.mixture = "openvla:oxe_magic_soup_plus"
    config.data.filters = ("no_language",)
    config.data.frame_px = (256, 256)
    config.data.batch_size = 1024
    config.data.prefix_tokens = 192
    config.data.num_threads = 32

    # OpenVLA's ranges (its RLDS configuration, commit c8f03f4).
    config.augment.crop_area = (0.9, 0.9)
    config.augment.brightness = 0.2
    config.augment.contrast = (0.8, 1.2)
    config.augment.saturation = (0.8, 1.2)
    config.augment.hue = 0.05

    config.checkpoint.every_steps = 5000
    config.eval.every_steps = 2500
    return config.lock()
