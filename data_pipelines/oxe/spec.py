"""What a dataset is, as data: where its numbers, frames and words lie, and how they become ours.

Every dataset with end-effector actions ends in one form: an action is [dx dy dz (m), droll dpitch
dyaw (rad), gripper], the gripper absolute, 1 open and 0 closed. Joint-space and navigation sets
keep an action space of their own and name it. A spec is plain values, so that the registry is a
TOML file and a user's own set is another one of the same format.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, get_args, get_origin

from data_pipelines.oxe.rules import parse_rule
from data_pipelines.oxe.terms import parse, parse_language
from lara_jax.transforms import MODES

ROLES = ("primary", "secondary", "wrist")
# What the dimensions mean, in order. The pad and the gripper of a state are there where its terms
# give them; the gripper is last.
ACTION_ENCODINGS: Mapping[str, str] = {
    "EEF_POS": "change of position (3), change of roll pitch yaw (3), gripper",
    "EEF_R6": "change of position (3), rotation as two rows of its matrix (6), gripper",
    "JOINT_POS": "change of each joint, gripper",
    "JOINT_POS_BIMANUAL": "left joints (6), left gripper, right joints (6), right gripper",
    "JOINT_POS_BIMANUAL_NAV": "as JOINT_POS_BIMANUAL, then linear and angular base velocity",
    "NAV_2D": "way ahead and to the left",
}
STATE_ENCODINGS: Mapping[str, str] = {
    "NONE": "nothing, zeros",
    "POS_EULER": "position (3), roll pitch yaw (3), pad, gripper",
    "POS_QUAT": "position (3), quaternion (4), gripper",
    "JOINT": "joints (up to 7), pads, gripper",
    "JOINT_BIMANUAL": "left joints (6), left gripper, right joints (6), right gripper",
    "POS_NAV": "position (2), yaw",
}


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
      folders: more names that its folder may have, which other datasets may have as names, too.
      robot, source, location, licence, quirks: for people; `location` is a public address.
      control_hz: rows a second, after `rows` thinned them out; 0 where nobody says.
      cameras: step feature of each camera, by the camera's name.
      roles: the camera that is the "primary", "secondary" or "wrist" view.
      action, state: terms, joined to the standard vectors (`data_pipelines.oxe.standardize`).
      rows: rules on whole episodes, in order, such as "drop_first" (`data_pipelines.oxe.rules`).
      language: the term that gives the instruction of each step; empty where there is none.
      action_encoding, state_encoding: what the vectors mean, of ACTION_ENCODINGS and
        STATE_ENCODINGS.
      absolute_action: per action dimension, True where it is a position to hold, not a change.
      action_modes, state_modes: how to normalise each dimension (lara_jax.transforms): one for
        each column that the terms and rules give.
      gripper: the raw convention, for people.
      success: flat feature of the episode that says whether it succeeded; empty where none does.
      episode_key: flat features of the episode that identify it, joined by "_" where present.
      reasoning: where annotations lie in the records, None where they hold none.
    """

    name: str
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
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
    state_modes: tuple[str, ...] = ("q99",) * 8
    gripper: str = ""
    success: str = ""
    episode_key: tuple[str, ...] = ("episode_metadata/file_path", "episode_metadata/episode_id")
    reasoning: ReasoningKeys | None = field(default=None)

    def __post_init__(self) -> None:
        if type(self.control_hz) is int:  # 5 and 5.0 are one fingerprint
            object.__setattr__(self, "control_hz", float(self.control_hz))
        self._check_types()
        if not 0 <= self.control_hz < math.inf:
            raise self._error(f"control_hz is {self.control_hz!r}; it must be finite, at least 0")
        for role, camera in self.roles.items():
            self._check_known("role", [role], ROLES)
            self._check_known(f"camera of role {role!r}:", [camera], self.cameras)
        self._check_known("action encoding", [self.action_encoding], ACTION_ENCODINGS)
        self._check_known("state encoding", [self.state_encoding], STATE_ENCODINGS)
        self._check_known("mode", (*self.action_modes, *self.state_modes), MODES)
        if len(self.absolute_action) != self.action_dim:
            raise self._error(
                f"absolute_action has {len(self.absolute_action)} dimensions, "
                f"action_modes {self.action_dim}"
            )
        if self.action_encoding == "EEF_POS" and self.action_dim != 7:
            raise self._error(f"an EEF_POS action has 7 dimensions, not {self.action_dim}")
        try:
            terms = [parse(term) for term in (*self.action, *self.state)]
            for rule in self.rows:
                parse_rule(rule)
            if self.language:
                parse_language(self.language)
        except ValueError as error:
            raise self._error(str(error)) from error
        if not self.state or not any(term.feature for term in terms[: len(self.action)]):
            raise self._error("the action must read a feature, the state have a term (zeros(n))")
        columns = [term.columns for term in terms[len(self.action) :]]
        width = sum(count or 0 for count in columns)
        if None not in columns and width != self.state_dim:
            raise self._error(
                f"the state's terms give {width} columns, state_modes names {self.state_dim} "
                f"(the default, where it is left out, is 8 times q99)"
            )

    def _error(self, message: str) -> ValueError:
        return ValueError(f"dataset {self.name!r}: {message}")

    def _check_known(self, what: str, given: Iterable[str], known: Iterable[str]) -> None:
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise self._error(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")

    def _check_types(self) -> None:
        """Refuses values of another type: "action" where a list of terms belongs, say."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not _is_of(value, entry.type):
                kind = getattr(entry.type, "__name__", "") if entry.type in (str, float) else ""
                raise self._error(f"{entry.name} is {value!r}, not a {kind or entry.type}")

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
        _check_fields(cls, values, f"dataset {values.get('name', '')!r}")
        plain: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        if isinstance(plain.get("reasoning"), Mapping):
            _check_fields(
                ReasoningKeys, plain["reasoning"], f"dataset {plain['name']!r}, reasoning"
            )
            plain["reasoning"] = ReasoningKeys(**plain["reasoning"])
        return cls(**plain)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the standard form of this dataset's steps may change."""
        facts = self.to_dict()
        names, prose = ("name", "aliases", "folders"), ("robot", "source", "location", "licence")
        for field_name in (*names, *prose, "quirks", "gripper"):
            facts.pop(field_name)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a field's value is of its type: str, tuple[str, ...], Mapping[str, str] and such."""
    container, items = get_origin(kind), get_args(kind)
    if container is tuple:
        return isinstance(value, tuple) and all(isinstance(item, items[0]) for item in value)
    if container is Mapping:
        return isinstance(value, Mapping) and all(isinstance(x, str) for x in value.values())
    return isinstance(value, kind)


def _check_fields(cls: type, values: Mapping[str, Any], what: str) -> None:
    """Refuses a definition with fields that there are not, or without those there must be."""
    known = {entry.name: entry.default is MISSING for entry in fields(cls)}
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(
            f"{what}: unknown field(s) {', '.join(unknown)}; known: {', '.join(known)}"
        )
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise ValueError(f"{what}: field(s) {', '.join(missing)} missing")
