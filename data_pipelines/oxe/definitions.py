"""Definition files: datasets and mixtures as TOML, the built-in ones and a user's alike.

One table per dataset, its fields those of `DatasetSpec`, and one per mixture::

    [datasets.my_arm]
    control_hz = 10.0
    cameras = { front = "observation/front" }
    roles = { primary = "front" }
    action = ["action[0:6]", "action[-1:] | clip | invert"]
    state = ["observation/pose", "zeros(1)", "observation/gripper"]

    [mixtures.mine]
    entries = [["my_arm", 2.0], ["bridge_orig", 1.0]]
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, TypeVar

from data_pipelines.storage import local_path

T = TypeVar("T")
KINDS = ("datasets", "mixtures")


class Lazy(Mapping[str, T]):
    """A mapping that is made when it is first looked into, and kept."""

    def __init__(self, make: Callable[[], Mapping[str, T]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, T]:
        return self._make()

    def __getitem__(self, name: str) -> T:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def read_tables(path: str | os.PathLike[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Reads a definition file.

    Returns:
      The tables of "datasets" and of "mixtures", by name.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a local file, not TOML, or not tables of these two kinds.
    """
    path = local_path(path, "definition file")
    if not path.is_file():
        raise FileNotFoundError(f"no definition file {path}")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not TOML
        raise ValueError(f"{path} is not TOML: {error}") from error
    unknown = [name for name in content if name not in KINDS]
    if unknown:
        raise ValueError(
            f"{path}: unknown table(s) {', '.join(unknown)}; "
            f"expected [datasets.NAME] and [mixtures.NAME]"
        )
    tables = {kind: content.get(kind, {}) for kind in KINDS}
    for kind, entries in tables.items():
        if not isinstance(entries, dict) or not all(isinstance(x, dict) for x in entries.values()):
            raise ValueError(f"{path}: {kind!r} must hold tables, as in [{kind}.NAME]")
    return tables


def closest(name: str, known: Iterable[str]) -> str:
    """What to say about a name that there is not: "did you mean: bridge_orig, bridge_oxe?"."""
    names = sorted(known)
    # Parts of names count, too: "magic_soup" is far from "openvla:oxe_magic_soup" by letters.
    near = [other for other in names if name and name in other]
    near += difflib.get_close_matches(name, names, n=3)
    if near:
        return f"did you mean: {', '.join(dict.fromkeys(near[:6]))}?"
    return f"none of the {len(names)} known has a name like it."
