"""LaRA-VLA 4B on BridgeData V2: the paper's WidowX model.

Paper      arXiv 2602.01166 (LaRA-VLA), section on training; start from Qwen3-VL-4B-Instruct.
Model      4b backbone, DiT-B expert, one view of 256 px (64 tokens), K = 3, chunks of 16 actions.
Hardware   the authors used 8 GPUs; here data, fsdp and tensor axes take what there is.
Steps      the reference's, in one run: 10k explicit, 5k + 5k + 10k latent, 20k with actions.
Batch      128 rows; the reference has 96 in the first stage, 128 in the next, 64 in the last.
Expected   the paper reports, on SimplerEnv-WidowX, 95.8 spoon, 62.5 carrot, 25.0 stack, 91.7
           eggplant, mean 68.8 (%). Nobody has trained this recipe here.
Command    lara import --from hf Qwen3-VL-4B-Instruct ... ; lara train --config configs/bridge_4b.py
           --workdir DIR --config.data.path=bridge_dataset/1.0.0 --config.tokenizer.path=DIR
           --config.init.path=IMPORTED
"""

from ml_collections import ConfigDict

from lara_jax.config import default_config
from lara_jax.curriculum import PAPER_ORDER, paper_stages, pretrain_stage


def get_config() -> ConfigDict:
    """Values of the run."""
    config = default_config()
    config.train.steps = 50_000
    config.stages = paper_stages(
        explicit=10_000,
        latent=(5_000, 5_000, 10_000),
        action=20_000,
        suffix_tokens=(320, 288, 224, 160, 32),
    )
    config.stages.pretrain = pretrain_stage(suffix_tokens=160)
    config.train.stages = PAPER_ORDER

    config.model.backbone = "4b"
    config.model.expert = "B"
    config.model.action_horizon = 16
    config.model.state_dim = 8

    config.data.views = ("primary",)
    config.data.batch_size = 128
    config.data.prefix_tokens = 192

    config.checkpoint.every_steps = 2000
    config.eval.every_steps = 1000
    return config.lock()
