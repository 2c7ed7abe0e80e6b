"""LeRobot data sets (v2.0, v2.1, v3.0) through the same index as RLDS: the extra `lerobot`."""

from data_pipelines import storage

INFO = "meta/info.json"


class MissingExtra(ImportError, ValueError):
    """A package of the extra is not installed."""


def is_lerobot(path: storage.PathLike) -> bool:
    """True for a directory or URL that holds a LeRobot data set; works without the extra."""
    return storage.exists(storage.join(path, INFO))
