"""`lara data VERB ...`: one table of verbs, each the `main` of a module, imported when called."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

VERBS: dict[str, tuple[str, str]] = {
    "index": ("data_pipelines.index.cli", "index a dataset: where its steps and frames lie"),
    "stats": ("data_pipelines.statistics", "statistics of actions and states"),
    "inspect": ("data_pipelines.inspect_page", "an HTML page that shows datasets"),
    "annotate": ("data_pipelines.annotate.annotate", "make reasoning annotations of a dataset"),
    "make-tabletop": (
        "data_pipelines.make_tabletop",
        "write an RLDS dataset of the built-in tabletop",
    ),
}


def option(parse: Callable[[str], T]) -> Callable[[str], T]:
    """For argparse's `type`: the user is told what `parse` has to say of a bad value."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def at_least_one(text: str) -> int:
    """A whole number from 1 on, in an option."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is no whole number from 1 on")
    return int(text)


def main(argv: Sequence[str]) -> int:
    """Runs one data verb.

    Args:
      argv: the verb and its arguments.

    Returns:
      The verb's exit code.
    """
    verbs = "\n".join(f"  {verb:<16}{summary}" for verb, (_, summary) in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="lara data",
        description="Makes and examines datasets.",
        epilog=f"verbs:\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=VERBS, metavar="VERB")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `lara data VERB --help`")
    arguments = parser.parse_args(argv)
    module, _ = VERBS[arguments.verb]
    return int(importlib.import_module(module).main(arguments.arguments))
