"""`lara data make-tabletop`: demonstrations of the built-in tabletop as an RLDS dataset.

The scripted expert solves episode after episode. Now and then its action is disturbed before it is
executed, while the undisturbed one is recorded, so that the data show how to recover (as in DART,
arXiv 1703.09327). Each frame also gets what the expert is doing (subtask), where the block that it
moves and that block's target are (boxes) and where it is heading (motion).

Episodes take turns among the families of tasks. An episode depends on the seed and its number only,
so the bytes are the same for any number of worker processes.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.cli import option
from data_pipelines.rlds.directory import Feature
from data_pipelines.rlds.writer import encode_episode, write_dataset
from data_pipelines.storage import local_path
from lara_jax.evals.tabletop import (
    ExpertStep,
    Observation,
    TabletopConfig,
    TabletopEnv,
    episode_seed,
    expert_step,
)
from lara_jax.evals.tabletop.environment import ACTION_DIM, STATE_DIM
from lara_jax.evals.tabletop.tasks import FAMILIES

NAME, VERSION = "lara_tabletop", "1.0.0"
DESCRIPTION = (
    "A scripted gripper puts coloured blocks on coloured plates (MuJoCo, ray-cast images)."
)
IMAGES = {"primary": "image", "wrist": "wrist_image"}  # keys of the cameras below "observation/"


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """How demonstrations are collected.

    Attributes:
      tabletop: the scene.
      seed: of the whole dataset.
      disturb_probability: how often an executed action is disturbed.
      disturb_m: standard deviation of the disturbance along x, y and z.
    """

    tabletop: TabletopConfig = field(default_factory=TabletopConfig)
    seed: int = 0
    disturb_probability: float = 0.3
    disturb_m: float = 0.012

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 <= self.disturb_probability <= 1:
            raise ValueError(
                f"disturb_probability must lie in [0, 1], got {self.disturb_probability}"
            )
        if self.disturb_m < 0:
            raise ValueError(f"disturb_m must not be negative, got {self.disturb_m}")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One step of a demonstration: what was seen, what the expert did and why, what came of it."""

    observation: Observation
    expert: ExpertStep
    reward: float


def episode_features(
    image_size_px: int, cameras: Sequence[str] = ("primary",)
) -> tuple[Feature, ...]:
    """The dataset's schema, for images of this size from these cameras."""
    image = (image_size_px, image_size_px, 3)

    def step(key: str, kind: str, shape: tuple[int, ...] = (), dtype: str = "string") -> Feature:
        return Feature(key=f"steps/{key}", kind=kind, shape=shape, dtype=dtype, per_step=True)

    return (
        *(step(f"observation/{IMAGES[camera]}", "image", image, "uint8") for camera in cameras),
        step("observation/state", "tensor", (STATE_DIM,), "float32"),
        step("action", "tensor", (ACTION_DIM,), "float32"),
        step("language_instruction", "text"),
        *(step(f"is_{which}", "tensor", dtype="bool") for which in ("first", "last", "terminal")),
        step("reward", "tensor", dtype="float32"),
        step("discount", "tensor", dtype="float32"),
        step("reasoning/subtask", "text"),
        step("reasoning/boxes", "tensor", (2, 4), "float32"),
        step("reasoning/motion", "text"),
        Feature(key="episode_metadata/file_path", kind="text"),
        Feature(key="episode_metadata/family", kind="text"),
        Feature(key="episode_metadata/success", kind="tensor", dtype="bool"),
    )


def demonstrate(
    env: TabletopEnv, config: CollectConfig, seed: int, family: str | None = None
) -> list[Record] | None:
    """One episode of the disturbed expert.

    Args:
      env: a tabletop of `config.tabletop`.
      config: how to disturb.
      seed: of the episode.
      family: of its task; None for one of the config's by chance.

    Returns:
      Its steps, the last of which finishes the expert's work; None if it ran out of steps.
    """
    random = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed, options={"family": family} if family else None)
    records: list[Record] = []
    truncated = False
    while not (expert := expert_step(env)).done:
        if truncated:
            return None
        action = expert.action.copy()
        if random.random() < config.disturb_probability:
            action[:3] += random.normal(0, config.disturb_m, 3).astype(np.float32)
        after, reward, _, truncated, _ = env.step(action)
        records.append(Record(observation=observation, expert=expert, reward=reward))
        observation = after
    return records


def episode_values(records: Sequence[Record], file_path: str, family: str) -> dict[str, Any]:
    """The values of `episode_features` for one solved episode."""
    numbers = np.arange(len(records))
    observations = [dict(record.observation) for record in records]
    is_last = numbers == len(records) - 1
    return {
        **{
            f"steps/observation/{key}": [seen[camera] for seen in observations]
            for camera, key in IMAGES.items()
            if camera in observations[0]
        },
        "steps/observation/state": [record.observation["state"] for record in records],
        "steps/action": [record.expert.action for record in records],
        "steps/language_instruction": [record.observation["instruction"] for record in records],
        "steps/is_first": numbers == 0,
        "steps/is_last": is_last,
        "steps/is_terminal": is_last,
        "steps/reward": [record.reward for record in records],
        "steps/discount": 1.0 - is_last,
        "steps/reasoning/subtask": [record.expert.subtask for record in records],
        "steps/reasoning/boxes": [record.expert.boxes for record in records],
        "steps/reasoning/motion": [record.expert.motion for record in records],
        "episode_metadata/file_path": file_path,
        "episode_metadata/family": family,
        "episode_metadata/success": True,
    }


