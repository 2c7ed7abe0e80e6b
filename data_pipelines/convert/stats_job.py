"""Beam job: statistics for normalisation, straight from the files (see `shard_statistics`).

    python -m data_pipelines.convert.stats_job --input data/bridge_dataset/1.0.0 \\
        --output bridge_statistics.json

An index is not needed; where there is one, `lara data stats` is quicker.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import apache_beam as beam

from data_pipelines import storage
from data_pipelines.convert import pipeline
from data_pipelines.convert.output import new_file
from data_pipelines.convert.shard_statistics import Totals, result_json, shard_totals
from data_pipelines.index.build import open_source
from data_pipelines.index.format import FLAGS
from data_pipelines.oxe.spec import DatasetSpec
from data_pipelines.statistics import DatasetStatistics


class MergeTotals(beam.CombineFn):
    """Adds up the totals of shards, on each worker and then over all of them."""

    def __init__(self, spec: DatasetSpec) -> None:
        self.spec = spec

    def create_accumulator(self) -> Totals:
        """Of nothing."""
        return Totals.empty(self.spec)

    def add_input(self, accumulator: Totals, element: Totals) -> Totals:
        """With one more shard."""
        accumulator.merge(element)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[Totals]) -> Totals:
        """Of several workers."""
        total = self.create_accumulator()
        for accumulator in accumulators:
            total.merge(accumulator)
        return total

    def extract_output(self, accumulator: Totals) -> Totals:
        """The sum."""
        return accumulator


def main(argv: Sequence[str]) -> int:
    """Takes the statistics of a whole split; the last line on standard output is their file."""
    parser = pipeline.parser("stats_job", "Takes a split's statistics, as `lara data stats`.")
    parser.add_argument("--split", default="train", help="of the input (default: train)")
    parser.add_argument("--definitions", help="TOML file with datasets of your own")
    parser.add_argument("--name", help="of the input's dataset, whatever its files call it")
    parser.add_argument(
        "--filter", action="append", default=[], choices=FLAGS, help="rows not to count; repeatable"
    )
    parser.add_argument("--stride", type=int, default=1, help="of the actions (default: 1)")
    arguments, options = pipeline.parse(parser, argv)
    source = open_source(
        arguments.input,
        arguments.split,
        name=arguments.name,
        definitions=arguments.definitions,
    )
    output = storage.absolute(arguments.output)
    count = partial(shard_totals, source, filters=arguments.filter, stride=arguments.stride)
    with beam.Pipeline(options=options) as job:
        totals = (
            job
            | "shards" >> beam.Create(list(range(len(source.shards))))
            | "spread" >> beam.Reshuffle()
            | "count" >> beam.Map(count)
            | "merge" >> beam.CombineGlobally(MergeTotals(source.spec))
        )
        as_json = partial(result_json, source.spec, arguments.stride)
        pipeline.write(totals | "result" >> beam.Map(as_json), f"{output}.results")
    (values,) = pipeline.read(f"{output}.results")
    statistics = DatasetStatistics.from_dict(values)
    with new_file(output) as file:
        statistics.save(file)
    pipeline.say(f"{statistics.steps} steps of {statistics.episodes} episodes")
    print(output)
    return 0


if __name__ == "__main__":
    pipeline.call(main)
