"""Where datasets lie: from a path, or a mixture's name and a folder, to directories with weights.

    /data/bridge_dataset/1.0.0                             one dataset, weight 1
    /data with mixture "openvla:rtx"    /data/fractal20220817_data/0.1.0   0.54
                                        /data/kuka/0.1.0                   0.83   and so on

In the folder of a mixture each dataset lies under its name, an alias or a name that its definition
lists as `folders`, in a version directory or directly. It is read by the definition that the
mixture names, whatever its files call it. A dataset that is not there is an error: a mixture is
never silently another one.

Which steps of it are read is said as "train" or "train[:95%]". A dataset without the split that is
to be held out gives the last 5 % of "train" for it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from data_pipelines import storage
from data_pipelines.index.build import SIDECAR, open_or_build, open_source, splits_of
from data_pipelines.index.format import Index
from data_pipelines.index.shared import open_shared
from data_pipelines.lerobot import INFO
from data_pipelines.oxe.mixtures import mixture_named
from data_pipelines.oxe.registry import load_definitions, spec_named
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.sampling import parse_split

RLDS_FILE = "dataset_info.json"
# What a dataset without a held-out split gives to it (OpenVLA and Octo do the same).
TRAIN_PART, HELD_OUT_PART = "[:95%]", "[95%:]"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A dataset of a mixture.

    Attributes:
      path: its directory or URL.
      weight: how strongly it is drawn.
      name: of the definition that it is read by; None for what its files say.
      ignored_weights: given for it once more further down; the first counts.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    ignored_weights: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A part of a dataset, opened.

    Attributes:
      index: of its split.
      split: what it is called, such as "train[:95%]"; empty for the whole split.
      episodes: those of the index that belong to it.
    """

    index: Index
    split: str = ""
    episodes: slice = field(default_factory=lambda: slice(None))

    @cached_property
    def rows(self) -> slice:
        """Those of the index that belong to it."""
        episodes = self.index.episodes[self.episodes]
        first, last = episodes[0], episodes[-1]
        return slice(int(first["first_row"]), int(last["first_row"]) + int(last["rows"]))

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """Its "episodes", "rows", "stored_steps", and "dropped_steps" that are no rows."""
        episodes = self.index.episodes[self.episodes]
        rows, stored = int(episodes["rows"].sum()), int(episodes["frames"].sum())
        return {
            "episodes": len(episodes),
            "rows": rows,
            "stored_steps": stored,
            "dropped_steps": stored - rows,
        }


def entries(
    path: str, *, name: str = "", mixture: str = "", definitions: str = ""
) -> tuple[Entry, ...]:
    """The datasets that a recipe names.

    Args:
      path: of the dataset; with a mixture, of the folder that holds its datasets.
      name: of the definition of the one dataset at `path`; empty for what its files say.
      mixture: its name; empty for the one dataset at `path`.
      definitions: a TOML file with datasets and mixtures besides the built-in ones; empty for none.

    Raises:
      FileNotFoundError: no such folder, or a dataset of the mixture is not in it; all are listed.
      ValueError: an unknown mixture, several versions of a dataset, or two datasets in one folder.
    """
    if not mixture:
        return (Entry(path=path, name=name or None),)
    if name:
        raise ValueError(f"a name ({name!r}) is of one dataset; mixture {mixture!r} has its own")
    if storage.is_local(path) and not storage.exists(path):
        raise FileNotFoundError(f"{path} does not exist")
    datasets, mixtures = load_definitions(definitions) if definitions else ({}, {})
    chosen = mixture_named(mixture, mixtures)
    found: dict[str, Entry] = {}
    missing = []
    for name, weight in chosen.entries:
        place = _find(path, spec_named(name, datasets))
        if place is None:
            missing.append(name)
        elif place in found:
            raise ValueError(
                f"mixture {mixture!r}: {found[place].name!r} and {name!r} are both in {place}"
            )
        else:
            ignored = tuple(w for other, w in chosen.dropped_duplicates if other == name)
            found[place] = Entry(path=place, weight=weight, name=name, ignored_weights=ignored)
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of the {len(missing) + len(found)} datasets of mixture "
            f"{mixture!r}: {', '.join(missing)}; each is expected in {path}/NAME/VERSION"
        )
    return tuple(found.values())


def split_of(path: str, split: str, *, held_out: str) -> str:
    """The split to read, where a dataset may have none that is held out.

    Args:
      path: of the dataset.
      split: asked for, such as "train".
      held_out: name of the split that is held out, such as "val".

    Returns:
      `split`; but of a dataset without `held_out`, 95 % of "train" and the rest of it.

    Raises:
      FileNotFoundError: there is no such dataset.
      ValueError: a part of "train" is asked for, of which nobody says what is held out.
    """
    if "[" in held_out:
        return split
    splits = splits_of(path)
    if held_out in splits or "train" not in splits:
        return split
    if split == "train":
        return "train" + TRAIN_PART
    if split == held_out:
        return "train" + HELD_OUT_PART
    if parse_split(split).name in ("train", "all"):
        raise ValueError(
            f"{path} has no split {held_out!r}, so that the last 5 % of 'train' are held out, but "
            f"{split!r} is asked for, which may hold some of them: say what is held out, as in "
            f"config.data.eval_split='train{HELD_OUT_PART}'"
        )
    return split


def open_part(entry: Entry, split: str, *, definitions: str = "", index_dir: str = "") -> Part:
    """Opens a dataset, and makes its index where there is none yet.

    Args:
      entry: the dataset.
      split: such as "train" or "train[:95%]".
      definitions: as of `entries`.
      index_dir: folder or URL of indexes that are there (`open_shared`); empty for the index beside
        the data or in the cache.

    Raises:
      FileNotFoundError: there is no such dataset, or no index of it in `index_dir`.
      ValueError: an unknown dataset or split, a stale index, or a part without an episode.
    """
    part, toml = parse_split(split), definitions or None
    if index_dir:
        name = entry.name or open_source(entry.path, part.name, definitions=toml).dataset
        index = open_shared(index_dir, entry.path, part.name, name=name, definitions=toml)
    else:
        index = open_or_build(entry.path, part.name, name=entry.name, definitions=toml)
    count = len(index.episodes)
    episodes = part.episodes(count)
    if not len(range(count)[episodes]):
        raise ValueError(
            f"{index.header.dataset}: {split!r} holds none of the {count} episodes of "
            f"{part.name!r}; choose another part"
        )
    return Part(index=index, split=split, episodes=episodes)


def _find(root: str, spec: DatasetSpec) -> str | None:
    """The directory of a dataset below `root`, None where it is not."""
    for name in (spec.name, *spec.aliases, *spec.folders):
        folder = storage.join(root, name)
        if not storage.exists(folder):
            continue
        if _is_dataset(folder):
            return folder
        versions = [v for v in storage.list_folders(folder) if _is_dataset(f"{folder}/{v}")]
        wanted = os.path.basename(spec.location.rstrip("/"))
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
