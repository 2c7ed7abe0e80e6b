"""Images by MuJoCo's ray casts: one ray a pixel, Lambert shading, shadows of one point light.

`mujoco.mj_multiRay` runs on the CPU and needs no OpenGL, no driver and no display. The geom that a
ray hits is at the same time an exact instance segmentation, hence exact boxes.

Most of a fixed camera's picture does not change: table, floor and plates are cast once an episode,
and a frame casts only

- the pixels inside the rectangles that the moving geoms (gripper, blocks) span in the image, and
- the shadows of the points inside the rectangles that they span as seen from the light.

Elsewhere a ray misses every moving geom, so it is known already. The picture is the same, bit for
bit, as `RayCamera.render_plainly` gives.
"""

from dataclasses import dataclass
from itertools import product

import mujoco
import numpy as np

from lara_jax.evals.tabletop.scene import LIGHT_POSITION_M, MOVING_GROUP, VIEWS

SKY = (0.75, 0.82, 0.90)
AMBIENT, DIFFUSE, IN_SHADOW = 0.45, 0.60, 0.35
CHECKS_PER_METRE, CHECK_CONTRAST = 12, 0.07  # a faint check on the table shows where things stand
FARTHEST_M = 10.0
SHADOW_TOLERANCE_M = 2e-3  # a surface must not shadow itself
SLACK = 1e-6  # for rounding, in tangents
NEAREST_M = 0.02  # what is nearer to the eye, or behind it, may be anywhere in the image

_LIGHT = np.array(LIGHT_POSITION_M)
_STATIC_ONLY = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # geom groups


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One rendered view.

    Attributes:
      image: uint8[S, S, 3], RGB.
      geom_ids: int32[S, S], the geom each pixel shows, -1 for the sky.
    """

    image: np.ndarray
    geom_ids: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What N rays hit, and how the light shines on it.

    `geom_ids` int32[N]; `colour` float64[N, 3] and `check` float64[N], of its surface; `received`
    float64[N], light in [0, 1] if nothing is in between; `away` float64[N, 3] and `reach`
    float64[N], direction and distance from the light; `on_top` bool[N], the top of the table.
    """

    geom_ids: np.ndarray
    colour: np.ndarray
    check: np.ndarray
    received: np.ndarray
    away: np.ndarray
    reach: np.ndarray
    on_top: np.ndarray

    def image(self, blocked: np.ndarray) -> np.ndarray:
        """uint8[N, 3], where bool[N] says what the light does not reach."""
        received = np.where(blocked, self.received * IN_SHADOW, self.received)
        image = self.colour * (self.check * (AMBIENT + DIFFUSE * received))[:, None]
        image[self.geom_ids < 0] = SKY
        np.minimum(image, 1, out=image)
        image *= 255
        return image.astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class _Background:
    """A fixed camera's picture without the moving geoms.

    Attributes:
      plates: where the plates lie, as bytes.
      seen: what the rays hit.
      image: uint8[N, 3], under the shadows of what does not move; `bright`, `dark`: under none, and
        all in shadow.
      from_light: float64[2, N], where each point lies as seen from the light; NaN for the sky.
    """

    plates: bytes
    seen: _Seen
    image: np.ndarray
    bright: np.ndarray
    dark: np.ndarray
    from_light: np.ndarray


class _Boxes:
    """The boxes around some geoms of a model."""

    def __init__(self, model: mujoco.MjModel, geoms: np.ndarray) -> None:
        self._geoms = geoms
        signs = np.array(list(product((-1, 1), repeat=3)))
        self._corners = model.geom_aabb[geoms, None, :3] + signs * model.geom_aabb[geoms, None, 3:]

    def corners(self, data: mujoco.MjData) -> np.ndarray:
        """Where their corners are, float64[G, 8, 3]."""
        turns = data.geom_xmat[self._geoms].reshape(-1, 3, 3).transpose(0, 2, 1)
        return data.geom_xpos[self._geoms, None] + self._corners @ turns


