"""Steps that must not count: skipped on the device, reported with their samples, never silent.

    loss or gradient norm is nan or inf                       -> the step changes nothing but the
    loss or norm > factor * median of the stage's last 64,       counters
        and the norm is above what clipping allows            -> the same

A median needs 16 steps of the stage; before that only what is not finite is skipped. After too many
skipped steps in a row none counts any more, so that the run ends with the parameters from before
them although the next step is always under way.

The verdict is part of the compiled step, so parameters, moments and averages are never touched by a
bad batch. The host learns of it one step late, when the next step is already under way: it never
waits for the step it has just sent, and every host learns of it at the same step.
"""

import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from lara_jax.batch import Batch
from lara_jax.optimizer_config import SpikeConfig

WINDOW, FEWEST = 64, 16

Verdict = Mapping[str, jax.Array]


@flax.struct.dataclass
class Spikes:
    """What the verdict on a step rests on.

    Attributes:
      recent: float32[2, 64], loss and gradient norm of the last steps that counted; nan where there
        is none yet.
      stage: uint32[], which stage they are of: another stage's losses have other gradients.
      skipped: int32[], skipped steps of the run.     in_a_row: int32[], of them, up to now.
    """

    recent: jax.Array
    stage: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array


def no_spikes() -> Spikes:
    """Before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return Spikes(jnp.full((2, WINDOW), jnp.nan), jnp.zeros((), jnp.uint32), zero, zero)


def resumed(spikes: Spikes, config: SpikeConfig) -> Spikes:
    """As a run goes on with them: one that was ended by skipped steps counts them anew."""
    ended = spikes.in_a_row >= config.max_in_a_row
    return replace(spikes, in_a_row=jnp.where(ended, 0, spikes.in_a_row))


def judge(
    spikes: Spikes,
    loss: jax.Array,
    norm: jax.Array,
    stage: str,
    config: SpikeConfig,
    clip_norm: float,
) -> tuple[jax.Array, Spikes, Verdict]:
    """Whether a step counts.

    Args:
      spikes: up to this step.
      loss: float32[].
      norm: float32[], of the whole gradient.
      stage: the stage's name.
      config: the limits.
      clip_norm: a gradient within it is small enough never to be a spike.

    Returns:
      bool[]; the state after the step; and what `SkipReport` reads.
    """
    number = jnp.uint32(zlib.crc32(stage.encode()))
    recent = jnp.where(spikes.stage == number, spikes.recent, jnp.nan)
    now, usual = jnp.stack([loss, norm]), jnp.nanmedian(recent, axis=1)
    counts = jnp.isfinite(now).all() & (spikes.in_a_row < config.max_in_a_row)
    if config.factor:
        known = jnp.isfinite(recent[1]).sum() >= FEWEST
        counts &= ~(known & (now > config.factor * usual).any() & (norm > clip_norm))
    recent = jnp.where(counts, jnp.roll(recent, 1, axis=1).at[:, 0].set(now), recent)
    after = Spikes(
        recent=recent,
        stage=number,
        skipped=spikes.skipped + ~counts,
        in_a_row=jnp.where(counts, 0, spikes.in_a_row + 1),
    )
    verdict = {
        "in_a_row": after.in_a_row,
        "loss": loss,
        "gradient_norm": norm,
        "usual_loss": usual[0],
        "usual_norm": usual[1],
    }
    return counts, after, verdict


class SkipReport:
    """Says which steps were skipped, each as soon as the step after it has been sent.

    Args:
      datasets: their names, in the order of `Batch.dataset`.
      config: how many in a row are too many.
    """

    def __init__(self, datasets: Sequence[str], config: SpikeConfig) -> None:
        self._datasets, self._most = datasets, config.max_in_a_row
        self._pending: tuple[int, Verdict, Batch] | None = None
        self.too_many = False

    def follow(self, step: int, verdict: Verdict, batch: Batch) -> None:
        """Looks at the step before, and remembers this one."""
        self.finish()
        self._pending = step, verdict, batch

    def finish(self) -> None:
        """Looks at the step that is remembered; waits until it is done."""
        if self._pending is None:
            return
        step, verdict, batch = self._pending
        self._pending = None
        if int(verdict["in_a_row"]):
            numbers = {name: float(value) for name, value in verdict.items()}
            self.too_many |= numbers["in_a_row"] >= self._most
            print(self._line(step, numbers, batch), file=sys.stderr, flush=True)

    def stop_if_too_many(self, step: int) -> None:
        """Ends a run that cannot go on.

        Raises:
          FloatingPointError: `spike.max_in_a_row` steps in a row were skipped.
        """
        if self.too_many:
            raise FloatingPointError(
                f"{self._most} steps in a row were skipped (config.spike.max_in_a_row), with the "
                f"samples named above; the checkpoint of step {step} has the parameters from "
                "before them, and the same command goes on after them"
            )

    def _line(self, step: int, numbers: Mapping[str, float], batch: Batch) -> str:
        datasets, ids = np.asarray(batch.dataset).tolist(), np.asarray(batch.sample_id).tolist()
        samples = [f"{self._datasets[d]}:{i}" for d, i in zip(datasets, ids, strict=True)]
        usual = (
            f" (usually {numbers['usual_loss']:.4g} and {numbers['usual_norm']:.4g})"
            if np.isfinite(numbers["usual_norm"])
            else ""
        )
        return (
            f"step {step} skipped, {numbers['in_a_row']:.0f} in a row: loss {numbers['loss']:.4g}, "
            f"gradient norm {numbers['gradient_norm']:.4g}{usual}; samples {' '.join(samples)}"
        )
