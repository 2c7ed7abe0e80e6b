"""What the columns of a LeRobot data set mean: the layouts that we know, and how to say it else.

A LeRobot data set names its columns, but not what their numbers are: whether an action is a change
or a position, and which way the gripper counts. So a data set is read by a `DatasetSpec`, in which
keys are column names: "action[0:6]", "observation.state", and for the words "language_instruction",
the text of the step's task. Two layouts need no definition, those of LaRA-VLA's own data:

    bridge_lara     Bridge V2, embodiment oxe_bridge       libero_lara     LIBERO, libero_franka
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from data_pipelines import storage
from data_pipelines.lerobot import INFO
from data_pipelines.lerobot.meta import BOOKKEEPING, Entry, Metadata
from data_pipelines.oxe.registry import REGISTRY
from data_pipelines.oxe.spec import DatasetSpec

# The instruction of each step; a column of this name takes its place.
INSTRUCTION = "language_instruction"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A known kind of data set.

    Attributes:
      spec: its definition; terms and cameras are filled in from modality.json.
      action, state: names of the entries in modality.json, in our order.
      known_by: words, one of which is in the folder's name or is the robot's.
      without_tasks: instructions, by task_index, whose episodes are left out of the data set that
        numbers them so; others number theirs otherwise.
      numbered_by: that data set's folder, exactly; it has all of these tasks.
    """

    spec: DatasetSpec
    action: tuple[str, ...]
    state: tuple[str, ...]
    known_by: tuple[str, ...]
    without_tasks: frozenset[int] = frozenset()
    numbered_by: str = ""

    def left_out(self, metadata: Metadata) -> frozenset[int]:
        """The tasks whose episodes are left out: none, but of the data set that numbers them so."""
        same = _folder_names(metadata)[0] == self.numbered_by
        return (
            self.without_tasks
            if same and self.without_tasks <= set(metadata.tasks)
            else frozenset()
        )

    def fits(self, metadata: Metadata) -> bool:
        """True if the data set has the entries and the cameras of this layout."""
        modality = metadata.modality
        return (
            modality is not None
            and set(self.action) <= set(modality.action)
            and set(self.state) <= set(modality.state)
            and set(self.spec.cameras.values()) <= set(metadata.cameras)
        )

    def is_named(self, metadata: Metadata) -> bool:
        """True if folder or robot are called like this layout."""
        called = f"{_folder_names(metadata)[0]} {metadata.robot}".lower()
        return any(word in called for word in self.known_by)


_POSE = ("x", "y", "z", "roll", "pitch", "yaw")

# Source of the entries and tasks: the release's data configurations and bridge.yaml.
LAYOUTS: Mapping[str, Layout] = {
    "bridge_lara": Layout(
        spec=REGISTRY["bridge_lara"],
        action=(*_POSE, "gripper"),
        state=(*_POSE, "pad", "gripper"),
        known_by=("bridge", "widowx"),
        without_tasks=frozenset(
            {4, 11, 338, 1176, 3656, 3922, 4446, 4865, 6552, 9814, 11386, 11704, 12032, 12708}
            | {13667, 15039, 16104, 16392, 16914, 17286, 18937}
        ),
        numbered_by="bridge_orig_lerobot",
    ),
    "libero_lara": Layout(
        spec=REGISTRY["libero_lara"],
        action=(*_POSE, "gripper"),
        state=(*_POSE, "pad", "gripper"),
        known_by=("libero",),
    ),
}


def definition(
    metadata: Metadata,
    definitions: Mapping[str, DatasetSpec] | None = None,
    name: str | None = None,
) -> tuple[DatasetSpec, frozenset[int]]:
    """The spec that a data set is read by, and the tasks whose episodes are left out.

    Args:
      metadata: of the data set.
      definitions: a user's datasets.
      name: of one of them or of a layout; None for the definition that is called like the folder,
        or else the layout that is recognised.

    Raises:
      ValueError: there is no such definition, the data set is not of that layout or of none that is
        known, lacks a camera, or runs at another rate than the definition says.
    """
    known = {alias: spec for spec in (definitions or {}).values() for alias in spec.aliases}
    known |= {spec.name: spec for spec in (definitions or {}).values()}
    wanted = name or next((n for n in _folder_names(metadata) if n in known), None)
    if wanted in known:
        return _checked(metadata, known[wanted]), frozenset()
    layout = _layout(metadata, wanted, tuple(known))
    modality = metadata.modality
    if modality is None:
        raise ValueError(f"{metadata.root} has no meta/modality.json, which layouts need")
    spec = replace(
        layout.spec,
        action=tuple(_term(modality.action[name]) for name in layout.action),
        state=tuple(_term(modality.state[name]) for name in layout.state),
    )
    return _checked(metadata, spec), layout.left_out(metadata)


