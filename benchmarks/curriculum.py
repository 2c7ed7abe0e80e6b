"""Whether the curriculum helps: three stages against the last one alone, on the built-in data.

    python benchmarks/curriculum.py --json [--seeds 3] [--steps 1500] [--folder DIR] [--together 2]
        [--config.optimizer.base_rate=2e-3 ...]

Both ways take the same number of steps of the debug recipe, with the same batches, learning rates
and seeds; what differs is what the steps before the last stage teach. In the end both are asked for
the action chunks of held-out episodes.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
WAYS = {"three_stages": "explicit,latent_3,action", "action_alone": "action"}
# What the benchmark itself gives each run.
OWN_SETTINGS = (
    "data.path",
    "seed",
    "train.steps",
    "train.stages",
    "eval.every_steps",
    "eval.batches",
)
# metric of eval.csv -> name here, and its value there -> value here
METRICS = {
    "position_m": ("position_mm", lambda x: 1e3 * x),
    "rotation_rad": ("rotation_mrad", lambda x: 1e3 * x),
    "gripper_accuracy": ("gripper_wrong_percent", lambda x: 100 * (1 - x)),
    "loss_action": ("flow_loss", lambda x: x),
}


def lara(*arguments: str) -> None:
    """Runs a command of ours; what it says goes to standard error."""
    command = [sys.executable, "-m", "lara_jax.cli", *arguments]
    subprocess.run(command, cwd=REPOSITORY, stdout=sys.stderr, check=True)


def final_errors(workdir: Path) -> dict[str, float]:
    """The last evaluation of a run, by the names of `METRICS`."""
    with (workdir / "eval.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    last = max(int(row["step"]) for row in rows)
    values = {row["metric"]: float(row["value"]) for row in rows if int(row["step"]) == last}
    return {name: scaled(values[metric]) for metric, (name, scaled) in METRICS.items()}


def train_all(commands: Sequence[Sequence[str]], together: int) -> None:
    """Runs `lara train` of each, so many at a time, each on its own share of the cores.

    The networks are so small that a process with one core is more than half as fast as with two.
    """
    cores = sorted(os.sched_getaffinity(0))
    free: SimpleQueue[list[int]] = SimpleQueue()
    for number in range(together):
        free.put(cores[number::together])

    def one(command: Sequence[str]) -> None:
        mine = free.get()
        os.sched_setaffinity(0, mine)  # of this thread, and of what it starts
        lara("train", *command)
        free.put(mine)

    with ThreadPoolExecutor(together) as threads:
        list(tqdm(threads.map(one, commands), desc="runs", total=len(commands), file=sys.stderr))


def run(
    folder: Path, seeds: int, steps: int, episodes: int, together: int, changes: Sequence[str]
) -> dict[str, list[float]]:
    """Trains all with these changes to the recipe, and gives each error by seed."""
    data = folder / "data" / "lara_tabletop" / "1.0.0"
    if not (data / "dataset_info.json").is_file():
        out = str(folder / "data")
        lara("data", "make-tabletop", "--episodes", str(episodes), "--workers", "2", "--out", out)
    runs = {(seed, way): folder / f"{way}_{steps}_{seed}" for seed in range(seeds) for way in WAYS}
    commands = []
    for (seed, way), workdir in runs.items():
        values = (data, seed, steps, WAYS[way], steps, 16)
        settings = dict(zip(OWN_SETTINGS, values, strict=True))
        own = [f"--config.{key}={value}" for key, value in settings.items()]
        commands.append(["--config", "configs/debug.py", "--workdir", str(workdir), *changes, *own])
    train_all(commands, together)
    results: dict[str, list[float]] = {}
    for (_, way), workdir in runs.items():
        for name, value in final_errors(workdir).items():
            results.setdefault(f"{way}_{name}", []).append(value)
    one, other = WAYS
    for name, _ in METRICS.values():
        pairs = zip(results[f"{one}_{name}"], results[f"{other}_{name}"], strict=True)
        results[f"{one}_over_{other}_{name}"] = [a / b for a, b in pairs]
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="of each run, over all stages")
    parser.add_argument("--episodes", type=int, default=1000, help="of the built-in data")
    parser.add_argument("--together", type=int, default=1, help="runs at a time, sharing the cores")
    parser.add_argument("--folder", type=Path, help="keeps data and runs; a temporary one else")
    arguments, changes = parser.parse_known_args(argv)
    wrong = [
        change
        for change in changes
        if not change.startswith("--config.")
        or change.removeprefix("--config.").split("=")[0] in OWN_SETTINGS
    ]
    if wrong:
        parser.error(
            f"{' '.join(wrong)}: allowed besides the options are --config.KEY=VALUE of keys other "
            f"than {', '.join(OWN_SETTINGS)}"
        )
    with tempfile.TemporaryDirectory(prefix="lara_benchmark_") as temporary:
        folder = arguments.folder or Path(temporary)
        results = run(
            folder.resolve(),
            arguments.seeds,
            arguments.steps,
            arguments.episodes,
            arguments.together,
            changes,
        )
    for name, values in results.items():
        line = {"name": name, "value": statistics.median(values), "seeds": values}
        seeds = "  ".join(f"{value:.4g}" for value in values)
        print(json.dumps(line) if arguments.json else f"{name:52} {line['value']:>8.4g}  ({seeds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
