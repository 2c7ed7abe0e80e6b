"""The smallest LaRA-VLA that still has every part: a laptop trains it through all three stages.

Paper      arXiv 2602.01166 (LaRA-VLA); the curriculum is the paper's, but Stage II turns all
           reasoning latent at once (its first two parts can be named in `train.stages`).
Model      debug backbone and expert, 64 px frames of 16 tokens, K = 3, float32.
Hardware   2 CPU cores, minutes.
Data       the built-in tabletop (`lara data make-tabletop`); any RLDS set of 64 px frames works.
Expected   every loss falls; held-out action error below that of repeating the previous action.
Command    lara train --config configs/debug.py --workdir runs/debug --config.data.path=DATA

The parameters start from random numbers, so the learning rates are far above the paper's.
"""

from ml_collections import ConfigDict

from lara_jax.config import default_config
from lara_jax.curriculum import paper_stages, pretrain_stage


def get_config() -> ConfigDict:
    """Values of the run."""
    config = default_config()
    config.seed = 0
    config.train.steps = 500
    config.stages = paper_stages(
        explicit=15,
        latent=(20, 20, 20),
        action=65,
        suffix_tokens=(140, 124, 108, 76, 8),
    )
    config.stages.pretrain = pretrain_stage(suffix_tokens=100)
    config.train.stages = ("explicit", "latent_3", "action")

    config.model.backbone = "debug"
    config.model.expert = "debug"
    config.model.base_prompt = ""  # half of the tokens of a prefix of 64 px frames
    config.model.box_decimals = 2  # 0.6 px
    config.model.img_next_tokens = 4
    config.model.action_horizon = 8
    config.model.compute_dtype = "float32"
    config.model.remat = "none"
    config.model.dropout = 0.0

    config.data.batch_size = 64
    config.data.num_threads = 2
    config.data.prefix_tokens = 56
    config.data.resize_px = (64, 64)
    config.data.min_pixels = 64 * 64

    config.teacher.resize_px = ()

    config.optimizer.base_rate = 3e-3
    config.optimizer.backbone_rate = 3e-3
    config.optimizer.expert_rate = 8e-3
    config.optimizer.final_rate = 1e-5
    config.optimizer.weight_decay = 1e-4

    config.checkpoint.every_steps = 200
    config.log.every_steps = 10
    return config.lock()
