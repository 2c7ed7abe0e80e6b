"""From a mixture of steps to batches: the grain chain, read top to bottom in `Loader.iterate`.

Everything is a function of a position in the stream, so batch n of a run is a function of (mixture,
n) and nothing else: not of the number of hosts, worker processes or threads, nor of where a run was
stopped. What to save is one integer, the number of samples taken, and the mixture's fingerprint.

    positions  --MixtureSource.locate--> datasets and steps of a thousand samples
               --MixtureSource.samples, normalizers--> their numbers, words, places of frames
    a batch's  --prompt, MixtureSource.pixels--> what a Batch holds

Numbers are cheap if looked up by the thousand, and dear one at a time; frames are decoded by the
batch, to where they stay. So grain's element is a host's part of a batch. grain deals elements to
hosts like cards: host h of 4 gets h, h + 4, ... Of a batch of 8, card 1 of 2 is positions 4 5 6 7,
so that the hosts' parts, one after the other, are the batch in its one order.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines.mixture import MixtureSource
from data_pipelines.permutation import uniform
from lara_jax.batch import Batch
from lara_jax.transforms import Normalizer

# (instruction, annotation) -> prefix_ids, prefix_mask, suffix_ids, suffix_mask, loss_mask; it is
# also given action_ids where there are action tokens, and spoken where there is a silent share.
Prompt = Callable[..., dict[str, np.ndarray]]
_ENDLESS = 2**40  # batches
_TOGETHER = 1024  # samples whose numbers are looked up together


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
      action_tokens: from normalised chunks float32[N, C, A] to the N lists of token ids that the
        prompts end with; None for prompts without.
      silent_share: from the number of a training batch to the share of its rows whose prompt is not
        `spoken` (lara_jax.curriculum); None for prompts that do not know of this.
    """

    source: MixtureSource
    prompt: Prompt
    normalizers: Mapping[str, tuple[Normalizer, Normalizer]]
    state_dim: int
    batch_size: int
    num_threads: int = 2
    num_workers: int = 0
    host: tuple[int, int] = (0, 1)
    action_tokens: Callable[[np.ndarray], list[Any]] | None = None
    silent_share: Callable[[int], float] | None = None

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
        batches.set_state({"global_next_index": start_step * self.host[1]})
        return self._batches(batches)

    def dataset(self, batches: int = _ENDLESS) -> grain.experimental.ElasticIterator:
        """The grain dataset behind `iterate`: this host's part of so many batches, as dicts of
        arrays with an axis of 1 in front."""
        number, hosts = self.host
        workers = grain.MultiprocessingOptions(num_workers=self.num_workers)
        if self.num_workers and not flags.FLAGS.is_parsed():
            # grain looks at its own absl flags, which our command line does not set.
            flags.FLAGS.mark_as_parsed()
        rows = self.batch_size // hosts
        together = max(1, _TOGETHER // rows)
        deal = hosts * max(1, self.num_workers)  # from one card of a process to its next

        def numbers(block: tuple[int, int]) -> dict[str, Any]:
            turn, first = block
            cards = first + deal * (turn * together + np.arange(together))
            positions = rows * cards[:, None] + np.arange(rows)
            return self._stream(positions.ravel())

        blocks = _Latest(numbers)

        def part(card: int) -> dict[str, np.ndarray]:
            turn, first = divmod(card, deal)
            block, place = divmod(turn, together)
            samples = blocks((block, first))
            own = slice(place * rows, (place + 1) * rows)
            return self._arrays({name: values[own] for name, values in samples.items()})

        return grain.experimental.ElasticIterator(
            grain.MapDataset.range(batches * hosts).map(part),
            global_batch_size=hosts,  # in cards
            shard_options=grain.sharding.ShardOptions(number, hosts),
            # Both options count batches.
            read_options=grain.ReadOptions(
                num_threads=self.num_threads,
                prefetch_buffer_size=self.num_threads + 1 if self.num_threads else 0,
            ),
            multiprocessing_options=workers if self.num_workers else None,
        )

    def normalized_chunks(self, count: int) -> np.ndarray:
        """The action chunks of the first `count` samples of the stream, a fair sample of the data:
        float32[count, C, A], normalised."""
        return self._numbers(*self.source.locate(np.arange(count)))["actions"]

    def batch_of(self, datasets: np.ndarray, numbers: np.ndarray) -> Batch:
        """A batch of chosen steps, read here and now, for evaluation.

        Args:
          datasets, numbers: int[B] each, the set of each row and the number of the step in it.
        """
        arrays = self._arrays(self._numbers(datasets, numbers))
        return Batch(**{"next_images": arrays["images"], **arrays})

    def _stream(self, positions: np.ndarray) -> dict[str, Any]:
        """The samples at positions of the stream, normalised, and which of them are spoken."""
        samples = self._numbers(*self.source.locate(positions))
        if self.silent_share is not None:
            samples["spoken"] = self._spoken(positions, self.silent_share)
        return samples

    def _numbers(self, datasets: np.ndarray, numbers: np.ndarray) -> dict[str, Any]:
        """Samples as of `MixtureSource.samples`, normalised."""
        samples = self.source.samples(datasets, numbers, self.state_dim)
        actions, mask, states = samples["actions"], samples["action_mask"], samples["state"]
        for source, at in self.source.by_source(datasets):
            action_normalizer, state_normalizer = self.normalizers[source.name]
            a, j = action_normalizer.statistics.width, state_normalizer.statistics.width
            own = action_normalizer.normalize(actions[at, :, :a])
            # Past the end, relative dimensions are 0 as the model sees it (Octo and OpenVLA do the
            # same).
            own[~mask[at, :, :a] & ~source.absolute] = 0
            actions[at, :, :a] = own
            states[at, :j] = state_normalizer.normalize(states[at, :j])
        if self.action_tokens is not None:
            samples["action_ids"] = self.action_tokens(actions)
        return samples

    def _spoken(self, positions: np.ndarray, silent_share: Callable[[int], float]) -> np.ndarray:
        """bool[N], the rows at these positions of the stream that are spoken."""
        numbers, place = np.unique(positions // self.batch_size, return_inverse=True)
        shares = np.array([silent_share(number) for number in numbers.tolist()])
        return uniform(self.source.seed, positions) >= shares[place]

    def _arrays(self, samples: dict[str, Any]) -> dict[str, np.ndarray]:
        """What a Batch holds, of a batch's samples as of `_numbers`: the words tokenised, the
        frames read; without next frames, no `next_images`."""
        words = samples.pop("instruction"), samples.pop("annotation")
        action_ids, spoken = samples.pop("action_ids", None), samples.pop("spoken", None)
        tokens = []
        for b, (instruction, annotation) in enumerate(zip(*words, strict=True)):
            more = {} if action_ids is None else {"action_ids": action_ids[b]}
            if self.silent_share is not None:
                more["spoken"] = spoken is not None and bool(spoken[b])
            try:
                tokens.append(self.prompt(instruction, annotation, **more))
            except ValueError as error:
                where = self.source.where(samples["dataset"][b], samples["sample_id"][b])
                raise ValueError(f"{where}: {error}") from error
        return {
            **{name: np.array([row[name] for row in tokens]) for name in tokens[0]},
            "annotated": np.array([annotation is not None for annotation in words[1]]),
            **self.source.pixels(samples["dataset"], samples.pop("frames")),
            **samples,
        }

    def _batches(self, parts: grain.DatasetIterator) -> Iterator[Batch]:
        """The batches of grain's iterator; its threads and processes end with them."""
        try:
            for part in parts:
                arrays = {name: values[0] for name, values in part.items()}
                # Next frames that were not read are the frames themselves.
                yield Batch(**{"next_images": arrays["images"], **arrays})
        finally:
            parts.close()


class _Latest:
    """A function that remembers its latest values: each is computed once, whichever thread asks."""

    def __init__(self, function: Callable[[Any], Any], size: int = 2) -> None:
        self._function, self._size = function, size
        self._lock = Lock()
        self._values: dict[Hashable, Any] = {}

    def __reduce__(self) -> Any:
        return _Latest, (self._function, self._size)

    def __call__(self, key: Hashable) -> Any:
        with self._lock:
            if key not in self._values:
                if len(self._values) == self._size:
                    del self._values[next(iter(self._values))]
                self._values[key] = self._function(key)
            return self._values[key]
