"""Indexes that many hosts open: in one folder or bucket, a folder for each dataset.

    gs://bucket/indexes/            config.data.index_dir
      bridge_orig/train/              index.json, rows.bin, ...      `lara data index --out`
      fractal20220817_data/train/     -> $LARA_JAX_CACHE/fetched/... on each host

Nobody makes an index here: a pod of 64 hosts would read all the data 64 times.
"""

import hashlib
import os
from pathlib import Path

from data_pipelines import storage
from data_pipelines.index.build import cache_folder, index_command, locked, open_index
from data_pipelines.index.format import HEADER_FILE, Index
from data_pipelines.index.writer import put_in_place


def open_shared(
    root: str,
    path_or_url: str,
    split: str,
    *,
    name: str,
    definitions: str | os.PathLike[str] | None = None,
) -> Index:
    """Opens the index of a dataset's split out of a folder of indexes; from a URL it is fetched.

    Args:
      root: the folder of indexes, or its URL.
      path_or_url, split, definitions: as for `open_index`.
      name: of the dataset, which is its folder's.

    Raises:
      FileNotFoundError: it is not there, or there is no such dataset.
      StaleIndex, ValueError: as `open_index`.
    """
    out = f"{root.rstrip('/')}/{name}"
    place = f"{out}/{split}"
    if not storage.exists(storage.join(place, HEADER_FILE)):
        command = index_command(path_or_url, name=name, definitions=definitions, out=out)
        raise FileNotFoundError(
            f"{path_or_url}, split {split!r}, has no index at {place}: run `{command}`"
        )
    folder = Path(storage.absolute(place)) if storage.is_local(place) else fetched(place)
    return open_index(path_or_url, split, folder, name=name, definitions=definitions, out=out)


def send(index: Index, url: str) -> None:
    """Copies an index to a URL, with the statistics beside it; its header last, as it counts."""
    names = (file.name for file in index.folder.iterdir() if not file.name.startswith("."))
    storage.send_files(index.folder, sorted(names, key=lambda name: name == HEADER_FILE), url)


def fetched(url: str) -> Path:
    """The local copy of an index at a URL; another one at the same URL gets a folder of its own."""
    header = storage.read_text(storage.join(url, HEADER_FILE))
    digest = hashlib.sha256(f"{url}\n{header}".encode()).hexdigest()[:16]
    folder = cache_folder() / "fetched" / digest / url.rpartition("/")[2]
    if not (folder / HEADER_FILE).is_file():
        with locked(folder):
            if not (folder / HEADER_FILE).is_file():
                partial = folder.with_name(f".{folder.name}.partial")
                partial.mkdir()
                storage.fetch_folder(url, partial)
                put_in_place(partial, folder)
    return folder
