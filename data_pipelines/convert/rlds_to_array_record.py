"""Beam job: the frames of an indexed split as step records (see `step_shards`).

    python -m data_pipelines.convert.rlds_to_array_record --input data/bridge_dataset/1.0.0 \\
        --output data/bridge_steps --cameras image_0

The index of the output lies in its lara_index/SPLIT. Workers on other machines need --index: a copy
of the input's index in a bucket or on a shared disk.
"""

from collections.abc import Sequence
from functools import partial

from data_pipelines import storage
from data_pipelines.convert import pipeline
from data_pipelines.convert.output import new_folder
from data_pipelines.convert.shared_index import add_options, index_of
from data_pipelines.convert.step_shards import (
    WrittenShard,
    check_cameras,
    shard_count,
    write_records_index,
    write_shard_of,
)
from data_pipelines.index.build import SIDECAR
from data_pipelines.index.format import HEADER_FILE


def main(argv: Sequence[str]) -> int:
    """Converts a split; the last line on standard output is the new index's folder."""
    parser = pipeline.parser("rlds_to_array_record", "Writes a split's frames as step records.")
    add_options(parser)
    parser.add_argument("--cameras", help="names, joined by commas (default: all)")
    arguments, options = pipeline.parse(parser, argv)
    index, index_folder = index_of(arguments)
    cameras = arguments.cameras.split(",") if arguments.cameras else list(index.header.cameras)
    check_cameras(index, cameras)
    output = storage.absolute(arguments.output)
    folder = storage.join(output, f"{SIDECAR}/{arguments.split}")
    if storage.exists(storage.join(folder, HEADER_FILE)):
        raise ValueError(f"{folder} exists; choose another --output")
    results = pipeline.run(
        list(range(shard_count(index))),
        partial(write_shard_of, index_folder, index.source, output, cameras),
        storage.join(output, f".{arguments.split}.results"),
        options,
    )
    shards = [WrittenShard(**result) for result in results]
    with new_folder(folder) as local:
        write_records_index(local, index, shards, output, cameras)
    steps, size = sum(shard.steps for shard in shards), sum(shard.size for shard in shards)
    pipeline.say(f"{steps} steps in {len(shards)} files, {size / 1e6:.1f} MB")
    print(folder)
    return 0


if __name__ == "__main__":
    pipeline.call(main)
