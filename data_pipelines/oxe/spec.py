"""What a dataset is, as data: where its numbers, frames and words lie, and how they become ours.

Every dataset with end-effector actions ends in one form: an action is [dx dy dz (m), droll dpitch
dyaw (rad), gripper], the gripper absolute, 1 open and 0 closed. Joint-space and navigation sets
keep an action space of their own and name it. A spec is plain values, so that the registry is a
TOML file and a user's own set is another one of the same format.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ROLES = ("primary", "secondary", "wrist")


@dataclass(frozen=True, kw_only=True)
class ReasoningKeys:
    """Where a dataset keeps its reasoning annotations: step features, below "steps/".

    Attributes:
      subtask: text.
      boxes: float32[n, 4], normalised xyxy; a row of NaN is a box that is not visible.
      motion: text.
    """

    subtask: str
    boxes: str
    motion: str


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """One dataset. Feature keys are relative to "steps/", except where said.

    Attributes:
      name: as in dataset_info.json.           aliases: other names it is published under.
      robot, source, location, licence, quirks: for people; `location` is a public address.
      control_hz: steps a second.
      cameras: step feature of each camera, by the camera's name.
      roles: the camera that is the "primary", "secondary" or "wrist" view.
      action, state: terms, joined to the standard vectors (`data_pipelines.oxe.standardize`).
      rows: rules on whole episodes, in order, such as "drop_first".
      language: the term that gives the instruction of each step.
      action_encoding, state_encoding: what the vectors mean, such as "EEF_POS" and "POS_EULER".
      absolute_action: per action dimension, True where it is a position to hold, not a change.
      action_modes, state_modes: how to normalise each dimension (lara_jax.transforms).
      gripper: the raw convention, for people.
      success: flat feature of the episode that says whether it succeeded; empty where none does.
      episode_key: flat features of the episode that identify it, joined by "_" where present.
      reasoning: where annotations lie in the records, None where they hold none.
    """

    name: str
    aliases: tuple[str, ...] = ()
    robot: str = ""
    source: str = ""
    location: str = ""
    licence: str = ""
    quirks: str = ""
    control_hz: float
    cameras: Mapping[str, str]
    roles: Mapping[str, str]
    action: tuple[str, ...]
    state: tuple[str, ...]
    rows: tuple[str, ...] = ()
    language: str = "language_instruction"
    action_encoding: str = "EEF_POS"
    state_encoding: str = "POS_EULER"
    absolute_action: tuple[bool, ...] = (False,) * 6 + (True,)
    action_modes: tuple[str, ...] = ("q99",) * 6 + ("none",)
    state_modes: tuple[str, ...] = ("q99",) * 7 + ("none",)
    gripper: str = ""
    success: str = ""
    episode_key: tuple[str, ...] = ("episode_metadata/file_path", "episode_metadata/episode_id")
    reasoning: ReasoningKeys | None = field(default=None)

    @property
    def action_dim(self) -> int:
        """A, the width of a standard action."""
        return len(self.action_modes)

    @property
    def state_dim(self) -> int:
        """J, the width of a standard state."""
        return len(self.state_modes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DatasetSpec":
        """The inverse of `to_dict`."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"dataset definition has unknown fields {unknown}; known: {known}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        reasoning = plain.get("reasoning")
        if reasoning is not None:
            plain["reasoning"] = ReasoningKeys(**reasoning)
        return cls(**plain)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the standard form of this dataset's steps may change."""
        facts = self.to_dict()
        for prose in ("aliases", "robot", "source", "location", "licence", "quirks", "gripper"):
            facts.pop(prose)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
