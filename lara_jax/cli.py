"""The command `lara`: one verb, one function.

Every verb lives in the module that does the work; it is imported only when called, so that
`lara --help` is quick and a verb needs only its own dependencies.

    lara train --config configs/debug.py --workdir runs/debug
"""

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "train": ("lara_jax.train", "main", "train a recipe; run again, it resumes"),
    "eval": ("lara_jax.evals.cli", "main", "count successes in a simulator, or action errors"),
    "serve": ("lara_jax.serving.cli", "main", "answer robots over a websocket"),
    "report": ("lara_jax.evals.run_report", "main", "write a page about a run: curves, errors"),
    "export": ("lara_jax.interop.convert", "export_main", "write a checkpoint for PyTorch"),
    "import": ("lara_jax.interop.convert", "import_main", "make a checkpoint of PyTorch weights"),
    "check-golden": ("lara_jax.interop.golden", "main", "compare with numbers of the reference"),
    "checkpoint": ("lara_jax.checkpoint_cli", "main", "list, verify, delete, compare checkpoints"),
    "flops": ("lara_jax.flops", "main", "count the operations of a recipe's steps"),
    "aot": ("lara_jax.aot.cli", "main", "compile for TPUs that are not there; memory, time"),
    "data": ("data_pipelines.cli", "main", "index, examine, annotate and make data sets"),
}


def usage() -> str:
    """What `lara --help` prints."""
    lines = [f"  {verb:<14}{line}" for verb, (_, _, line) in VERBS.items()]
    return "\n".join(
        ["usage: lara VERB [ARGUMENTS...]", "", *lines, "", "`lara VERB --help` tells more."]
    )


WRONG_PATH = (
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Returns:
      0 when the verb did what it says, 2 on a wrong call or input (one line on standard error),
      1 when the work failed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    verb, *rest = argv
    if verb not in VERBS:
        print(f"lara: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    module, function, _ = VERBS[verb]
    try:
        return getattr(importlib.import_module(module), function)(rest)
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        status = exit_status(error)
        if status is None:
            raise
        print(f"lara {verb}: {' '.join(str(error).split())}", file=sys.stderr)
        return status


def exit_status(error: BaseException) -> int | None:
    """What a verb ends with after an error that is told in one line; None for any other error."""
    if isinstance(error, (ValueError, *WRONG_PATH)):
        return 2
    if isinstance(error, (FloatingPointError, OSError)):
        return 1
    # An extra that is not installed; any other import that fails is of our own, and to be mended.
    return 2 if isinstance(error, ImportError) and "lara-jax[" in str(error) else None


if __name__ == "__main__":
    sys.exit(main())
