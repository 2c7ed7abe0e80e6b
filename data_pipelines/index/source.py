"""What an index is made of: the form in which RLDS and LeRobot each offer a split."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from data_pipelines.index.format import Camera, EpisodeEntry, SourceFile
from data_pipelines.oxe.spec import DatasetSpec


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A part of a split that is indexed on its own.

    Attributes:
      files: numbers in `IndexSource.files`; a file may belong to several shards.
      episodes: how many it holds, for the progress bar.
    """

    files: tuple[int, ...]
    episodes: int


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What is known only after a shard has been read.

    Attributes:
      checksums: of each of `Shard.files`; empty strings where the format has none.
      cameras: by name, with the size of the shard's first frame; empty if it holds no frame.
    """

    checksums: tuple[str, ...]
    cameras: Mapping[str, Camera]


class IndexSource(Protocol):
    """A split that can be indexed. It pickles, and reads only small files before `episodes`."""

    @property
    def dataset(self) -> str:
        """The name of `spec`, as in Header; likewise the next ones."""

    @property
    def own_name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def source(self) -> str: ...

    @property
    def spec(self) -> DatasetSpec: ...

    @property
    def annotations(self) -> Mapping[str, Any]: ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Those of the spec that the files hold."""

    @property
    def decode_frames(self) -> bool:
        """True if `episodes` decodes every frame (and flags or refuses those that are broken)."""

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """With their sizes and stamps, without checksums."""

    @property
    def shards(self) -> tuple[Shard, ...]:
        """In the order of the index; the number of an episode's file counts in `files`."""

    def episodes(self, shard: int) -> Generator[EpisodeEntry, None, ShardFacts]:
        """Yields the episodes of a shard in order; returns what was learnt of it.

        Of the flags only bad frames need be set: the others are added, and boxes checked, here.
        """

    def checksum(self, file: int) -> str:
        """The checksum of a file as it is now, read anew; empty where the format has none."""
