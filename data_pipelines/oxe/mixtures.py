"""Mixtures: named sets of datasets with their weights, those of OpenVLA, Octo and LaRA-VLA as data.

A mixture is named "owner:name", such as "openvla:oxe_magic_soup"; the definitions are in
mixtures.toml beside this file, and users add their own (`registry.load_definitions`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.oxe.definitions import Lazy, closest, read_tables

Entry = tuple[str, float]


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Datasets and how strongly each is drawn.

    Given ("a", 2.0), ("b", 1.0), ("a", 1.0), the entries are ("a", 2.0), ("b", 1.0) and the dropped
    duplicate is ("a", 1.0).

    Attributes:
      name: such as "openvla:rtx".
      source: where its weights come from.
      entries: (dataset's name, weight above 0), each dataset once.
      dropped_duplicates: entries given for a dataset that was there already: the first wins, as in
        OpenVLA's loader.
    """

    name: str
    source: str = ""
    entries: tuple[Entry, ...]
    dropped_duplicates: tuple[Entry, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        first: dict[str, float] = {}
        dropped = []
        for name, weight in self.entries:
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"mixture {self.name!r}: the weight of {name!r} is {weight!r}; "
                    f"it must be finite and above 0"
                )
            if name in first:
                dropped.append((name, weight))
            else:
                first[name] = weight
        if not first:
            raise ValueError(f"mixture {self.name!r} has no entries")
        object.__setattr__(self, "entries", tuple(first.items()))
        object.__setattr__(self, "dropped_duplicates", tuple(dropped))

    @classmethod
    def from_table(cls, name: str, table: Mapping[str, Any]) -> "Mixture":
        """Reads a table of a definition file: `entries`, a list of [dataset, weight]; `source`.

        Raises:
          ValueError: another field, or entries of another form.
        """
        unknown = sorted(set(table) - {"source", "entries"})
        if unknown:
            raise ValueError(
                f"mixture {name!r}: unknown field(s) {', '.join(unknown)}; known: source, entries"
            )
        entries: list[Entry] = []
        for entry in table.get("entries", []):
            match entry:
                case [str(dataset), int(weight) | float(weight)] if not isinstance(weight, bool):
                    entries.append((dataset, float(weight)))
                case _:
                    raise ValueError(f"mixture {name!r}: {entry!r} is no [dataset, weight]")
        return cls(name=name, source=table.get("source", ""), entries=tuple(entries))


def _built_in() -> Mapping[str, Mixture]:
    tables = read_tables(Path(__file__).with_name("mixtures.toml"))["mixtures"]
    return {name: Mixture.from_table(name, table) for name, table in tables.items()}


MIXTURES: Mapping[str, Mixture] = Lazy(_built_in)


def mixture_named(name: str, extra: Mapping[str, Mixture] | None = None) -> Mixture:
    """The mixture of this name.

    Args:
      name: such as "openvla:oxe_magic_soup".
      extra: a user's mixtures; they come first.

    Raises:
      ValueError: there is none; the message lists those with a name like it.
    """
    known = {**MIXTURES, **(extra or {})}
    if name not in known:
        raise ValueError(
            f"unknown mixture {name!r}; {closest(name, known)} A definition file has a table "
            f'[mixtures."{name}"] with entries = [["DATASET", WEIGHT], ...].'
        )
    return known[name]
