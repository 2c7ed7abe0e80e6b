"""A checkpoint is a run: enough to resume, evaluate, serve or export from its directory alone.

    DIR/checkpoints/<step>/
      params/        the model's parameters, float32          (Orbax)
      training/      step, optimizer, EMA teacher, random key (Orbax; absent in imported weights)
      position/      where the data stands: samples taken     (JSON, like the three below)
      statistics/    what actions and states are scaled by
      tokenizer/     its files
      recipe/        every setting of the run
      checksums.json CRC-32C of each file above, written last

Saving is asynchronous and atomic: files go to a temporary directory that gets its name when all of
them are there, so a checkpoint that was cut off is never seen. Arrays are restored straight to
where the abstract state says they live, so another mesh or device count is nothing special.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import jax
import numpy as np
import orbax.checkpoint as ocp

from lara_jax.config import Recipe, recipe_from_dict, recipe_to_dict

CHECKSUMS = "checksums.json"
COMPLETE = "_CHECKPOINT_METADATA"  # Orbax's mark
JSON_ITEMS = ("position", "statistics", "tokenizer", "recipe")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a checkpoint holds besides arrays.

    Attributes:
      recipe: the run's settings.
      statistics: plain JSON values, as the data pipeline made them.
      tokenizer: text of each file of the tokenizer, by file name.
      samples: how many the run has taken from its stream of steps.
      stream: fingerprint of that stream (`MixtureSource.fingerprint`); empty before training.
    """

    recipe: Recipe
    statistics: Mapping[str, Any]
    tokenizer: Mapping[str, str]
    samples: int = 0
    stream: str = ""

    def to_items(self) -> dict[str, Any]:
        """JSON values by checkpoint item."""
        return {
            "position": {"samples": self.samples, "stream": self.stream},
            "statistics": dict(self.statistics),
            "tokenizer": dict(self.tokenizer),
            "recipe": recipe_to_dict(self.recipe),
        }


class CheckpointStore:
    """Writes and restores the checkpoints of one run.

    Args:
      workdir: the run's directory; made where it is missing.
      keep: newest checkpoints kept; None keeps all.
    """

    def __init__(self, workdir: str | Path, *, keep: int | None = None) -> None:
        self._root = Path(workdir).absolute() / "checkpoints"
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._root,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(steps(self._root), default=None)

    def folder(self, step: int) -> Path:
        """Where a checkpoint lies."""
        return self._root / str(step)

    def save(self, step: int, state: Any, info: RunInfo) -> None:
        """Saves in the background; waits only for an earlier save that still runs.

        Args:
          step: the checkpoint's number: steps done.
          state: with `params` and the fields of `TrainState`.
          info: everything else.
        """
        self._save(step, {"params": state.params, "training": _training(state)}, info)

    def save_params(self, params: Any, info: RunInfo, *, step: int = 0) -> None:
        """Saves parameters without a training state, e.g. imported weights."""
        self._save(step, {"params": params}, info)

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state as saved, each array where the abstract state's sharding says.

        Args:
          abstract_state: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
          step: a complete checkpoint. Without `training/` in it (imported weights) only the
            parameters come back, see `has_training`.

        Raises:
          ValueError: when names or shapes of the checkpoint are not those of the state.
        """
        folder = self.folder(step)
        params = _read_tree(folder / "params", abstract_state.params)
        wanted = _training(abstract_state)
        training = _read_tree(folder / "training", wanted)
        training["rng"] = jax.random.wrap_key_data(training["rng"])
        return abstract_state.replace(params=params, **training)

    def has_training(self, step: int) -> bool:
        """Whether the checkpoint can be resumed, or holds parameters only."""
        return (self.folder(step) / "training").is_dir()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _save(self, step: int, trees: dict[str, Any], info: RunInfo) -> None:
        self._manager.wait_until_finished()
        self._saving = step
        items: dict[str, Any] = {n: ocp.args.PyTreeSave(tree) for n, tree in trees.items()}
        items |= {name: ocp.args.JsonSave(value) for name, value in info.to_items().items()}
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _write_checksums(self) -> None:
        """Runs when all items are written, before the temporary directory gets its name."""
        if jax.process_index() == 0:
            (folder,) = self._root.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1))


def steps(directory: str | Path) -> list[int]:
    """Complete checkpoints below a `checkpoints` directory, ascending."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in directory.iterdir()
        if entry.name.isdigit() and (entry / COMPLETE).is_file()
    )


