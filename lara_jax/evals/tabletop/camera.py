"""Images by MuJoCo's ray casts: one ray a pixel, Lambert shading, shadows of one point light.

`mujoco.mj_multiRay` runs on the CPU and needs no OpenGL, no driver and no display. The geom that a
ray hits is at the same time an exact instance segmentation, hence exact boxes.
"""

from dataclasses import dataclass

import mujoco
import numpy as np

FIELD_OF_VIEW_DEG = 36.0
CAMERA_POSITION_M = (-0.50, 0.0, 0.62)
LOOK_AT_M = (0.02, 0.0, 0.05)
LIGHT_POSITION_M = (-0.3, 0.4, 1.4)
SKY = (0.75, 0.82, 0.90)
AMBIENT, DIFFUSE, IN_SHADOW = 0.45, 0.60, 0.35
CHECKS_PER_METRE, CHECK_CONTRAST = 12, 0.07  # a faint check on the table shows where things stand
FARTHEST_M = 10.0
SHADOW_TOLERANCE_M = 2e-3  # a surface must not shadow itself


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One rendered view.

    Attributes:
      image: uint8[S, S, 3], RGB.
      geom_ids: int32[S, S], the geom each pixel shows, -1 for the sky.
    """

    image: np.ndarray
    geom_ids: np.ndarray


def _pixel_rays(size_px: int) -> np.ndarray:
    """Directions float64[S*S, 3] of the rays through the pixel centres, rows from the top left."""
    forward = np.subtract(LOOK_AT_M, CAMERA_POSITION_M)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right = right / np.linalg.norm(right)
    up = np.cross(right, forward)
    offsets = (np.arange(size_px) + 0.5) / size_px * 2 - 1
    offsets = offsets * np.tan(np.radians(FIELD_OF_VIEW_DEG) / 2)
    columns, rows = np.meshgrid(offsets, -offsets)
    rays = forward + columns[..., None] * right + rows[..., None] * up
    return np.ascontiguousarray(
        (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)
    )


class RayCamera:
    """A fixed camera over the robot's shoulder: left is the robot's left, far is forward.

    Args:
      model: the MuJoCo model it looks at.
      size_px: side S of its square images.
      shadows: cast shadow rays.
    """

    def __init__(self, model: mujoco.MjModel, size_px: int, *, shadows: bool) -> None:
        self._model = model
        self._size_px = size_px
        self._shadows = shadows
        self._rays = _pixel_rays(size_px)
        self._table = model.geom("table").id

    def render(self, data: mujoco.MjData) -> Frame:
        """The view of the present state."""
        origin = np.array(CAMERA_POSITION_M)
        geom_ids, distance, normals = self._cast(data, origin, self._rays)
        hit = geom_ids >= 0
        points = origin + self._rays * distance[:, None]
        colour = self._model.geom_rgba[np.where(hit, geom_ids, 0), :3].astype(np.float64)
        squares = np.floor(points[:, :2] * CHECKS_PER_METRE).sum(axis=1) % 2
        check = np.where(geom_ids == self._table, 1 - CHECK_CONTRAST * squares, 1.0)
        shade = AMBIENT + DIFFUSE * self._light(data, points, normals)
        image = np.where(hit[:, None], colour * (check * shade)[:, None], SKY)
        side = self._size_px
        return Frame(
            image=(np.clip(image, 0, 1) * 255).astype(np.uint8).reshape(side, side, 3),
            geom_ids=geom_ids.reshape(side, side),
        )

    def _light(self, data: mujoco.MjData, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """Light that reaches each point, float64[S*S] in [0, 1]."""
        light = np.array(LIGHT_POSITION_M)
        away = points - light
        reach = np.linalg.norm(away, axis=1)
        away = away / reach[:, None]
        received = np.clip(-(normals * away).sum(axis=1), 0, 1)
        if self._shadows:
            _, first_hit, _ = self._cast(data, light, away)
            received *= np.where(first_hit > reach - SHADOW_TOLERANCE_M, 1.0, IN_SHADOW)
        return received

    def _cast(
        self, data: mujoco.MjData, origin: np.ndarray, rays: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First hits of rays from one origin.

        Returns:
          Geom ids int32[N] (-1: none), distances float64[N] in m, normals float64[N, 3].
        """
        count = len(rays)
        geom_ids = np.empty(count, np.int32)
        distance = np.empty(count)
        normals = np.zeros(3 * count)
        all_groups, static, no_body = None, True, -1
        mujoco.mj_multiRay(
            self._model,
            data,
            origin,
            rays.ravel(),
            all_groups,
            static,
            no_body,
            geom_ids,
            distance,
            normals,
            count,
            FARTHEST_M,
        )
        return geom_ids, distance, normals.reshape(-1, 3)


def visible_box(geom_ids: np.ndarray, geom_id: int) -> np.ndarray:
    """Bounding box of one geom in a segmentation.

    Args:
      geom_ids: int32[S, S].
      geom_id: the geom to look for.

    Returns:
      float32[4], x1 y1 x2 y2 as fractions of the image in [0, 1]; NaN where the geom is hidden.
    """
    rows, columns = np.nonzero(geom_ids == geom_id)
    if not len(rows):
        return np.full(4, np.nan, np.float32)
    height, width = geom_ids.shape
    return np.array(
        [
            columns.min() / width,
            rows.min() / height,
            (columns.max() + 1) / width,
            (rows.max() + 1) / height,
        ],
        np.float32,
    )
