"""Built-in tabletop: MuJoCo physics, ray-cast images, a scripted expert. No OpenGL, no assets.

Reading order: `tasks` (what is asked for), `scene` and `layout` (what stands on the table, and
where), `camera` (how it is seen), `environment` (how it is acted on), `expert` (how it is solved,
and what the solver thinks).
"""

from lara_jax.evals.tabletop.environment import Observation, TabletopEnv, episode_seed
from lara_jax.evals.tabletop.expert import ExpertStep, expert_step
from lara_jax.evals.tabletop.scene import TabletopConfig
from lara_jax.evals.tabletop.tasks import FAMILIES, SPLITS, Task

__all__ = [
    "FAMILIES",
    "SPLITS",
    "ExpertStep",
    "Observation",
    "TabletopConfig",
    "TabletopEnv",
    "Task",
    "episode_seed",
    "expert_step",
]