class RayCamera:
    """A camera that casts rays.

    Args:
      model: the MuJoCo model it looks at (`scene_xml`).
      name: key of `VIEWS`.
      size_px: side S of its square images.
      shadows: cast shadow rays.
    """

    def __init__(self, model: mujoco.MjModel, name: str, size_px: int, *, shadows: bool) -> None:
        self._model = model
        self._view = VIEWS[name]
        self._body = model.body(self._view.body).id
        self._size_px = size_px
        self._shadows = shadows
        self._axes = self._view.axes
        self._extent = np.tan(np.radians(self._view.field_of_view_deg) / 2)
        self._rays = self._pixel_rays()
        self._table = model.geom("table").id
        self._colours = model.geom_rgba[:, :3].astype(np.float64)
        self._moving = _Boxes(model, np.flatnonzero(model.geom_group == MOVING_GROUP))
        grounds = [self._table, model.geom("floor").id]
        self._casters = _Boxes(model, np.setdiff1d(np.arange(model.ngeom), grounds))
        self._background: _Background | None = None

    def render(self, data: mujoco.MjData) -> Frame:
        """The view of the present state."""
        if self._view.body != "world":
            return self._render(data, plainly=False)
        background = self._background
        plates = data.mocap_pos.tobytes()
        if background is None or background.plates != plates:
            background = self._background = self._see_background(data, plates)
        image, geom_ids = background.image.copy(), background.seen.geom_ids.copy()
        corners = self._moving.corners(data)
        near = self._near_in_image(corners)
        if self._shadows:
            shaded = np.flatnonzero(~near & _near_in_light(corners, background.from_light))
            away, reach = background.seen.away[shaded], background.seen.reach[shaded]
            blocked = self._blocked(data, away, reach)[:, None]
            image[shaded] = np.where(blocked, background.dark[shaded], background.bright[shaded])
        pixels = np.flatnonzero(near)
        seen = self._see(data, np.array(self._view.position_m), self._rays[pixels])
        geom_ids[pixels] = seen.geom_ids
        image[pixels] = seen.image(self._shadow(data, seen))
        return self._frame(image, geom_ids)

    def render_plainly(self, data: mujoco.MjData) -> Frame:
        """The same with a ray and a shadow ray for every pixel."""
        return self._render(data, plainly=True)

    def _render(self, data: mujoco.MjData, *, plainly: bool) -> Frame:
        turn = data.xmat[self._body].reshape(3, 3)
        origin = data.xpos[self._body] + turn @ self._view.position_m
        rays = self._rays if self._view.body == "world" else self._rays @ turn.T
        seen = self._see(data, origin, rays)
        blocked = (
            self._blocked(data, seen.away, seen.reach) if plainly else self._shadow(data, seen)
        )
        return self._frame(seen.image(blocked), seen.geom_ids)

    def _frame(self, image: np.ndarray, geom_ids: np.ndarray) -> Frame:
        side = self._size_px
        return Frame(image=image.reshape(side, side, 3), geom_ids=geom_ids.reshape(side, side))

    def _pixel_rays(self) -> np.ndarray:
        """Rays float64[S*S, 3] through the pixel centres, rows from the top left, in its body."""
        forward, right, up = self._axes
        offsets = (np.arange(self._size_px) + 0.5) / self._size_px * 2 - 1
        columns, rows = np.meshgrid(offsets * self._extent, -offsets * self._extent)
        rays = forward + columns[..., None] * right + rows[..., None] * up
        return (rays / np.linalg.norm(rays, axis=-1, keepdims=True)).reshape(-1, 3)

    def _see_background(self, data: mujoco.MjData, plates: bytes) -> _Background:
        seen = self._see(data, np.array(self._view.position_m), self._rays, _STATIC_ONLY)
        from_light = _from_light(seen.away)
        from_light[:, seen.geom_ids < 0] = np.nan
        everything = np.ones(len(self._rays), bool)
        return _Background(
            plates=plates,
            seen=seen,
            image=seen.image(self._blocked(data, seen.away, seen.reach, _STATIC_ONLY)),
            bright=seen.image(~everything),
            dark=seen.image(everything),
            from_light=from_light,
        )

    def _see(
        self,
        data: mujoco.MjData,
        origin: np.ndarray,
        rays: np.ndarray,
        groups: np.ndarray | None = None,
    ) -> _Seen:
        """What N rays from one origin see, of the geom groups (None: of all)."""
        geom_ids, distance, normals = self._cast(data, origin, rays, groups)
        points = origin + rays * distance[:, None]
        away = points - _LIGHT
        reach = np.sqrt(_dot(away, away))
        away /= reach[:, None]
        squares = np.floor(points[:, :2] * CHECKS_PER_METRE)
        check = 1 - CHECK_CONTRAST * ((squares[:, 0] + squares[:, 1]) % 2)
        on_table = geom_ids == self._table
        check[~on_table] = 1.0
        return _Seen(
            geom_ids=geom_ids,
            colour=self._colours[geom_ids],  # for the sky, -1, any: it has its own
            check=check,
            received=np.clip(-_dot(normals, away), 0, 1),
            away=away,
            reach=reach,
            on_top=on_table & (normals[:, 2] > 0.5),
        )

    def _shadow(self, data: mujoco.MjData, seen: _Seen) -> np.ndarray:
        """bool[N]: where the light is blocked.

        The sky, and what faces away from the light, need no ray. Nothing is above the table's top
        but the casters of shadows, so neither do points of it that are in no caster's rectangle.
        """
        blocked = np.zeros(len(seen.reach), bool)
        if self._shadows:
            corners = self._casters.corners(data)
            top = np.flatnonzero(seen.on_top)
            doubtful = (seen.geom_ids >= 0) & (seen.received > 0)
            doubtful[top] &= _near_in_light(corners, _from_light(seen.away[top]))
            points = np.flatnonzero(doubtful)
            blocked[points] = self._blocked(data, seen.away[points], seen.reach[points])
        return blocked

    def _blocked(
        self,
        data: mujoco.MjData,
        away: np.ndarray,
        reach: np.ndarray,
        groups: np.ndarray | None = None,
    ) -> np.ndarray:
        """bool[N]: where something stands between the light and the point it would reach."""
        if not self._shadows or not len(away):
            return np.zeros(len(away), bool)
        _, first_hit, _ = self._cast(data, _LIGHT, away, groups)
        return first_hit <= reach - SHADOW_TOLERANCE_M

    def _cast(
        self,
        data: mujoco.MjData,
        origin: np.ndarray,
        rays: np.ndarray,
        groups: np.ndarray | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First hits of rays from one origin.

        Returns:
          Geom ids int32[N] (-1: none), distances float64[N] in m, normals float64[N, 3].
        """
        count = len(rays)
        geom_ids = np.empty(count, np.int32)
        distance = np.empty(count)
        normals = np.zeros(3 * count)
        static, no_body = True, -1
        mujoco.mj_multiRay(
            self._model,
            data,
            origin,
            rays.ravel(),
            groups,
            static,
            no_body,
            geom_ids,
            distance,
            normals,
            count,
            FARTHEST_M,
        )
        return geom_ids, distance, normals.reshape(-1, 3)

    def _near_in_image(self, corners: np.ndarray) -> np.ndarray:
        """bool[S*S]: the pixels that may show a moving geom."""
        side = self._size_px
        near = np.zeros((side, side), bool)
        corners = corners - np.array(self._view.position_m)
        depth, across, upward = (_dot(corners, axis) for axis in self._axes)
        if depth.min() < NEAREST_M:
            return ~near.ravel()
        columns = (across / depth / self._extent + 1) / 2 * side - 0.5
        rows = (1 - upward / depth / self._extent) / 2 * side - 0.5
        for column, row in zip(columns, rows, strict=True):
            left, top = (max(0, int(np.floor(edge.min()))) for edge in (column, row))
            right, bottom = (max(0, int(np.ceil(edge.max())) + 1) for edge in (column, row))
            near[top:bottom, left:right] = True
        return near.ravel()


def _from_light(away: np.ndarray) -> np.ndarray:
    """Where points lie as seen from the light, float64[2, ...], by direction float64[..., 3]."""
    return np.stack([away[..., 0], away[..., 1]]) / -away[..., 2]


def _near_in_light(corners: np.ndarray, from_light: np.ndarray) -> np.ndarray:
    """bool[N]: the points, as the light sees them, that may lie in the shadow of these boxes."""
    away = corners - _LIGHT
    if -away[..., 2].max() < NEAREST_M:
        return ~np.isnan(from_light[0])
    boxes = _from_light(away)  # [2, G, 8]
    low, high = boxes.min(axis=2) - SLACK, boxes.max(axis=2) + SLACK
    inside = (from_light[:, None] > low[..., None]) & (from_light[:, None] < high[..., None])
    return inside.all(axis=0).any(axis=0)


def _dot(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Product of vectors along the last axis, of length 3."""
    return one[..., 0] * other[..., 0] + one[..., 1] * other[..., 1] + one[..., 2] * other[..., 2]


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