def _folder_names(metadata: Metadata) -> tuple[str, str]:
    """The folder's name, and as it may stand in a TOML table's name without quotes."""
    name = storage.absolute(metadata.root).rpartition("/")[2]
    return name, re.sub(r"\W+", "_", name)


def _layout(metadata: Metadata, name: str | None, others: Sequence[str]) -> Layout:
    """The layout of this name, or the one that the data set shows."""
    known = {alias: lay for lay in LAYOUTS.values() for alias in (lay.spec.name, *lay.spec.aliases)}
    if name is not None:
        if name not in known:
            raise ValueError(
                f"no definition or LeRobot layout {name!r}; known: {', '.join((*others, *known))}"
            )
        if not known[name].fits(metadata):
            raise ValueError(
                f"{metadata.root} is no {name}: that has the cameras "
                f"{', '.join(known[name].spec.cameras.values())} and a meta/modality.json with the "
                f"state {', '.join(known[name].state)} and action {', '.join(known[name].action)}"
            )
        return known[name]
    fitting = [layout for layout in LAYOUTS.values() if layout.fits(metadata)]
    for layout in fitting:
        if layout.is_named(metadata):
            return layout
    hint = ""
    if fitting:
        hint = (
            f". It looks like {fitting[0].spec.name}: if it is, let the folder's name contain "
            f"{fitting[0].known_by[0]!r}"
        )
    raise ValueError(
        f"{metadata.root}: what its columns mean is not known; write a definition file (TOML, "
        f"--definitions FILE): {_draft(metadata)}{hint}"
    )


def _draft(metadata: Metadata) -> str:
    """A definition in one line of TOML, to be completed."""
    name = _folder_names(metadata)[1]
    vectors = {
        key: f"{prod(feature.shape)} wide" + "".join(f" {entry}" for entry in feature.names)
        for key, feature in metadata.features.items()
        if key not in BOOKKEEPING and key not in metadata.cameras and feature.dtype != "string"
    }
    cameras = ", ".join(f'{key.rpartition(".")[2]} = "{key}"' for key in metadata.cameras)
    first = metadata.cameras[0].rpartition(".")[2] if metadata.cameras else ""
    columns = ", ".join(f"{key} ({what})" for key, what in vectors.items())
    return (
        f"[datasets.{name}] with control_hz = {metadata.fps:g}, cameras = {{ {cameras} }}, "
        f'roles = {{ primary = "{first}" }}, action_encoding and state_encoding, '
        f"action and state as lists of terms of these columns: {columns}"
    )


def _term(entry: Entry) -> str:
    return f"{entry.column}[{entry.start}:{entry.end}]"


def _checked(metadata: Metadata, spec: DatasetSpec) -> DatasetSpec:
    """The spec with the data set's own rate, if it is one that the data set can be read by."""
    if spec.reasoning:
        raise ValueError(
            f"the definition of {spec.name!r} names reasoning features; in a LeRobot data set "
            f"they come from annotation files"
        )
    missing = sorted(set(spec.cameras.values()) - set(metadata.cameras))
    if missing:
        raise ValueError(
            f"{metadata.root} has no camera {', '.join(missing)}; it has: "
            f"{', '.join(metadata.cameras)}"
        )
    stride = prod(int(rule[6:-1]) for rule in spec.rows if rule.startswith("every("))
    hz = metadata.fps / stride
    if spec.control_hz and abs(spec.control_hz - hz) > 1e-3 * hz:
        raise ValueError(
            f"{storage.join(metadata.root, INFO)}: {metadata.fps:g} steps a second; the definition "
            f"of {spec.name!r} says control_hz = {spec.control_hz:g}, expected {hz:g}"
        )
    return replace(spec, control_hz=hz)
