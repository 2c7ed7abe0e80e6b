"""Beam job: a LeRobot data set as RLDS (see `rlds_shards`).

    python -m data_pipelines.convert.lerobot_to_rlds --input data/my_robot --output data/rlds \\
        --name my_robot
    lara data index data/rlds/my_robot/1.0.0 --definitions data/rlds/my_robot/1.0.0/definition.toml
"""

from collections.abc import Sequence
from functools import partial

from data_pipelines import storage
from data_pipelines.convert import pipeline
from data_pipelines.convert.rlds_shards import (
    WrittenEpisodes,
    tasks,
    write_description,
    write_shard,
)
from data_pipelines.lerobot.source import LeRobotSource
from data_pipelines.oxe.registry import load_definitions


def main(argv: Sequence[str]) -> int:
    """Converts a data set; the last line on standard output is the version directory."""
    parser = pipeline.parser("lerobot_to_rlds", "Converts a LeRobot data set to RLDS.")
    parser.add_argument("--name", help="of the new dataset (default: the folder's name)")
    parser.add_argument("--version", default="1.0.0", help="of the new dataset (default: 1.0.0)")
    parser.add_argument("--split", action="append", help="repeatable (default: train)")
    parser.add_argument("--definitions", help="TOML file with datasets of your own")
    arguments, options = pipeline.parse(parser, argv)
    known = load_definitions(arguments.definitions)[0] if arguments.definitions else None
    sources = {
        split: LeRobotSource.read(arguments.input, split, definitions=known)
        for split in arguments.split or ["train"]
    }
    (first, *_) = sources.values()
    name = arguments.name or first.source.rpartition("/")[2]
    folder = storage.join(storage.join(arguments.output, name), arguments.version)
    if storage.exists(storage.join(folder, "dataset_info.json")):
        raise ValueError(f"{folder} exists; choose another --output, --name or --version")
    results = pipeline.run(
        [task for source in sources.values() for task in tasks(source, name)],
        partial(write_shard, sources, folder),
        storage.join(folder, ".shards.jsonl"),
        options,
    )
    shards = [WrittenEpisodes(**result) for result in results]
    write_description(sources, folder, name, arguments.version, shards)
    episodes = sum(shard.episodes for shard in shards)
    pipeline.say(f"{episodes} episodes in {len(shards)} files")
    print(folder)
    return 0


if __name__ == "__main__":
    pipeline.call(main)
