"""`lara eval --suite offline`: action error on held-out demonstrations, by phase of the task.

    steps spread evenly over a dataset's held-out split --policy--> chunks
        --compared with the demonstrated ones, and with two baselines--> errors by phase

A step's phase is the verb of its annotated subtask ("lower to the red block" -> "lower"); without
an annotation, what the demonstrated gripper does: before it first closes, while it is closed, and
after. A chunk counts to the phase of the step that it starts at.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipelines.sampling import StepSource, action_chunks
from lara_jax.checkpoint import load_average, load_info, load_params
from lara_jax.data import open_mixture
from lara_jax.evals.offline import ACTION_DIM, GRIPPER, ActionError, compare
from lara_jax.evals.report import format_table
from lara_jax.evals.rollout import ALL, ChunkPolicy
from lara_jax.inference.policy import Policy
from lara_jax.train_step import acting_params

ENCODING = "EEF_POS"
SAMPLES, ROWS = 500, 10
# What a policy is told at the start of an episode, where nothing was executed before.
NO_MOTION_OPEN = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
OTHER = "other"
MOST_PHASES = 12
BEFORE, HOLDING, AFTER = "before the grasp", "holding", "after"


@dataclass(frozen=True, kw_only=True)
class Demonstrated:
    """Steps of demonstrations, and what a policy does there.

    Attributes:
      predicted, target: float32[N, C, 7] chunks in physical units.
      mask: bool[N, C], True where the target lies inside its episode.
      previous: float32[N, 7], the demonstrated action before the step.
      phases: N names.
    """

    predicted: np.ndarray
    target: np.ndarray
    mask: np.ndarray
    previous: np.ndarray
    phases: tuple[str, ...]

    def errors(self, mean: np.ndarray) -> dict[str, dict[str, ActionError]]:
        """By phase, in order of appearance, "all" last: what `offline.compare` returns.

        Args:
          mean: float[7], the training set's mean action.
        """
        names = np.array(self.phases)
        which = {phase: names == phase for phase in dict.fromkeys(self.phases)}
        which[ALL] = np.ones(len(names), bool)
        return {
            phase: compare(
                self.predicted[rows],
                self.target[rows],
                self.mask[rows],
                previous=self.previous[rows],
                mean=mean,
            )
            for phase, rows in which.items()
        }

    def lines(self, mean: np.ndarray) -> list[dict[str, Any]]:
        """The errors as `--json` prints them: an object a phase, baselines by prefix."""
        return [
            {
                "phase": phase,
                "samples": len(self.phases) if phase == ALL else self.phases.count(phase),
                **flat(of),
            }
            for phase, of in self.errors(mean).items()
        ]


def demonstrated(
    policy: ChunkPolicy, source: StepSource, *, samples: int = SAMPLES, rows: int = ROWS
) -> Demonstrated:
    """What a policy does where a demonstration is known.

    Args:
      policy: from observations (a frame per view, state, instruction) to chunks of physical
        actions.
      source: the held-out steps, in chunks as long as the policy's.
      samples: at most so many steps, evenly spread.
      rows: observations per call, always as many, so that a jitted policy compiles once.

    Raises:
      ValueError: there is no step, or its actions are of another kind.
    """
    encoding = source.index.spec.action_encoding
    if encoding != ENCODING:
        raise ValueError(
            f"dataset {source.name!r} has {encoding} actions; errors in metres and radians are "
            f"those of {ENCODING}"
        )
    if not len(source):
        raise ValueError(f"dataset {source.name!r} has no step to evaluate on")
    chosen = np.unique(np.linspace(0, len(source) - 1, samples).astype(int))
    items = [source[number] for number in chosen]
    observations = [
        {
            **{
                view: image if is_there else None
                for view, image, is_there in zip(
                    source.views, item["images"], item["view_mask"], strict=True
                )
            },
            "state": item["state"],
            "instruction": item["instruction"],
        }
        for item in items
    ]
    chunks = []
    for start in range(0, len(items), rows):
        some = observations[start : start + rows]
        chunks.append(np.asarray(policy(some + some[:1] * (rows - len(some))))[: len(some)])
    annotated = [item["annotation"].subtask if item["annotation"] else "" for item in items]
    numbers = chosen.tolist()
    return Demonstrated(
        predicted=np.concatenate(chunks),
        target=np.stack([item["actions"][:, :ACTION_DIM] for item in items]),
        mask=np.stack([item["action_mask"][:, :ACTION_DIM].all(axis=-1) for item in items]),
        previous=np.stack([previous_action(source, number) for number in numbers]),
        phases=few(
            [
                verb(subtask) or gripper_phase(source, number)
                for subtask, number in zip(annotated, numbers, strict=True)
            ]
        ),
    )


def verb(subtask: str) -> str:
    """The first word of a subtask: "Lower to the red block." -> "lower"; "" -> ""."""
    return next(iter(subtask.split()), "").strip(".,:;").lower()


def gripper_phase(source: StepSource, number: int) -> str:
    """What the demonstrated gripper does at a step: not yet closed, closed, or open again."""
    row = source.row(number)
    first = int(source.index.episode_of(row)["first_row"])
    is_open = source.index.actions[first : row + 1, GRIPPER] > 0.5
    if not is_open[-1]:
        return HOLDING
    return BEFORE if is_open.all() else AFTER


def few(phases: Sequence[str]) -> tuple[str, ...]:
    """The phases, those beyond the MOST_PHASES most frequent ones as "other"."""
    names, counts = np.unique(list(phases), return_counts=True)
    kept = set(names[np.argsort(-counts, kind="stable")][:MOST_PHASES].tolist())
    return tuple(phase if phase in kept else OTHER for phase in phases)


def previous_action(source: StepSource, number: int) -> np.ndarray:
    """The demonstrated action before a step, as chunks have it, float32[7]."""
    row = source.row(number)
    episode = source.index.episode_of(row)
    before = row - source.stride
    if before < episode["first_row"]:
        return NO_MOTION_OPEN
    end = np.array([episode["first_row"] + episode["rows"]])
    actions, _ = action_chunks(
        source.index.actions, np.array([before]), end, 1, source.absolute, source.stride
    )
    return actions[0, 0]


def run(arguments: argparse.Namespace) -> int:
    """`lara eval --suite offline`; its options are `lara_jax.evals.cli`'s."""
    info = load_info(arguments.workdir, arguments.step)
    average = load_average(arguments.workdir, arguments.step)
    params = acting_params(load_params(arguments.workdir, arguments.step), average, info.recipe)
    split = arguments.split or info.recipe.data.eval_split
    sources = {source.name: source for source in open_mixture(info.recipe, split).sources}
    if arguments.dataset is not None and arguments.dataset not in sources:
        raise ValueError(f"unknown dataset {arguments.dataset!r}, allowed: {', '.join(sources)}")
    lines: list[dict[str, Any]] = []
    for name in [arguments.dataset] if arguments.dataset else sources:
        policy = Policy(info, params, latent_slots=arguments.latent_slots, dataset=name)
        found = demonstrated(policy, sources[name], samples=arguments.samples or SAMPLES)
        facts = {"dataset": name, "split": split, "latent_slots": policy.latent_slots}
        lines += [
            {"suite": arguments.suite, **facts, **line}
            for line in found.lines(np.array(policy.statistics.action.mean))
        ]
    if arguments.json:
        for line in lines:
            print(json.dumps(line))
    else:
        print(phase_table(lines))
    return 0


def flat(errors: Mapping[str, ActionError]) -> dict[str, float]:
    """{"policy": ..., "mean action": ...} -> {"position_m": ..., "mean_action_position_m": ...}."""
    return {
        ("" if who == "policy" else who.replace(" ", "_") + "_") + name: value
        for who, error in errors.items()
        for name, value in asdict(error).items()
    }


def phase_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines as a table: mm, mrad and percent; "mean's" and "last's" are the baselines'."""
    columns = [
        (who + name, whose + unit, factor)
        for name, unit, factor in (
            ("position_m", "mm", 1e3),
            ("rotation_rad", "mrad", 1e3),
            ("gripper_accuracy", "gripper %", 1e2),
        )
        for who, whose in (("", ""), ("mean_action_", "mean's "), ("previous_action_", "last's "))
    ]
    header = ["dataset", "phase", "samples"]
    return format_table(
        [*header, *(title for _, title, _ in columns)],
        [
            [*(line[name] for name in header), *(factor * line[n] for n, _, factor in columns)]
            for line in lines
        ],
    )
