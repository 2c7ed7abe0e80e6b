"""The same views through OpenGL, for machines that have it: `mujoco.Renderer`.

Which OpenGL it takes is MuJoCo's to say, by the environment variable MUJOCO_GL (egl, osmesa, glfw).
Its pictures are smoother than the ray casts' and not the same bits on another driver.
"""

import os

import mujoco
import numpy as np

from lara_jax.evals.tabletop.camera import Frame


class GlCamera:
    """A camera of the scene, drawn by OpenGL.

    Args:
      model: the MuJoCo model it looks at (`scene_xml`), whose light says if there are shadows.
      name: key of `VIEWS`.
      size_px: side S of its square images.
      shadows: draw them.

    Raises:
      ValueError: this machine has no OpenGL of the kind that MUJOCO_GL asks for.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size_px: int, *, shadows: bool) -> None:
        self._name = name
        try:
            self._renderer = mujoco.Renderer(model, size_px, size_px)
        except (mujoco.FatalError, AttributeError) as error:  # no such driver; GL disabled
            raise ValueError(
                f"renderer 'gl' needs OpenGL, and MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} "
                f"gave none ({error}); try egl or osmesa, or renderer 'ray'"
            ) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows

    def render(self, data: mujoco.MjData) -> Frame:
        """The view of the present state."""
        self._renderer.update_scene(data, camera=self._name)
        image = self._renderer.render()
        self._renderer.enable_segmentation_rendering()
        objects = self._renderer.render()
        self._renderer.disable_segmentation_rendering()
        is_geom = objects[..., 1] == mujoco.mjtObj.mjOBJ_GEOM
        return Frame(image=image, geom_ids=np.where(is_geom, objects[..., 0], -1).astype(np.int32))
