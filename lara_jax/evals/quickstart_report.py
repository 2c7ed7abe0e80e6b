"""What the quick start shows at its end: losses, held-out action error, closed-loop success.

    lara eval --workdir DIR --suite tabletop --episodes 20 --gif DIR/episodes.gif --json \
        > DIR/eval.json
    python -m lara_jax.evals.quickstart_report --workdir DIR

prints a table of each, saves DIR/losses.png, and says the result in its last line.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.sampling import StepSource
from lara_jax import checkpoint
from lara_jax.data import open_mixture, statistics_from_dict
from lara_jax.evals.demonstrations import demonstrated
from lara_jax.evals.offline import ActionError
from lara_jax.evals.report import format_table, loss_table, plot_losses, read_curves
from lara_jax.evals.rollout import ALL, ChunkPolicy
from lara_jax.inference.policy import Policy

SAMPLES = 200


def held_out_error(
    policy: ChunkPolicy,
    source: StepSource,
    *,
    mean: np.ndarray,
    samples: int = SAMPLES,
    batch_size: int = 10,
) -> dict[str, ActionError]:
    """Action error of a policy and of both baselines on demonstrations it has not seen.

    Args:
      policy: from observations (a frame per view, state, instruction) to chunks of physical
        actions.
      source: the held-out steps, in chunks as long as the policy's.
      mean: float[7], the training set's mean action.
      samples: at most so many steps, evenly spread over the split.
      batch_size: observations per call, always as many, so that a jitted policy compiles once.

    Returns:
      By name: "policy", "mean action", "previous action".
    """
    found = demonstrated(policy, source, samples=samples, rows=batch_size)
    return found.errors(mean)[ALL]


def error_table(errors: Mapping[str, ActionError]) -> str:
    """The errors as a table, one line each."""
    header = ["held-out action error", "position (mm)", "rotation (mrad)", "gripper right (%)"]
    return format_table(
        header,
        [
            [name, 1e3 * e.position_m, 1e3 * e.rotation_rad, 100 * e.gripper_accuracy]
            for name, e in errors.items()
        ],
    )


def result_sentence(
    steps: int, errors: Mapping[str, ActionError], closed_loop: Mapping[str, Any]
) -> str:
    """The quick start's result in one sentence.

    Args:
      steps: training steps done.
      errors: what `held_out_error` returns.
      closed_loop: what `lara eval --json` prints.
    """
    mm = {name: f"{1e3 * error.position_m:.1f} mm" for name, error in errors.items()}
    low, high = 100 * closed_loop["ci_low"], 100 * closed_loop["ci_high"]
    return (
        f"Result: after {steps} training steps the policy with {closed_loop['latent_slots']} "
        f"latent slots solves {closed_loop['successes']} of {closed_loop['episodes']} unseen "
        f"episodes (95 % interval {low:.0f} to {high:.0f} %), and its held-out position error is "
        f"{mm['policy']} a step, against {mm['mean action']} for the mean action and "
        f"{mm['previous action']} for the previous action."
    )


def main(argv: Sequence[str]) -> int:
    """Prints and saves what a run of the quick start has come to."""
    parser = argparse.ArgumentParser(prog="python -m lara_jax.evals.quickstart_report")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's directory")
    workdir = parser.parse_args(argv).workdir
    closed_loop = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    curves = read_curves(workdir / "metrics.csv")
    plot_losses(curves, workdir / "losses.png")

    info = checkpoint.load_info(workdir)
    (source,) = open_mixture(info.recipe, info.recipe.data.eval_split).sources
    statistics = statistics_from_dict(info.statistics)[source.name]
    errors = held_out_error(
        Policy.from_workdir(workdir), source, mean=np.array(statistics.action.mean)
    )
    shown = ("suite", "task", "episodes", "successes", "success_rate", "ci_low", "ci_high")
    success = format_table(shown, [[closed_loop[name] for name in shown]])
    print(loss_table(curves), error_table(errors), success, sep="\n\n")
    print(f"\nSaved {workdir / 'losses.png'} and {workdir / 'episodes.gif'}.")
    steps = info.samples // info.recipe.data.batch_size
    print(result_sentence(steps, errors, closed_loop))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