def make_episode(config: CollectConfig, stream: str, index: int) -> tuple[bytes, int] | None:
    """One episode by its number, from nothing: runs in any process.

    Args:
      config: how to collect.
      stream: "train" or "val".
      index: number of the episode in its stream.

    Returns:
      The serialised episode and its number of steps; None where the expert failed.
    """
    tabletop = config.tabletop
    family = tabletop.families[index % len(tabletop.families)]
    env = _environment(replace(tabletop, split=stream))
    records = demonstrate(env, config, episode_seed(config.seed, stream, index), family)
    if records is None:
        return None
    file_path = f"{NAME}/seed_{config.seed}/{stream}/{index:06d}"
    features = episode_features(tabletop.image_size_px, tabletop.cameras)
    return encode_episode(features, episode_values(records, file_path, family)), len(records)


@lru_cache(maxsize=1)
def _environment(config: TabletopConfig) -> TabletopEnv:
    """A process keeps its environment: the episodes do not depend on those before them."""
    return TabletopEnv(config)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was made: the version directory, what was written, and how often the expert failed."""

    path: Path
    train_episodes: int
    val_episodes: int
    steps: int
    failed_episodes: int


def make_dataset(
    out: str | os.PathLike[str],
    config: CollectConfig,
    *,
    episodes: int,
    val_episodes: int,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Collects both splits and writes them to out/lara_tabletop/1.0.0.

    Args:
      out: the directory that holds datasets.
      config: how to collect.
      episodes, val_episodes: attempts for "train" and "val"; those that fail are left out.
      workers: processes; the result is the same for any number.
      overwrite: replace an earlier dataset.

    Returns:
      What was made.

    Raises:
      ValueError: a number below 1, or the dataset exists.
    """
    for name, number in (
        ("episodes", episodes),
        ("val_episodes", val_episodes),
        ("workers", workers),
    ):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    written = {"train": 0, "val": 0}
    steps = failed = 0

    def collect(stream: str, attempts: int, pool: Pool | None) -> Iterator[bytes]:
        nonlocal steps, failed
        make = partial(make_episode, config, stream)
        made = pool.imap(make, range(attempts)) if pool else map(make, range(attempts))
        for episode in tqdm(made, total=attempts, desc=f"{NAME} {stream}", unit="episode"):
            if episode is None:
                failed += 1
                continue
            written[stream] += 1
            steps += episode[1]
            yield episode[0]

    # Started afresh (spawn), because a fork of a process with threads, as JAX's, may hang.
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(workers) if workers > 1 else nullcontext() as pool:
        path = write_dataset(
            out,
            name=NAME,
            version=VERSION,
            description=DESCRIPTION,
            features=episode_features(config.tabletop.image_size_px, config.tabletop.cameras),
            splits={
                "train": collect("train", episodes, pool),
                "val": collect("val", val_episodes, pool),
            },
            overwrite=overwrite,
        )
    return Summary(
        path=path,
        train_episodes=written["train"],
        val_episodes=written["val"],
        steps=steps,
        failed_episodes=failed,
    )


def names(text: str) -> tuple[str, ...]:
    """`"place,stack"` -> `("place", "stack")`."""
    return tuple(text.split(","))


def main(argv: Sequence[str]) -> int:
    """Runs `lara data make-tabletop`; the last line on standard output is the version directory."""
    parser = argparse.ArgumentParser(
        prog="lara data make-tabletop",
        description="Makes an RLDS dataset of the built-in tabletop.",
    )
    parser.add_argument(
        "--out", required=True, type=option(local_path), help="directory that holds datasets"
    )
    parser.add_argument("--episodes", required=True, type=int, help="episodes to try for training")
    parser.add_argument("--val-episodes", type=int, help="for validation (default: a tenth)")
    parser.add_argument(
        "--families", type=names, default=("place",), help=f"of tasks, of: {','.join(FAMILIES)}"
    )
    parser.add_argument(
        "--cameras", type=names, default=("primary",), help="primary or primary,wrist"
    )
    parser.add_argument(
        "--image-size", "--size", type=int, default=64, help="side of the images in pixels"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier dataset")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    arguments = parser.parse_args(argv)
    val_episodes = arguments.val_episodes
    if val_episodes is None:
        val_episodes = max(1, arguments.episodes // 10)
    tabletop = TabletopConfig(
        families=arguments.families,
        cameras=arguments.cameras,
        image_size_px=arguments.image_size,
    )
    start = time.perf_counter()
    summary = make_dataset(
        arguments.out,
        CollectConfig(tabletop=tabletop, seed=arguments.seed),
        episodes=arguments.episodes,
        val_episodes=val_episodes,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
    seconds = time.perf_counter() - start
    print(
        f"{summary.train_episodes} training and {summary.val_episodes} validation episodes, "
        f"{summary.steps} steps, {seconds:.0f} s; "
        f"left out {summary.failed_episodes} in which the expert failed",
        file=sys.stderr,
    )
    if arguments.json:
        print(json.dumps({**asdict(summary), "path": str(summary.path), "seconds": seconds}))
    else:
        print(summary.path)
    return 0
