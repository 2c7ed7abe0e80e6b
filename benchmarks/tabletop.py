"""How fast the built-in tabletop steps and writes, and how often its scripted expert succeeds.

    python benchmarks/tabletop.py --json [--rounds 5] [--seconds 2] [--sizes 64,128,224]
    python benchmarks/tabletop.py --json --expert [--episodes 200]

    steps_per_second_S_px_1_camera    `TabletopEnv.step` with its image of S x S pixels
    steps_per_second_S_px_2_cameras   the same with the wrist camera's, too
    episodes_per_minute_S_px_...      demonstrations simulated, annotated and encoded
    expert_percent_FAMILY[_disturbed] episodes that the expert solves, as it is and with the
                                      disturbances of `lara data make-tabletop`

Rates are per second, or minute, of processor time of one process, so of one core. All families take
turns.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, product

from table import print_table
from tqdm import tqdm

from data_pipelines.make_tabletop import CollectConfig, demonstrate, make_episode
from lara_jax.evals.tabletop import (
    FAMILIES,
    TabletopConfig,
    TabletopEnv,
    episode_seed,
    expert_step,
)

CAMERAS = (("primary",), ("primary", "wrist"))


def steps_per_second(config: TabletopConfig, seconds: float) -> float:
    """Steps a second of processor time; laying the table and the expert's thoughts do not count."""
    env = TabletopEnv(config)
    spent, steps = 0.0, 0
    for index in count():
        family = config.families[index % len(config.families)]
        env.reset(seed=episode_seed(0, "eval", index), options={"family": family})
        over = False
        while not over:
            action = expert_step(env).action
            begin = time.process_time()
            _, _, solved, truncated, _ = env.step(action)
            spent += time.process_time() - begin
            steps += 1
            over = solved or truncated
            if spent >= seconds:
                return steps / spent
    raise AssertionError("count() ended")


def episodes_per_minute(config: TabletopConfig, seconds: float) -> float:
    """Episodes a minute of processor time."""
    begin = time.process_time()
    for index in count(1):
        make_episode(CollectConfig(tabletop=config), "train", index)
        spent = time.process_time() - begin
        if spent >= seconds and index % len(config.families) == 0:
            return index * 60 / spent
    raise AssertionError("count() ended")


def rates(rounds: int, seconds: float, sizes_px: Sequence[int]) -> Mapping[str, Sequence[float]]:
    """Every rate, once a round, in turns."""
    results: dict[str, list[float]] = {}
    for _ in tqdm(range(rounds), unit="round"):
        for cameras, size_px in product(CAMERAS, sizes_px):
            config = TabletopConfig(
                families=tuple(FAMILIES), cameras=cameras, image_size_px=size_px
            )
            what = f"{size_px}_px_{len(cameras)}_camera{'s' * (len(cameras) > 1)}"
            for name, measure in (
                (f"steps_per_second_{what}", steps_per_second),
                (f"episodes_per_minute_{what}", episodes_per_minute),
            ):
                results.setdefault(name, []).append(measure(config, seconds))
    return results


def expert_results(episodes: int) -> Iterator[tuple[str, float]]:
    """Percent of the episodes that the expert solves, per family."""
    disturbed = CollectConfig(tabletop=TabletopConfig(image_size_px=16, shadows=False))
    for family in FAMILIES:
        env = TabletopEnv(replace(disturbed.tabletop, families=(family,)))
        for config in (replace(disturbed, disturb_probability=0.0), disturbed):
            name = f"expert_percent_{family}{'_disturbed' * (config is disturbed)}"
            solved = sum(
                demonstrate(env, config, episode_seed(0, "eval", index)) is not None
                for index in tqdm(range(episodes), desc=name, unit="episode")
            )
            yield name, 100 * solved / episodes


def sizes(text: str) -> tuple[int, ...]:
    """`"64,128"` -> `(64, 128)`."""
    return tuple(map(int, text.split(",")))


def main(argv: Sequence[str]) -> int:
    """Measures, and prints a line for each name."""
    parser = argparse.ArgumentParser(prog="tabletop.py", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each rate in a round")
    parser.add_argument("--sizes", type=sizes, default=(64, 128, 224), help="of images, px")
    parser.add_argument("--expert", action="store_true", help="the expert's success, not rates")
    parser.add_argument("--episodes", type=int, default=200, help="of each family")
    arguments = parser.parse_args(argv)
    if arguments.expert:
        for name, percent in expert_results(arguments.episodes):
            print_table({name: [percent]}, as_json=arguments.json)
    else:
        results = rates(arguments.rounds, arguments.seconds, arguments.sizes)
        print_table(results, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
