"""An episode as annotation sees it: words, the gripper's path, and images if they are asked for."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data_pipelines.index.format import Index
from data_pipelines.oxe.spec import DatasetSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeView:
    """One episode of N rows. `EpisodeView.from_index` makes one.

    Attributes:
      key, number, dataset, split: identify it (see `readers.EpisodeName`); the key is empty where
        other episodes have the same.
      where: names it in messages.
      control_hz: rows a second.
      frame: int[N], the stored step of each row.
      stored_steps: how many there are.
      instructions: N strings.
      positions: float64[N, 3], m, of the gripper; None where the data do not tell.
      turns: float64[N, 3], rad, the rotation of each row's action about x, y, z; None likewise.
      gripper: float64[N], command, 1 open and 0 closed; None where there is not just one gripper.
      image: gives a row's image of the primary camera, uint8[H, W, 3], RGB.
      fingerprint: changes when any of this does.
    """

    key: str
    number: int
    dataset: str
    split: str
    where: str
    control_hz: float
    frame: np.ndarray
    stored_steps: int
    instructions: tuple[str, ...]
    positions: np.ndarray | None
    turns: np.ndarray | None
    gripper: np.ndarray | None
    image: Callable[[int], np.ndarray]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.frame)

    @classmethod
    def from_index(cls, index: Index, number: int) -> "EpisodeView":
        """An episode by its number; images are read when they are asked for.

        Args:
          index: of its split.
          number: of the episode: EPISODE.number, not its place in the index.

        Raises:
          ValueError: the index has no episode of this number.
        """
        if not has_episode(index, number):
            raise ValueError(f"{index.folder} has no episode of number {number}")
        at = int(np.searchsorted(index.episodes["number"], number))
        episode = index.episodes[at]
        first, rows = int(episode["first_row"]), int(episode["rows"])
        first_frame = int(episode["first_frame"])
        span = slice(first, first + rows)
        frame = index.rows["frame"][span].astype(np.int64)
        camera = primary_camera(index)

        def image(row: int) -> np.ndarray:
            # Only models look at images.
            from data_pipelines.frames import FrameReader

            if camera is None:
                raise ValueError(f"{index.source}: no camera; boxes and models need images")
            return FrameReader(index).image(camera, first_frame + int(frame[row]))

        shared = int(np.count_nonzero(index.episodes["key"] == episode["key"])) > 1
        instructions = tuple(index.instruction(row) for row in range(first, first + rows))
        path = _gripper_path(index.spec, index.actions[span], index.states[span])
        digest = hashlib.sha256(repr((index.spec.control_hz, instructions)).encode())
        for array in (frame, *path):
            digest.update(b"-" if array is None else array.tobytes())
        if camera is not None:
            digest.update(_frames_content(index, camera, first_frame, int(episode["frames"])))
        return cls(
            key="" if shared else index.key(at),
            number=number,
            dataset=index.header.own_name,
            split=index.header.split,
            where=f"{index.source}, split {index.header.split}, episode {number}",
            control_hz=index.spec.control_hz,
            frame=frame,
            stored_steps=int(episode["frames"]),
            instructions=instructions,
            positions=path[0],
            turns=path[1],
            gripper=path[2],
            image=image,
            fingerprint=digest.hexdigest(),
        )


def has_episode(index: Index, number: int) -> bool:
    """True if the index has an episode of this number."""
    return number in index.episodes["number"]


def primary_camera(index: Index) -> str | None:
    """The camera whose images are annotated: the primary one, else the first, else None."""
    cameras = tuple(index.header.cameras)
    primary = index.spec.roles.get("primary")
    return primary if primary in cameras else next(iter(cameras), None)


def _gripper_path(
    spec: DatasetSpec, actions: np.ndarray, states: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Positions, turns and gripper command, each None where the standard vectors have it not.

    Positions come from the states, which say where the gripper was; where they do not, from the
    actions, added up.
    """
    moves = spec.action_encoding == "EEF_POS" and not any(spec.absolute_action[:6])
    actions = actions.astype(np.float64)
    positions = None
    if spec.state_encoding in ("POS_EULER", "POS_QUAT"):
        positions = states[:, :3].astype(np.float64)
    elif moves:
        positions = np.cumsum(actions[:, :3], axis=0) - actions[:, :3]
    has_gripper = spec.action_encoding in ("EEF_POS", "JOINT_POS")
    return (
        positions,
        actions[:, 3:6] if moves else None,
        actions[:, -1] if has_gripper else None,
    )


def _frames_content(index: Index, camera: str, first: int, count: int) -> bytes:
    """What the frames' pixels depend on: of encoded frames the bytes' checksums, else the place."""
    frames = index.frames[camera][first : first + count]
    if index.header.cameras[camera].kind == "encoded":
        return frames["crc"].tobytes()
    files = [index.header.files[file] for file in np.unique(frames["file"])]
    return frames.tobytes() + repr(files).encode()
