"""Where datasets lie: from a path, or a mixture's name and a folder, to directories with weights.

    /data/bridge_dataset/1.0.0                             one dataset, weight 1
    /data with mixture "openvla:rtx"    /data/fractal20220817_data/0.1.0   0.54
                                        /data/kuka/0.1.0                   0.83   and so on

In the folder of a mixture each dataset lies under its name or an alias, in a version directory or
directly. A dataset that is not there is an error: a mixture is never silently another one.
"""

import os
from dataclasses import dataclass

from data_pipelines import storage
from data_pipelines.index.build import SIDECAR, splits_of
from data_pipelines.lerobot import INFO, is_lerobot
from data_pipelines.oxe.mixtures import mixture_named
from data_pipelines.oxe.registry import load_definitions, spec_named
from data_pipelines.oxe.spec import DatasetSpec

RLDS_FILE = "dataset_info.json"
# What a dataset without a held-out split gives to it (OpenVLA and Octo do the same).
TRAIN_PART, HELD_OUT_PART = "[:95%]", "[95%:]"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A dataset of a mixture: its directory or URL, and its weight."""

    path: str
    weight: float = 1.0


def entries(path: str, *, mixture: str = "", definitions: str = "") -> tuple[Entry, ...]:
    """The datasets that a recipe names.

    Args:
      path: of the dataset; with a mixture, of the folder that holds its datasets.
      mixture: its name; empty for the one dataset at `path`.
      definitions: a TOML file with datasets and mixtures besides the built-in ones; empty for none.

    Raises:
      FileNotFoundError: no such folder, or a dataset of the mixture is not in it; all are listed.
      ValueError: an unknown mixture, or several versions of a dataset.
    """
    if not mixture:
        return (Entry(path=path),)
    datasets, mixtures = load_definitions(definitions) if definitions else ({}, {})
    found, missing = [], []
    for name, weight in mixture_named(mixture, mixtures).entries:
        place = _find(path, spec_named(name, datasets))
        if place is None:
            missing.append(name)
        else:
            found.append(Entry(path=place, weight=weight))
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of the {len(missing) + len(found)} datasets of mixture "
            f"{mixture!r}: {', '.join(missing)}; each is expected in {path}/NAME/VERSION"
        )
    return tuple(found)


def split_of(path: str, split: str, *, held_out: str) -> str:
    """The split to read, where a dataset may have none that is held out.

    Args:
      path: of the dataset.
      split: asked for, such as "train".
      held_out: name of the split that is held out, such as "val".

    Returns:
      `split`; but of a dataset without `held_out`, 95 % of "train" and the rest of it.
    """
    if split not in ("train", held_out) or "[" in held_out:
        return split
    if not (storage.exists(storage.join(path, RLDS_FILE)) or is_lerobot(path)):
        return split  # only an index, which is of one split
    splits = splits_of(path)
    if held_out in splits or "train" not in splits:
        return split
    return "train" + (TRAIN_PART if split == "train" else HELD_OUT_PART)


def _find(root: str, spec: DatasetSpec) -> str | None:
    """The directory of a dataset below `root`, None where it is not."""
    for name in (spec.name, *spec.aliases):
        folder = storage.join(root, name)
        if not storage.exists(folder):
            continue
        if _is_dataset(folder):
            return folder
        versions = [v for v in storage.list_folders(folder) if _is_dataset(f"{folder}/{v}")]
        wanted = os.path.basename(spec.location)
        if wanted in versions:
            return storage.join(folder, wanted)
        if len(versions) > 1:
            raise ValueError(
                f"{folder} holds the versions {', '.join(sorted(versions))}; which one is not "
                f"said: give the dataset a `location` that ends in it, or keep one"
            )
        if versions:
            return storage.join(folder, versions[0])
    return None


def _is_dataset(folder: str) -> bool:
    # A set that was converted to step records has nothing but its index.
    marks = (RLDS_FILE, INFO, SIDECAR)
    return any(storage.exists(storage.join(folder, name)) for name in marks)
