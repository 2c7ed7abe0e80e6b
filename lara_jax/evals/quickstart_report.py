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

from data_pipelines.episodes import EpisodeTable, StepSource, load_episodes
from data_pipelines.stats import DatasetStatistics
from lara_jax import checkpoint
from lara_jax.evals.offline import ActionError, compare
from lara_jax.evals.report import format_table, loss_table, plot_losses, read_curves
from lara_jax.evals.rollout import ChunkPolicy
from lara_jax.inference.policy import Policy

SAMPLES = 200
# What a policy is told at the start of an episode, where nothing was executed before.
NO_MOTION_OPEN = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


def held_out_error(
    policy: ChunkPolicy,
    table: EpisodeTable,
    *,
    action_horizon: int,
    mean: np.ndarray,
    samples: int = SAMPLES,
    batch_size: int = 10,
) -> dict[str, ActionError]:
    """Action error of a policy and of both baselines on demonstrations it has not seen.

    Args:
      policy: from observations (a frame per view, state, instruction) to chunks of physical
        actions.
      table: the held-out episodes.
      action_horizon: C of the policy.
      mean: float[7], the training set's mean action.
      samples: at most so many steps, evenly spread over the split.
      batch_size: observations per call, always as many, so that a jitted policy compiles once.

    Returns:
      By name: "policy", "mean action", "previous action".
    """
    source = StepSource(table, action_horizon=action_horizon)
    chosen = np.unique(np.linspace(0, len(source) - 1, samples).astype(int))
    items = [source[index] for index in chosen]
    observations = [
        dict(zip(table.views, item["images"], strict=True))
        | {"state": item["state"], "instruction": item["instruction"]}
        for item in items
    ]
    chunks = []
    for start in range(0, len(items), batch_size):
        some = observations[start : start + batch_size]
        padded = some + some[:1] * (batch_size - len(some))
        chunks.append(np.asarray(policy(padded))[: len(some)])
    return compare(
        np.concatenate(chunks),
        np.stack([item["actions"] for item in items]),
        np.stack([item["action_mask"] for item in items]),
        previous=np.stack([_previous_action(table, index) for index in chosen]),
        mean=mean,
    )


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


def _previous_action(table: EpisodeTable, index: int) -> np.ndarray:
    """The demonstrated action before a step, float32[7]."""
    episode, row = table.locate(index)
    return episode.actions[row - 1] if row else NO_MOTION_OPEN


def main(argv: Sequence[str]) -> int:
    """Prints and saves what a run of the quick start has come to."""
    parser = argparse.ArgumentParser(prog="python -m lara_jax.evals.quickstart_report")
    parser.add_argument("--workdir", required=True, type=Path, help="the run's directory")
    workdir = parser.parse_args(argv).workdir
    closed_loop = json.loads((workdir / "eval.json").read_text(encoding="utf-8"))
    curves = read_curves(workdir / "metrics.csv")
    plot_losses(curves, workdir / "losses.png")

    info = checkpoint.load_info(workdir)
    data = info.recipe.data
    errors = held_out_error(
        Policy.from_workdir(workdir),
        load_episodes(data.path, data.eval_split, views=data.views),
        action_horizon=info.recipe.model.action_horizon,
        mean=np.array(DatasetStatistics.from_dict(info.statistics).action.mean),
    )
    shown = ("suite", "task", "episodes", "successes", "success_rate", "ci_low", "ci_high")
    success = format_table(shown, [[closed_loop[name] for name in shown]])
    print(loss_table(curves), error_table(errors), success, sep="\n\n")
    print(f"\nSaved {workdir / 'losses.png'} and {workdir / 'episodes.gif'}.")
    print(result_sentence(info.position, errors, closed_loop))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