def find(directory: str | Path, step: int | None = None) -> Path:
    """The directory of one checkpoint.

    Args:
      directory: a run's directory, its `checkpoints`, or one checkpoint's own.
      step: which; the newest when None.

    Raises:
      FileNotFoundError: when there is none.
    """
    directory = Path(directory).absolute()
    if (directory / "params").is_dir() and step is None:
        return directory
    root = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    known = steps(root)
    if not known:
        raise FileNotFoundError(f"no checkpoint in {directory}")
    if step is not None and step not in known:
        raise FileNotFoundError(f"no checkpoint of step {step} in {directory}; there are {known}")
    return root / str(known[-1] if step is None else step)


def load_params(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """The parameters as a nested dict of float32 NumPy arrays; needs no model."""
    return _read_tree(find(directory, step) / "params", None)


def restore_params(directory: str | Path, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters, each where the abstract tree's sharding says."""
    return _read_tree(find(directory, step) / "params", abstract_params)


def load_info(directory: str | Path, step: int | None = None) -> RunInfo:
    """Recipe, statistics, tokenizer and data position of a checkpoint."""
    folder = find(directory, step)
    items = {name: _read_json(folder / name) for name in JSON_ITEMS}
    return RunInfo(
        recipe=recipe_from_dict(items["recipe"]),
        statistics=items["statistics"],
        tokenizer=items["tokenizer"],
        samples=items["position"]["samples"],
        stream=items["position"]["stream"],
    )


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    """{"text/norm/scale": array, ...} of nested parameters, sorted by path."""
    flat: dict[str, np.ndarray] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return dict(sorted(flat.items()))


def digest(params: Mapping[str, Any]) -> str:
    """SHA-256 over the float32 bytes of all parameters, sorted by path."""
    sha = hashlib.sha256()
    for value in flatten(params).values():
        sha.update(np.ascontiguousarray(value, dtype="<f4").tobytes())
    return sha.hexdigest()


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, str]:
    """The largest difference of a parameter, relative to its largest entry, and its path.

    Raises:
      ValueError: when paths or shapes differ, with the list.
    """
    left, right = flatten(a), flatten(b)
    wrong = [f"only one has {path}" for path in sorted(left.keys() ^ right.keys())]
    for path in left.keys() & right.keys():
        if left[path].shape != right[path].shape:
            wrong.append(f"{path}: {left[path].shape} and {right[path].shape}")
    if wrong:
        raise ValueError("the parameters are not those of one model: " + "; ".join(wrong))
    worst = (0.0, "")
    for path, x in left.items():
        y = right[path]
        scale = max(np.abs(x).max(initial=0), np.abs(y).max(initial=0))
        error = float(np.abs(x - y).max(initial=0) / scale) if scale else 0.0
        worst = max(worst, (math.inf if math.isnan(error) else error, path))
    return worst


def verify(folder: Path) -> list[str]:
    """Checks files against their checksums, and parameters for finite float32 numbers.

    Returns:
      What is wrong, one line each; nothing when all is well.
    """
    wrong = [
        f"{name} is missing" for name in ("params", *JSON_ITEMS) if not (folder / name).is_dir()
    ]
    if (folder / CHECKSUMS).is_file():
        try:
            expected = json.loads((folder / CHECKSUMS).read_text())
        except ValueError as error:
            return [*wrong, f"{CHECKSUMS} is damaged: {error}"]
        found = _checksums(folder)
        wrong += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
        wrong += [f"{name} is new" for name in sorted(found.keys() - expected.keys())]
        both = sorted(expected.keys() & found.keys())
        wrong += [f"{name} has changed" for name in both if expected[name] != found[name]]
    else:
        wrong.append(f"{CHECKSUMS} is missing")
    if wrong:
        return wrong
    for path, value in flatten(load_params(folder)).items():
        if value.dtype != np.float32:
            wrong.append(f"{path} is {value.dtype}, not float32")
        elif not np.isfinite(value).all():
            wrong.append(f"{path} has values that are not finite")
    return wrong


def main(argv: Sequence[str]) -> int:
    """`lara checkpoint ls|verify|rm|compare`."""
    parser = argparse.ArgumentParser(prog="lara checkpoint", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, line in (
        ("ls", "list the checkpoints of a run"),
        ("verify", "check files and numbers; the last line is the parameters' SHA-256"),
        ("rm", "delete a checkpoint"),
    ):
        sub = verbs.add_parser(verb, help=line, description=line)
        sub.add_argument("directory", metavar="DIR")
        if verb == "ls":
            sub.add_argument("--json", action="store_true", help="one object a line")
        else:
            sub.add_argument("--step", type=int, required=verb == "rm")
        if verb == "verify":
            sub.add_argument("--digest", action="store_true", help="print only the SHA-256")
    sub = verbs.add_parser("compare", help="exit 1 if the parameters of A and B differ")
    sub.add_argument("a", metavar="A")
    sub.add_argument("b", metavar="B")
    sub.add_argument("--rtol", type=float, default=0.0, help="of a parameter's largest entry")
    args = parser.parse_args(argv)
    return {"ls": _ls, "verify": _verify, "rm": _rm, "compare": _compare}[args.verb](args)


def _ls(args: argparse.Namespace) -> int:
    root = find(args.directory).parent
    for step in steps(root):
        folder = root / str(step)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        missing = [name for name in ("params", *JSON_ITEMS) if not (folder / name).is_dir()]
        resumable = (folder / "training").is_dir() and not missing
        row = {"step": step, "bytes": size, "resumable": resumable, "path": str(folder)}
        if args.json:
            print(json.dumps(row))
        else:
            kind = "resumable" if resumable else "parameters only"
            kind = f"lacks {', '.join(missing)}" if missing else kind
            print(f"{step:>10}  {size / 2**20:10.1f} MiB  {kind:<15}  {folder}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    folder = find(args.directory, args.step)
    wrong = verify(folder)
    for line in wrong:
        print(f"{folder}: {line}", file=sys.stderr)
    if wrong:
        return 1
    params = load_params(folder)
    if not args.digest:
        flat = flatten(params)
        count = sum(value.size for value in flat.values())
        print(f"{folder}: {len(flat)} arrays, {count:,} parameters, all files as written")
    print(digest(params))
    return 0


def _rm(args: argparse.Namespace) -> int:
    folder = find(args.directory, args.step)
    shutil.rmtree(folder)
    print(f"deleted {folder}", file=sys.stderr)
    return 0


def _compare(args: argparse.Namespace) -> int:
    error, path = difference(load_params(args.a), load_params(args.b))
    close = error <= args.rtol
    verdict = "within" if close else "over"
    print(f"largest relative difference {error:.3g} ({path or 'equal'}), {verdict} {args.rtol:g}")
    return 0 if close else 1


def _training(state: Any) -> dict[str, Any]:
    """All of a train state but the parameters; the typed random key as its plain numbers."""
    fields = {entry.name: getattr(state, entry.name) for entry in dataclasses.fields(state)}
    del fields["params"]
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.rng)
        fields["rng"] = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.rng.sharding)
    else:
        fields["rng"] = jax.random.key_data(state.rng)
    return fields


def _read_tree(folder: Path, abstract: Any) -> Any:
    """An array tree from disk: as the abstract tree says, or NumPy arrays when it is None."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).tree
        if abstract is None:
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        _check_shapes(folder, saved, abstract)
        where = ocp.checkpoint_utils.construct_restore_args(abstract)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(abstract, restore_args=where))


def _check_shapes(folder: Path, saved: Any, abstract: Any) -> None:
    """Raises where the arrays on disk are not those wanted (Orbax would pad or cut them)."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in flat
        }

    have, want = shapes(saved), shapes(abstract)
    wrong = [f"no {path}" for path in sorted(want.keys() - have.keys())]
    wrong += [f"unwanted {path}" for path in sorted(have.keys() - want.keys())]
    wrong += [
        f"{path} is {have[path]}, not {want[path]}"
        for path in sorted(have.keys() & want.keys())
        if have[path] != want[path]
    ]
    if wrong:
        raise ValueError(f"{folder} is not of this model: " + "; ".join(wrong))


def _read_json(folder: Path) -> Any:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.JsonRestore())


def _checksums(folder: Path) -> dict[str, str]:
    """CRC-32C of every file of a checkpoint's items, by relative path."""
    sums = {}
    for file in sorted(folder.glob("*/**/*")):
        if file.is_file():
            checksum = google_crc32c.Checksum()
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    checksum.update(chunk)
            sums[str(file.relative_to(folder))] = checksum.hexdigest().decode()
    return sums
