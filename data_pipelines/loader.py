"""From a table of episodes to batches: the grain chain, read top to bottom in `Loader.batches`.

Everything is a function of an index, so batch n of a run is a function of (seed, n) and nothing
else: not of the number of threads, nor of where a run was stopped. The position to save is one
integer, the number of batches taken.

    step index --shuffle--> sample of the StepSource --row--> arrays --batch--> Batch
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from data_pipelines.episodes import StepSource
from lara_jax.batch import Batch
from lara_jax.tokenizers.prompt import Annotation
from lara_jax.transforms import Normalizer, pad_state

# (instruction, annotation) -> prefix_ids, prefix_mask, suffix_ids, suffix_mask, loss_mask.
Prompt = Callable[[str, Annotation | None], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Batches of a step source.

    Attributes:
      source: the steps.
      prompt: makes token ids of an instruction and an annotation; a ValueError of its is raised
        with the sample's name in front.
      action_normalizer, state_normalizer: from the training split's statistics.
      state_dim: the model's state width; a narrower state is padded with zeros on the right.
      batch_size: rows of a batch.
      seed: of the shuffle, in [0, 2**32).
      num_threads: threads that prepare batches ahead; 0 prepares each when it is asked for.
    """

    source: StepSource
    prompt: Prompt
    action_normalizer: Normalizer
    state_normalizer: Normalizer
    state_dim: int
    batch_size: int
    seed: int = 0
    num_threads: int = 2

    def __post_init__(self) -> None:
        data_state_dim = len(self.source.table.spec.state_columns)
        if data_state_dim > self.state_dim:
            raise ValueError(
                f"the data's state is {data_state_dim} wide, "
                f"the model's state_dim is {self.state_dim}"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**32)")

    def batches(self) -> grain.MapDataset:
        """The endless training set: batch n by index, each epoch in its own order.

        Raises:
          ValueError: the source has fewer steps than a batch.
        """
        if len(self.source) < self.batch_size:
            raise ValueError(f"{self.source}: fewer steps than a batch of {self.batch_size}")
        return (
            grain.MapDataset.source(self.source)
            .seed(self.seed)
            .shuffle()
            .repeat()
            .map(self.row)
            .batch(self.batch_size)
            .map(_to_batch)
        )

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Training batches without end, from batch `start_step` on.

        Args:
          start_step: how many batches were already taken.

        Raises:
          ValueError: at once, where `batches` does or `start_step` is negative.
        """
        if start_step < 0:
            raise ValueError(f"start_step is {start_step}; it must not be negative")
        return self._prefetch(self.batches().slice(slice(start_step, None)))

    def epoch(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Every step once, in order, for evaluation.

        Yields:
          A full batch and bool[B], True at rows to count: the last batch is filled up with its last
          step.
        """
        steps = len(self.source)
        starts = range(0, steps, self.batch_size)
        batches = (
            grain.MapDataset.range(len(starts) * self.batch_size)
            .map(lambda index: self.row(self.source[min(index, steps - 1)]))
            .batch(self.batch_size)
            .map(_to_batch)
        )
        for start, batch in zip(starts, self._prefetch(batches), strict=True):
            yield batch, np.arange(start, start + self.batch_size) < steps

    def row(self, sample: dict[str, Any]) -> dict[str, np.ndarray]:
        """One sample of the source as the arrays of a batch's row: normalised, padded,
        tokenised."""
        actions = self.action_normalizer.normalize(sample["actions"])
        # Past the end, relative dimensions are 0 as the model sees it (Octo and OpenVLA do the
        # same).
        relative = ~np.array(self.source.table.spec.absolute_action)
        actions[~sample["action_mask"][:, None] & relative] = 0
        state = pad_state(self.state_normalizer.normalize(sample["state"]), self.state_dim)
        try:
            tokens = self.prompt(sample["instruction"], sample["annotation"])
        except ValueError as error:
            where = self.source.table.where(sample["sample_id"])
            raise ValueError(f"{where}: {error}") from error
        frames = {k: sample[k] for k in ("images", "view_mask", "next_images", "next_mask")}
        return {
            **frames,
            "state": state,
            "actions": actions,
            "action_mask": sample["action_mask"],
            **tokens,
            "sample_id": np.int32(sample["sample_id"]),
        }

    def _prefetch(self, batches: grain.MapDataset) -> Iterator[Batch]:
        """Iterates with threads that work ahead by two batches each."""
        options = grain.ReadOptions(
            num_threads=self.num_threads, prefetch_buffer_size=2 * self.num_threads
        )
        iterator = iter(batches.to_iter_dataset(options))
        try:
            yield from iterator
        finally:
            iterator.close()


def _to_batch(rows: dict[str, np.ndarray]) -> Batch:
    """The batched arrays under the contract's names."""
    return Batch(**rows)
