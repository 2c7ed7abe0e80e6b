"""What the Beam jobs share: their command line, and a pipeline that works on elements.

    elements -> spread over the workers -> function(element) -> one JSON object each -> results

Only the jobs import this module: Beam lives in an environment of its own.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines import storage


def parser(job: str, description: str) -> argparse.ArgumentParser:
    """A command line with --input and --output; `parse` reads it."""
    parser = argparse.ArgumentParser(
        prog=f"python -m data_pipelines.convert.{job}",
        description=description,
        epilog="All other options go to Beam, such as --runner DataflowRunner.",
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, help="dataset: path or URL")
    parser.add_argument("--output", required=True, help="path or URL")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Any, PipelineOptions]:
    """A job's own options, and the others, which are Beam's; what neither knows ends the job."""
    arguments, others = parser.parse_known_args(argv)
    beams: list[argparse.ArgumentParser] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=beams.append)
    unknown = beams[0].parse_known_args(others)[1]
    if unknown:  # Beam itself would only warn
        parser.error(f"neither the job nor Beam knows {' '.join(unknown)}; see --help")
    return arguments, PipelineOptions(others)


def run(
    elements: Sequence[Any], function: Callable[[Any], Any], results: str, options: PipelineOptions
) -> list[dict[str, Any]]:
    """Applies a function to every element, on as many workers as the runner has.

    Args:
      elements: small values that pickle.
      function: of a module that workers can import, or a `partial` of one; gives a dataclass of
        plain values.
      results: a path or URL for a file in between.
      options: Beam's.

    Returns:
      The results by their fields, in any order.
    """
    with beam.Pipeline(options=options) as pipeline:
        lines = (
            pipeline
            | "elements" >> beam.Create(elements)
            | "spread" >> beam.Reshuffle()
            | "work" >> beam.Map(function)
            | "as JSON" >> beam.Map(_as_json)
        )
        write(lines, results)
    return read(results)


def write(lines: Any, results: str) -> None:
    """Writes a collection of a few lines of JSON to one file."""
    lines | "results" >> beam.io.WriteToText(results, num_shards=1, shard_name_template="")


def read(results: str) -> list[dict[str, Any]]:
    """What `write` wrote, once its pipeline has ended; the file is deleted."""
    lines = storage.read_text(results).splitlines()
    FileSystems.delete([results])
    return [json.loads(line) for line in lines]


def say(message: str) -> None:
    """Tells the user what came of it."""
    print(message, file=sys.stderr)


def call(job: Callable[[Sequence[str]], int]) -> None:
    """Runs a job as a command; a wrong call or input is one line and exit code 2."""
    try:
        code = job(sys.argv[1:])
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        name = os.path.basename(sys.argv[0]).removesuffix(".py")
        say(f"{name}: {' '.join(str(error).split())}")
        code = 2
    sys.exit(code)


def _as_json(result: Any) -> str:
    return json.dumps(asdict(result))
