"""Built-in tabletop: MuJoCo physics, ray-cast images, a scripted expert. No OpenGL, no assets.

Reading order: `scene` (what stands on the table), `camera` (how it is seen), `environment` (how it
is acted on), `expert` (how it is solved, and what the solver thinks).
"""

from lara_jax.evals.tabletop.environment import Observation, TabletopEnv, episode_seed
from lara_jax.evals.tabletop.expert import ExpertStep, expert_step
from lara_jax.evals.tabletop.scene import TabletopConfig

__all__ = [
    "ExpertStep",
    "Observation",
    "TabletopConfig",
    "TabletopEnv",
    "episode_seed",
    "expert_step",
]
