"""Why a row may be left out: flags, set for all rows when an index is made, counted, and chosen
from when a loader starts.

    pause           the robot does nothing (see `pauses`)
    no_language     the instruction is empty
    no_annotation   there is neither subtask nor box nor motion text
    failed          the dataset says that the episode did not succeed
    bad_frame       a frame of the row or of its next step does not decode (`--decode-frames`)

No row is dropped from the index itself: `Header.counts["flag:pause"]` and its like say how many
rows a filter would drop.
"""

import numpy as np

from data_pipelines.index.format import FLAGS, EpisodeEntry
from data_pipelines.oxe.spec import DatasetSpec

PAUSE_METRES = 5e-4


def row_flags(spec: DatasetSpec, entry: EpisodeEntry) -> np.ndarray:
    """The flags of an episode's rows, all but those of bad frames: uint8[N]."""
    annotated = entry.annotations or [None] * len(entry.actions)
    failed = entry.success is not None and not entry.success
    flags = np.zeros(len(entry.actions), np.uint8)
    flags[pauses(spec, entry.actions)] |= FLAGS["pause"]
    flags[[not text.strip() for text in entry.instructions]] |= FLAGS["no_language"]
    flags[[annotation is None for annotation in annotated]] |= FLAGS["no_annotation"]
    flags |= np.uint8(FLAGS["failed"] * failed)
    return flags


def pauses(spec: DatasetSpec, actions: np.ndarray) -> np.ndarray:
    """Rows in which the robot is told to do nothing.

    An end-effector action is a pause if no component of its translation exceeds 0.5 mm and the
    gripper is as in the row before. In other action spaces, whose units differ, it is one if the
    norm of all changes is at most 5e-4 and no position to hold is another one than in the row
    before. The first row has no row before: only its changes count, and where an action consists of
    positions alone it is no pause.

    Args:
      spec: the dataset; `absolute_action` tells positions to hold from changes.
      actions: float32[N, A], in the data's units.

    Returns:
      bool[N].

    Source: the LaRA-VLA release (93b5c03), `delete_pause_frame`, for the end-effector rule.
    """
    absolute = np.array(spec.absolute_action, bool)
    same = np.ones(len(actions), bool)
    same[:1] = not absolute.all()
    same[1:] = (actions[1:, absolute] == actions[:-1, absolute]).all(axis=1)
    if spec.action_encoding == "EEF_POS":
        return same & (np.abs(actions[:, :3]) <= PAUSE_METRES).all(axis=1)
    return same & (np.linalg.norm(actions[:, ~absolute], axis=1) <= PAUSE_METRES)


def bad_rows(bad: np.ndarray, frame: np.ndarray, next_frame: np.ndarray) -> np.ndarray:
    """Flags of the rows that need a broken frame.

    Args:
      bad: bool[T], stored steps of which a camera's frame is broken.
      frame, next_frame: int[N], the stored steps that each row needs.

    Returns:
      uint8[N].
    """
    return np.where(bad[frame] | bad[next_frame], FLAGS["bad_frame"], 0).astype(np.uint8)
