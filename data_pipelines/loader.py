"""From a mixture of steps to batches: the grain chain, read top to bottom in `Loader.iterate`.

Everything is a function of a position in the stream, so batch n of a run is a function of (mixture,
n) and nothing else: not of the number of hosts, worker processes or threads, nor of where a run was
stopped. What to save is one integer, the number of samples taken, and the mixture's fingerprint.

    position --place in batch--> sample of the MixtureSource --row--> arrays, B of them --> Batch

grain deals positions to hosts like cards: of a batch of B = 8, host 0 of 2 gets 0 2 4 6 and host 1
gets 1 3 5 7. The hosts' parts, one after the other, shall be the batch in its one order, so the
cards are numbered such that host 0 finds samples 0 1 2 3 and host 1 finds 4 5 6 7.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines.mixture import MixtureSource
from lara_jax.batch import Batch
from lara_jax.tokenizers.prompt import Annotation
from lara_jax.transforms import Normalizer

# (instruction, annotation) -> prefix_ids, prefix_mask, suffix_ids, suffix_mask, loss_mask.
Prompt = Callable[[str, Annotation | None], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Position:
    """Where a run stands in the stream; what a checkpoint keeps.

    Attributes:
      samples: how many were taken, over all hosts.
      fingerprint: of the mixture they were taken from.
    """

    samples: int
    fingerprint: str

    def check(self, fingerprint: str, *, allow_changed: bool = False) -> None:
        """Refuses to go on in another stream.

        Args:
          fingerprint: of the mixture to go on with.
          allow_changed: go on at the same number of samples whatever the stream.

        Raises:
          ValueError: the streams differ.
        """
        if self.fingerprint != fingerprint and not allow_changed:
            raise ValueError(
                f"the data is not what this run has trained on so far (fingerprint "
                f"{fingerprint[:12]}, the checkpoint's is {self.fingerprint[:12]}): its index, "
                f"split, filters, views, image size, action chunk, weights, balance or seed have "
                f"changed, so that steps would be repeated or left out. Restore the settings, "
                f"start a new run, or allow changed data"
            )

    def steps(self, batch_size: int) -> int:
        """The number of batches of this size that were taken.

        Raises:
          ValueError: it is not a whole number.
        """
        steps, rest = divmod(self.samples, batch_size)
        if rest:
            raise ValueError(
                f"batch_size is {batch_size}; the checkpoint was written after {self.samples} "
                f"samples, which is no multiple of it"
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of a mixture.

    Attributes:
      source: the steps.
      prompt: makes token ids of an instruction and an annotation; a ValueError of its is raised
        with the sample's name in front.
      normalizers: of actions and of states, from the training split's statistics, by dataset.
      state_dim: the model's state width; a narrower state is padded with zeros on the right.
      batch_size: rows of a batch, over all hosts.
      num_threads: threads of a process that prepare batches ahead; 0 prepares each when it is
        asked for.
      num_workers: processes that prepare batches ahead; 0 for none but this one. They start by
        importing the main program, which must do its work under `if __name__ == "__main__"`.
      host: number of this host, and of hosts; this one gets its part of each batch.
    """

    source: MixtureSource
    prompt: Prompt
    normalizers: Mapping[str, tuple[Normalizer, Normalizer]]
    state_dim: int
    batch_size: int
    num_threads: int = 2
    num_workers: int = 0
    host: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        number, hosts = self.host
        if not 0 <= number < hosts:
            raise ValueError(f"host {number} of {hosts}; hosts count from 0")
        if self.batch_size < 1 or self.batch_size % hosts:
            raise ValueError(
                f"batch_size is {self.batch_size}; it must be positive and a multiple of the "
                f"number of hosts, {hosts}"
            )
        for name in ("num_threads", "num_workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for source in self.source.sources:
            spec = source.index.spec
            if source.name not in self.normalizers:
                raise ValueError(
                    f"dataset {source.name!r} has no normalizers; there are some for "
                    f"{', '.join(sorted(self.normalizers)) or 'none'}"
                )
            widths = tuple(n.statistics.width for n in self.normalizers[source.name])
            if widths != (spec.action_dim, spec.state_dim):
                raise ValueError(
                    f"dataset {source.name!r}: actions and states are {spec.action_dim} and "
                    f"{spec.state_dim} wide, its statistics {widths[0]} and {widths[1]}"
                )
            if spec.state_dim > self.state_dim:
                raise ValueError(
                    f"dataset {source.name!r}: its state is {spec.state_dim} wide, "
                    f"the model's state_dim is {self.state_dim}"
                )

    @property
    def host_rows(self) -> slice:
        """This host's rows of a batch."""
        number, hosts = self.host
        size = self.batch_size // hosts
        return slice(number * size, (number + 1) * size)

    def position(self, step: int) -> Position:
        """Where the stream stands after `step` batches."""
        return Position(samples=step * self.batch_size, fingerprint=self.source.fingerprint)

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """This host's part of the training batches, without end, from batch `start_step` on.

        Args:
          start_step: how many batches were already taken.

        Raises:
          ValueError: at once, where the mixture has sets that cannot come up, or `start_step` is
            negative.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; it must not be negative")
        _ = self.source.draws  # checks the mixture
        batches = iter(self.dataset())
        batches.set_state({"global_next_index": start_step * self.batch_size})
        return self._batches(batches)

    def dataset(self, samples: int = sys.maxsize) -> grain.experimental.ElasticIterator:
        """The grain dataset behind `iterate`: this host's part of the batches of so many samples,
        as dicts of arrays."""
        return self._chain(self.source.__getitem__, samples)

    def epoch(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Every step of every set once, in order, for evaluation.

        Yields:
          This host's part of a batch, and bool[B / hosts], True at rows to count: the last batch is
          filled up with the last step.
        """
        steps = self.source.steps
        numbers = np.arange(-(-steps // self.batch_size) * self.batch_size)
        dataset = self._chain(lambda number: self.source.step(min(number, steps - 1)), len(numbers))
        batches = numbers.reshape(-1, self.batch_size)[:, self.host_rows]
        for batch, rows in zip(self._batches(iter(dataset)), batches, strict=True):
            yield batch, rows < steps

    def row(self, sample: dict[str, Any]) -> dict[str, np.ndarray]:
        """One sample as the arrays of a batch's row, still in the data's units: the state padded,
        the words tokenised."""
        dataset, sample_id = sample["dataset"], sample["sample_id"]
        try:
            tokens = self.prompt(sample["instruction"], sample["annotation"])
        except ValueError as error:
            raise ValueError(f"{self.source.where(dataset, sample_id)}: {error}") from error
        words = {"instruction", "annotation"}
        # Next frames that were not read are the frames themselves: `batch` needs no copy of them.
        left_out = words if self.source.sources[dataset].next_frames else words | {"next_images"}
        arrays = {name: value for name, value in sample.items() if name not in left_out}
        state = np.zeros(self.state_dim, np.float32)
        state[: len(sample["state"])] = sample["state"]
        numbers = {"dataset": np.int32(dataset), "sample_id": np.int32(sample_id)}
        return {**arrays, **tokens, **numbers, "state": state}

    def batch(self, rows: dict[str, np.ndarray]) -> Batch:
        """Batched rows as the model reads them: actions and states normalised, set by set."""
        actions, states = np.array(rows["actions"]), np.array(rows["state"])
        for dataset in np.unique(rows["dataset"]):
            source = self.source.sources[dataset]
            action_normalizer, state_normalizer = self.normalizers[source.name]
            a, j = action_normalizer.statistics.width, state_normalizer.statistics.width
            of = np.flatnonzero(rows["dataset"] == dataset)
            own = action_normalizer.normalize(actions[of, :, :a])
            # Past the end, relative dimensions are 0 as the model sees it (Octo and OpenVLA do the
            # same).
            own[~rows["action_mask"][of, :, :a] & ~source.absolute] = 0
            actions[of, :, :a] = own
            states[of, :j] = state_normalizer.normalize(states[of, :j])
        changed = {"actions": actions, "state": states}
        return Batch(**{"next_images": rows["images"], **rows, **changed})

    def _chain(
        self, sample: Callable[[int], dict[str, Any]], samples: int
    ) -> grain.experimental.ElasticIterator:
        """Positions dealt to hosts, made samples, made rows, put into batches ahead of time."""
        number, hosts = self.host
        workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
        if self.num_workers and not flags.FLAGS.is_parsed():
            # grain looks at its own absl flags, which our command line does not set.
            flags.FLAGS.mark_as_parsed()
        return grain.experimental.ElasticIterator(
            # One map, as each costs as much as the step's numbers do.
            grain.MapDataset.range(samples).map(lambda card: self.row(sample(self._place(card)))),
            global_batch_size=self.batch_size,
            shard_options=grain.sharding.ShardOptions(number, hosts),
            # Both options count batches.
            read_options=grain.ReadOptions(
                num_threads=self.num_threads,
                prefetch_buffer_size=self.num_threads + 1 if self.num_threads else 0,
            ),
            multiprocessing_options=workers if self.num_workers else None,
        )

    def _place(self, card: int) -> int:
        """The position in the stream of what grain deals to host `card` mod n: see the top."""
        hosts = self.host[1]
        batch, place = divmod(card, self.batch_size)
        slot, host = divmod(place, hosts)
        return batch * self.batch_size + host * (self.batch_size // hosts) + slot

    def _batches(self, rows: grain.DatasetIterator) -> Iterator[Batch]:
        """The batches of grain's iterator; its threads and processes end with them."""
        try:
            for arrays in rows:
                yield self.batch(arrays)
        finally:
            rows.close()
