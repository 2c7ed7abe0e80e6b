"""An index that the workers of a job open: on a disk that all of them see, or in a bucket."""

import argparse
import tempfile
from functools import lru_cache

from data_pipelines import storage
from data_pipelines.index.build import open_index
from data_pipelines.index.format import Index

_FETCHED: list[tempfile.TemporaryDirectory[str]] = []  # deleted when the process ends


@lru_cache(maxsize=4)
def shared_index(folder: str, source: str | None = None) -> Index:
    """Opens an index once a process; from a URL it is fetched first.

    Args:
      folder: of one split; a path or URL.
      source: where the files lie now; None for where they were.
    """
    if storage.is_local(folder):
        return Index.open(storage.absolute(folder), source=source)
    temporary = tempfile.TemporaryDirectory(prefix="index.")
    _FETCHED.append(temporary)
    storage.fetch_folder(folder, temporary.name)
    return Index.open(temporary.name, source=source)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a job that works on an index."""
    parser.add_argument("--split", default="train", help="of the input (default: train)")
    parser.add_argument("--definitions", help="TOML file with datasets of your own")
    parser.add_argument("--name", help="of the input's dataset, whatever its files call it")
    parser.add_argument(
        "--index", help="folder or URL of the input's index (default: where it was made)"
    )


def index_of(arguments: argparse.Namespace) -> tuple[Index, str]:
    """The index that these options name, and the folder or URL under which workers open it.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not one of the input as it is now. One in a bucket is not checked here: a
        frame that is not what was indexed is found when it is read.
    """
    if arguments.index and not storage.is_local(arguments.index):
        return shared_index(arguments.index, storage.absolute(arguments.input)), arguments.index
    index = open_index(
        arguments.input,
        arguments.split,
        arguments.index,
        name=arguments.name,
        definitions=arguments.definitions,
    )
    return index, str(index.folder)
