"""What a run says about itself while it trains: its losses, and where the time goes.

    samples_per_second   over the steps since the row before
    data_wait_fraction   part of that time that the loop stood waiting for the next batch; devices
                         that still have work meanwhile are not idle, so it is an upper bound of
                         what faster reading could save
    mfu                  FLOPs of the model (`lara_jax.flops`) over the peak of the devices
    device_memory_gb     most that a device has had in use, 1e9 bytes

A stage's first step compiles, and held-out evaluation takes time of its own: neither counts.
Numbers stay on the devices until a row is written, so that the loop runs ahead.
"""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lara_jax.batch import Batch
from lara_jax.config import Recipe, recipe_to_dict
from lara_jax.curriculum import Stage
from lara_jax.flops import mfu
from lara_jax.metrics import MetricsWriter, Scores
from lara_jax.optimizer import learning_rates
from lara_jax.profiling import Profiler

# Of a mixture's rows; stand beside its datasets.
KINDS = ("(not annotated)", "(annotated)")


class Log:
    """Rows of metrics with learning rates and speed; only the first process writes.

    Args:
      recipe: the run's settings.
      workdir: its directory.
      step: steps done.
    """

    def __init__(self, recipe: Recipe, workdir: Path, step: int) -> None:
        self._recipe = recipe
        self._rates = learning_rates(recipe.optimizer, recipe.stages, recipe.train.steps)
        self._writer = None
        if jax.process_index() == 0:
            self._writer = MetricsWriter(
                workdir,
                start_step=step,
                steps=recipe.train.steps,
                wandb_project=recipe.log.wandb_project,
                settings=recipe_to_dict(recipe),
            )
        self._profiler = Profiler(
            workdir / "profile",
            steps=recipe.log.profile_steps,
            signal_steps=recipe.log.profile_signal_steps,
        )
        self._step, self._done, self._compiles = step, None, True
        self._datasets: tuple[str, ...] = ()
        self._flops = 0
        self._by_dataset: list[Any] = []
        self._restart()

    def batches(
        self, batches: Iterable[Batch], *, datasets: Sequence[str], step_flops: int
    ) -> Iterator[Batch]:
        """The batches of a stage, with the time that the loop waits for each.

        Args:
          batches: of the stage.
          datasets: names, in the order of the stage's mixture.
          step_flops: model FLOPs of one of its steps on all devices.
        """
        self._datasets, self._flops, self._compiles = tuple(datasets), step_flops, True
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            if batch is None:
                return
            self._waited += time.monotonic() - start
            self._profiler.at(self._step + 1, self._done)
            yield batch

    def advance(self, metrics: Mapping[str, Any]) -> None:
        """Counts a step that was handed to the devices.

        Args:
          metrics: of the step, still on the devices.
        """
        self._step += 1
        self._steps += 1
        self._done = metrics["loss"]
        self._by_dataset.append(metrics["by_dataset"])
        if self._compiles:
            jax.block_until_ready(self._done)
            self._compiles = False
            self._restart()
        if self._writer:
            self._writer.advance()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside takes no time of the run."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def write(self, step: int, stage: Stage, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Fetches the metrics from the devices and writes a row.

        Returns:
          The row's numbers; what is no number, in a step that was skipped for it, is left out.
        """
        shown = {n: x for n, x in metrics.items() if n not in ("by_dataset", "verdict")}
        fetched = {name: float(value) for name, value in jax.device_get(shown).items()}
        values = {name: value for name, value in fetched.items() if math.isfinite(value)}
        rates = {f"rate_{part}": float(rate(step - 1)) for part, rate in self._rates.items()}
        values |= rates | self._speed()
        losses = self._dataset_losses()
        if self._writer:
            self._writer.write(step, stage.name, values)
            self._writer.write_scores("datasets", step, stage.name, losses)
        self._restart()
        return values

    def write_evaluation(self, step: int, stage: Stage, scores: Scores) -> dict[str, float]:
        """Writes what held-out evaluation has found.

        Returns:
          The mean of each metric over the datasets that have it, as `eval_<metric>`.
        """
        if self._writer:
            self._writer.write_scores("eval", step, stage.name, scores)
        by_metric: dict[str, list[float]] = {}
        for (_, metric), value in scores.items():
            by_metric.setdefault(f"eval_{metric}", []).append(value)
        return {metric: float(np.mean(values)) for metric, values in by_metric.items()}

    def close(self) -> None:
        """Ends a running trace and closes files and progress bar."""
        self._profiler.close(self._done)
        if self._writer:
            self._writer.close()

    def _restart(self) -> None:
        """Speed is counted anew."""
        self._steps, self._waited, self._since = 0, 0.0, time.monotonic()

    def _speed(self) -> dict[str, float]:
        """Since the last row; nothing after a step that had to compile."""
        memory = device_memory_gb()
        found = {} if memory is None else {"device_memory_gb": memory}
        if not self._steps:
            return found
        seconds = time.monotonic() - self._since
        samples = self._steps * self._recipe.data.batch_size
        found |= {
            "samples_per_second": samples / seconds,
            "data_wait_fraction": self._waited / seconds,
        }
        flops, dtype = self._flops * self._steps, self._recipe.model.compute_dtype
        used = mfu(flops, seconds, jax.devices(), dtype=dtype)
        return found if used is None else found | {"mfu": used}

    def _dataset_losses(self) -> dict[tuple[str, str], float]:
        """Mean losses of each dataset and kind of rows that came up since the last row."""
        parts = jax.device_get(self._by_dataset)
        self._by_dataset = []
        found = {}
        for name in parts[0] if parts else ():
            sums = np.stack([part[name] for part in parts]).sum(axis=0, dtype=np.float64)
            rows = [*zip(self._datasets, sums.sum(axis=1), strict=True)]
            for group, (total, count) in (*rows, *zip(KINDS, sums.sum(axis=0), strict=True)):
                if count:
                    found[group, f"loss_{name}"] = float(total / count)
        return found


def device_memory_gb() -> float | None:
    """The most that a device of this process has had in use, in 1e9 bytes; None on a CPU."""
    found = [device.memory_stats() for device in jax.local_devices()]
    used = [stats["peak_bytes_in_use"] for stats in found if stats and "peak_bytes_in_use" in stats]
    return max(used) / 1e9 if used else None
