"""The datasets we know, and those a user adds: what is in registry.toml beside this file.

    spec_named("bridge_orig")                    a built-in dataset, also by an alias ("fmb")
    datasets, mixtures = load_definitions("mine.toml")
    spec_named("my_arm", datasets)               a user's dataset first, then the built-in ones

The facts are those of OpenVLA c8f03f4 (prismatic/vla/datasets/rlds/oxe) and Octo 241fb35
(octo/data/oxe); where the two differ we follow OpenVLA, unless only Octo's form can be trained on,
and the dataset's `quirks` say so. For a new dataset see `data_pipelines.oxe.definitions`.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.oxe.definitions import Lazy, closest, read_tables
from data_pipelines.oxe.mixtures import MIXTURES, Mixture
from data_pipelines.oxe.spec import DatasetSpec


def _built_in() -> Mapping[str, DatasetSpec]:
    tables = read_tables(Path(__file__).with_name("registry.toml"))["datasets"]
    specs = {name: DatasetSpec.from_dict({"name": name, **tables[name]}) for name in tables}
    _by_any_name(specs.values())
    return specs


REGISTRY: Mapping[str, DatasetSpec] = Lazy(_built_in)


def spec_named(name: str, extra: Mapping[str, DatasetSpec] | None = None) -> DatasetSpec:
    """The dataset of this name or alias.

    Args:
      name: such as "bridge_orig", or "fmb", an alias of "fmb_dataset".
      extra: a user's datasets; they come first.

    Raises:
      ValueError: there is none; the message lists names like it and how to define one.
    """
    known = _by_any_name(REGISTRY.values()) | _by_any_name((extra or {}).values())
    if name not in known:
        raise ValueError(
            f"unknown dataset {name!r}; {closest(name, known)} A definition file has a table "
            f"[datasets.{name}] with control_hz, cameras, roles, action, state, as in "
            f"{Path(__file__).with_name('registry.toml')}"
        )
    return known[name]


def load_definitions(
    path: str | os.PathLike[str],
) -> tuple[Mapping[str, DatasetSpec], Mapping[str, Mixture]]:
    """Reads a user's definition file, of the same format as the built-in ones.

    A table may say `replaces = true` to take the place of a built-in entry of its name.

    Args:
      path: a TOML file; see `data_pipelines.oxe.definitions`.

    Returns:
      The file's datasets and its mixtures, by name; a mixture names its datasets by their proper
      names, not by aliases.

    Raises:
      FileNotFoundError: no such file.
      ValueError: an ill-formed entry, a name that is built in, or a mixture of an unknown dataset.
    """
    tables = read_tables(path)
    built_in = _by_any_name(REGISTRY.values())
    try:
        datasets = {}
        for name, table in tables["datasets"].items():
            fields = _unless_taken(name, table, built_in)
            spec = DatasetSpec.from_dict({"name": name, **fields})
            taken = [alias for alias in spec.aliases if alias in built_in]
            if taken and fields is table:
                raise ValueError(f"dataset {name!r}: alias(es) {taken} are built in")
            datasets[name] = spec
        _by_any_name(datasets.values())
        mixtures = {}
        for name, table in tables["mixtures"].items():
            mixture = Mixture.from_table(name, _unless_taken(name, table, MIXTURES))
            mixtures[name] = _with_proper_names(mixture, datasets)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return datasets, mixtures


def _by_any_name(specs: Iterable[DatasetSpec]) -> dict[str, DatasetSpec]:
    """Datasets by name and by alias, each used once."""
    known: dict[str, DatasetSpec] = {}
    for spec in specs:
        for name in (spec.name, *spec.aliases):
            if known.setdefault(name, spec) is not spec:
                raise ValueError(f"datasets {known[name].name!r} and {spec.name!r} share {name!r}")
    return known


def _unless_taken(
    name: str, table: Mapping[str, Any], built_in: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The table without `replaces`, checked against the built-in names."""
    replaces = table.get("replaces", False)
    if not isinstance(replaces, bool) or replaces != (name in built_in):
        raise ValueError(
            f"{name!r} is built in; to take its place say replaces = true"
            if name in built_in
            else f"{name!r} says replaces = {replaces!r}, but nothing built in has this name"
        )
    return {k: v for k, v in table.items() if k != "replaces"} if replaces else table


def _with_proper_names(mixture: Mixture, datasets: Mapping[str, DatasetSpec]) -> Mixture:
    """The mixture with aliases resolved; an unknown dataset raises."""
    try:
        entries = tuple(
            (spec_named(name, datasets).name, weight)
            for name, weight in (*mixture.entries, *mixture.dropped_duplicates)
        )
    except ValueError as error:
        raise ValueError(f"mixture {mixture.name!r}: {error}") from error
    return Mixture(name=mixture.name, source=mixture.source, entries=entries)
