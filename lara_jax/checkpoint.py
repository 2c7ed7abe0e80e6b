"""A checkpoint is a run: enough to resume, evaluate, serve or export from its directory alone.

    DIR/checkpoints/<step>/
      params/        the model's parameters, float32               (Orbax)
      training/      every other field of the state: step, optimizer, EMA teacher, random key, ...
                     (Orbax; absent in imported weights)
      position/      where the data stands: samples taken, stream  (JSON, like the four below)
      statistics/    what actions and states are scaled by
      tokenizer/     its files
      recipe/        every setting of the run
      logged/        metrics of the step
      checksums.json size and CRC-32C of each file above, written last

Saving is asynchronous and atomic: files go to a temporary directory that gets its name when all of
them are there, so a checkpoint that was cut off is never taken for one. Files are compared with
their checksums before anything is made of them. Arrays are restored straight to where the abstract
state says they live and to its precision, so another mesh, device or host count is nothing special.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lara_jax import checkpoint_files as files
from lara_jax import cluster
from lara_jax.checkpoint_files import JSON_ITEMS, SaveFailed, find, steps
from lara_jax.config import CheckpointConfig, Recipe, recipe_from_dict, recipe_to_dict
from lara_jax.lora import LORA

# A state of 60 GB on a slow disk takes its time.
SAVE_TIMEOUT_SECONDS = 3600
# What Orbax and TensorStore raise when files cannot be written.
WRITE_ERRORS = (OSError, RuntimeError, ValueError)
ARRAY_ITEMS = ("params", "training")
LISTED = 3  # problems that a message tells one by one

# A failed save is raised as one `SaveFailed`; Orbax's threads would print their tracebacks besides.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(
        lambda record: (
            record.levelno < logging.ERROR or "orbax" not in record.pathname + record.getMessage()
        )
    )


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a checkpoint holds besides arrays.

    Attributes:
      recipe: the run's settings.
      statistics: plain JSON values, as the data pipeline made them.
      tokenizer: text of each file of the tokenizer, by file name.
      samples: how many the run has taken from its stream of steps.
      stream: fingerprint of that stream (`MixtureSource.fingerprint`); empty before training.
      metrics: logged at the checkpoint's step, by name.
    """

    recipe: Recipe
    statistics: Mapping[str, Any]
    tokenizer: Mapping[str, str]
    samples: int = 0
    stream: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_items(self) -> dict[str, Any]:
        """JSON values by checkpoint item."""
        return {
            "position": {"samples": self.samples, "stream": self.stream},
            "statistics": dict(self.statistics),
            "tokenizer": dict(self.tokenizer),
            "recipe": recipe_to_dict(self.recipe),
            "logged": dict(self.metrics),
        }


def kept_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """Which checkpoints stay: the newest, every so many steps, and the best.

    Of `{100: {"loss": 3.0}, 200: {"loss": 1.0}, 300: {"loss": 2.0}}`, `keep=1, best_metric="loss"`
    keeps 200 and 300. Of equally good ones the newer is better; one without the metric, or where it
    is not finite, is not among the best.

    Args:
      metrics: logged metrics by step, of all checkpoints.
      config: the rules.
    """
    kept = set(sorted(metrics)[-config.keep :])
    if config.keep_every_steps:
        kept |= {step for step in metrics if step % config.keep_every_steps == 0}
    if config.best_metric:
        sign = 1 if config.best_mode == "min" else -1
        ranked = sorted(
            (sign * values[config.best_metric], -step)
            for step, values in metrics.items()
            if math.isfinite(values.get(config.best_metric, math.nan))
        )
        kept |= {-step for _, step in ranked[: config.keep_best]}
    return kept


class CheckpointStore:
    """Writes and restores the checkpoints of one run.

    Args:
      workdir: the run's directory; made where it is missing.
      config: what is kept; everything when None.

    Raises:
      SaveFailed: nothing can be written there.
    """

    def __init__(self, workdir: str | Path, config: CheckpointConfig | None = None) -> None:
        self._root = Path(workdir).absolute() / "checkpoints"
        self._config = config
        self._saving: int | None = None
        self._unlogged: dict[int, Mapping[str, float]] = {}  # metrics not on disk yet
        self._intact: set[int] = set()
        self._make_root()
        self._cut_off = files.cut_off(self._root)
        # Floating-point numbers hardly shrink, and compressing them takes longer than writing them.
        handlers = {
            **{item: ocp.PyTreeCheckpointHandler(use_compression=False) for item in ARRAY_ITEMS},
            **{item: ocp.JsonCheckpointHandler() for item in JSON_ITEMS},
        }
        self._manager = ocp.CheckpointManager(
            self._root,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self if config else None,
                cleanup_tmp_directories=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=SAVE_TIMEOUT_SECONDS,
                    post_finalization_callback=self._write_checksums,
                ),
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(steps(self._root), default=None)

    def folder(self, step: int) -> Path:
        """Where a checkpoint lies."""
        return self._root / str(step)

    def set_damaged_aside(self, on_damage: str = "previous") -> None:
        """Makes sure that the newest checkpoint is whole, before a run goes on from it.

        Checkpoints that are newer than the newest whole one are named on standard error with what
        is wrong, and renamed to `<step>.damaged`. Those that were cut off while they were written
        are named too; their files go.

        Args:
          on_damage: "error" raises instead of renaming.

        Raises:
          ValueError: none is whole though there are some, or `on_damage` is "error".
        """
        for path, step in self._cut_off.items():
            if step > (self.latest() or 0):
                cluster.say(
                    f"checkpoint {step} was cut off while it was written; {path} is deleted"
                )
        damaged: dict[int, str] = {}
        whole: int | None = None
        for step in reversed(sorted({*steps(self._root), *files.incomplete(self._root)})):
            wrong = self._damage(step)
            if not wrong:
                whole = step
                break
            damaged[step] = f"checkpoint {self.folder(step)} is damaged: {_some(wrong)}"
        if damaged and (whole is None or on_damage == "error"):
            before = "no other is whole" if whole is None else f"checkpoint {whole} is whole"
            raise ValueError(
                f"{'; '.join(damaged.values())}; {before}. To go on without the damaged, delete it "
                "with `lara checkpoint rm`"
            )
        for step, line in damaged.items():
            _say(f"{line}; going on from checkpoint {whole} instead")
            if jax.process_index() == 0:
                _say(f"the damaged one is now {files.move_aside(self.folder(step))}")
        if damaged:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are set aside")
            self._manager.reload()

    def save(self, step: int, state: Any, info: RunInfo) -> None:
        """Saves in the background; waits only for an earlier save that still runs.

        Args:
          step: the checkpoint's number: steps done.
          state: a dataclass with `params`; fields that are None are left out.
          info: everything else.

        Raises:
          SaveFailed: this or the save before could not be written.
        """
        metric = self._config.best_metric if self._config else ""
        if metric and metric not in info.metrics:
            cluster.say(
                f"checkpoint {step} has no metric {metric!r} and is not among the best; it has "
                f"{', '.join(sorted(info.metrics)) or 'none'}"
            )
        self._save(step, {"params": state.params, "training": _plain(_training(state))}, info)

    def save_params(self, params: Any, info: RunInfo, *, step: int = 0) -> None:
        """Saves parameters without a training state, e.g. imported weights."""
        self._save(step, {"params": params}, info)

    def check(self) -> None:
        """Tells at once, and without waiting, of a save in the background that has failed.

        Raises:
          SaveFailed: it could not be written.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def restore(self, abstract_state: Any, step: int) -> Any:
        """The state as saved, each array where the abstract state says and as precise.

        Fields that are None in the abstract state are left on disk.

        Args:
          abstract_state: a `TrainState` of `jax.ShapeDtypeStruct`s with shardings.
          step: a complete checkpoint with a training state, see `has_training`.

        Raises:
          ValueError: a file is damaged; or fields, names or shapes of the checkpoint are not those
            of the state.
        """
        folder = self.folder(step)
        if wrong := self._damage(step):
            raise ValueError(f"checkpoint {folder} is damaged: {_some(wrong)}")
        wanted = _training(abstract_state)
        params = _read_tree(folder / "params", abstract_state.params)
        training = _read_fields(folder / "training", _plain(wanted))
        keys = jax.tree.map(
            lambda want, x: jax.random.wrap_key_data(x) if _is_key(want) else x, wanted, training
        )
        return abstract_state.replace(params=params, **keys)

    def has_training(self, step: int) -> bool:
        """Whether the checkpoint can be resumed, or holds parameters only."""
        return (self.folder(step) / "training").is_dir()

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
          SaveFailed: the last save could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that write.

        Raises:
          SaveFailed: the last save could not be written.
        """
        self.wait()
        self._manager.close()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks which of the checkpoints stay once the one being saved is there."""
        del context
        if self._config is None:
            return [True] * len(checkpoints)
        numbers = [entry.step for entry in checkpoints]
        metrics = {
            step: self._unlogged[step] if step in self._unlogged else self._logged(step)
            for step in numbers
        }
        kept = kept_steps(metrics, self._config)
        return [step in kept for step in numbers]

    def _save(self, step: int, trees: dict[str, Any], info: RunInfo) -> None:
        with self._writing():
            self._manager.wait_until_finished()
            self._saving, self._unlogged = step, {step: info.metrics}
            items: dict[str, Any] = {n: ocp.args.PyTreeSave(tree) for n, tree in trees.items()}
            items |= {name: ocp.args.JsonSave(value) for name, value in info.to_items().items()}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def _write_checksums(self) -> None:
        """Runs when all items are written, before the temporary directory gets its name."""
        if jax.process_index() == 0:
            (folder,) = self._root.glob(f"{self._saving}{files.CUT_OFF}*")
            files.write_checksums(folder)

    def _make_root(self) -> None:
        with self._writing():
            self._root.mkdir(parents=True, exist_ok=True)
            if not os.access(self._root, os.W_OK):
                raise PermissionError(f"{self._root} is not writable")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what goes wrong on the disk into one line."""
        try:
            yield
        except WRITE_ERRORS as error:
            what = "checkpoints" if self._saving is None else f"checkpoint {self._saving}"
            raise SaveFailed(
                f"{what} cannot be written to {self._root}: {_reason(error)}; "
                f"{files.intact(self._root)}"
            ) from error

    def _logged(self, step: int) -> Mapping[str, float]:
        try:
            return load_metrics(self.folder(step))
        except (OSError, ValueError) as error:
            _say(f"checkpoint {step} is not among the best, its metrics are damaged: {error}")
            return {}

    def _damage(self, step: int) -> list[str]:
        """What is wrong with a checkpoint; each process reads its share of the files, once."""
        if step in self._intact:
            return []
        share = (jax.process_index(), jax.process_count())
        wrong = files.damage(self.folder(step), share=share)
        if share[1] > 1:
            anywhere = multihost_utils.process_allgather(np.array(bool(wrong)))
            if np.any(anywhere) and not wrong:
                wrong = ["another process has found damaged files"]
        if not wrong:
            self._intact.add(step)
        return wrong


def load_params(directory: str | Path, step: int | None = None) -> dict[str, Any]:
    """The parameters as a nested dict of float32 NumPy arrays; needs no model.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file of it is damaged.
    """
    return _read_tree(_undamaged(find(directory, step), ["params"]) / "params", None)


def load_average(directory: str | Path, step: int | None = None) -> dict[str, Any] | None:
    """The moving average of the parameters that train, as NumPy arrays; None where there is none.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file of it is damaged.
    """
    return _read_part(find(directory, step), "training", "ema")


def load_teacher(directory: str | Path, step: int | None = None) -> dict[str, Any] | None:
    """The teacher's vision tower, read as `load_average` reads the average."""
    return _read_part(find(directory, step), "training", "teacher")


def load_factors(directory: str | Path, step: int | None = None) -> dict[str, Any] | None:
    """The low-rank factors among the parameters, as NumPy arrays; None where there are none.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file of it is damaged.
    """
    return _read_part(find(directory, step), "params", LORA)


def restore_params(directory: str | Path, abstract_params: Any, step: int | None = None) -> Any:
    """The networks' parameters, each where the abstract tree's sharding says and as precise.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file of it is damaged, or names or shapes are not those of the abstract tree.
    """
    folder = _undamaged(find(directory, step), ["params"]) / "params"
    return _read_tree(folder, abstract_params, leave=[LORA])


def load_info(directory: str | Path, step: int | None = None) -> RunInfo:
    """Recipe, statistics, tokenizer, data position and metrics of a checkpoint.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a file of it is damaged.
    """
    folder = _undamaged(find(directory, step), JSON_ITEMS)
    items = {name: _read_json(folder / name) for name in JSON_ITEMS}
    return RunInfo(
        recipe=recipe_from_dict(items["recipe"]),
        statistics=items["statistics"],
        tokenizer=items["tokenizer"],
        samples=items["position"]["samples"],
        stream=items["position"]["stream"],
        metrics=items["logged"],
    )


def load_metrics(folder: Path) -> Mapping[str, float]:
    """What was logged at the step of a checkpoint's folder."""
    return _read_json(folder / "logged")


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


def _training(state: Any) -> dict[str, Any]:
    """All of a train state but the parameters and what it does not have."""
    fields = {entry.name: getattr(state, entry.name) for entry in dataclasses.fields(state)}
    return {name: x for name, x in fields.items() if name != "params" and x is not None}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(tree: Any) -> Any:
    """The tree with typed random keys as their plain numbers; also an abstract one."""

    def plain(x: Any) -> Any:
        if not _is_key(x):
            return x
        if not isinstance(x, jax.ShapeDtypeStruct):
            return jax.random.key_data(x)
        data = jax.eval_shape(jax.random.key_data, x)
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)

    return jax.tree.map(plain, tree)


def _undamaged(folder: Path, items: Sequence[str]) -> Path:
    """The folder of a checkpoint, whose items are what was written.

    Raises:
      ValueError: they are not.
    """
    if wrong := files.damage(folder, items):
        whole = [step for step in steps(folder.parent) if str(step) != folder.name]
        raise ValueError(
            f"checkpoint {folder} is damaged: {_some(wrong)}; other steps there: {whole or 'none'}"
        )
    return folder


def _read_fields(folder: Path, abstract: dict[str, Any]) -> dict[str, Any]:
    """The wanted fields of a training state; others are left on disk.

    Raises:
      ValueError: one is not there, or its arrays are others.
    """
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).tree
    have = {name for name, value in saved.items() if value is not None}
    if absent := sorted(abstract.keys() - have):
        raise ValueError(
            f"{folder} has no {', '.join(absent)}, only {', '.join(sorted(have))}: the run's "
            "settings ask for more than was saved. With config.init.path, a new run starts from "
            "these parameters"
        )
    if unused := sorted(have - abstract.keys()):
        cluster.say(f"{folder}: the run has no use for {', '.join(unused)}")
    return _read_tree(folder, abstract, leave=unused)


def _read_part(folder: Path, item: str, name: str) -> dict[str, Any] | None:
    """One part of an array tree as NumPy arrays; None where a checkpoint's folder has none."""
    if not (folder / item).is_dir():
        return None
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder / item).tree.get(name)
        if saved is None:
            return None
        _undamaged(folder, [item])
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), {name: saved})
        arguments = ocp.args.PyTreeRestore(
            {name: saved}, restore_args=as_numpy, partial_restore=True
        )
        return reader.restore(folder / item, args=arguments)[name]


def _read_tree(folder: Path, abstract: Any, leave: Sequence[str] = ()) -> Any:
    """An array tree from disk: as the abstract tree says, or NumPy arrays when it is None.

    Names in `leave` stay on disk.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(folder).tree
        if abstract is None:
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
            return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        saved = {name: value for name, value in saved.items() if name not in leave}
        _check_arrays(folder, saved, abstract)
        where = ocp.checkpoint_utils.construct_restore_args(abstract)
        return reader.restore(
            folder, args=ocp.args.PyTreeRestore(abstract, restore_args=where, partial_restore=True)
        )


def _check_arrays(folder: Path, saved: Any, abstract: Any) -> None:
    """Raises where the arrays on disk are not those wanted (Orbax would pad, cut or convert them);
    only floating-point numbers may change their precision."""

    def kinds(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (
                tuple(x.shape),
                "float" if jnp.issubdtype(x.dtype, jnp.floating) else str(x.dtype),
            )
            for path, x in flat
        }

    have, want = kinds(saved), kinds(abstract)
    wrong = [f"no {path}" for path in sorted(want.keys() - have.keys())]
    wrong += [f"unwanted {path}" for path in sorted(have.keys() - want.keys())]
    for path in sorted(have.keys() & want.keys()):
        (shape, kind), (wanted_shape, wanted_kind) = have[path], want[path]
        if shape != wanted_shape:
            wrong.append(f"{path} is {shape}, not {wanted_shape}")
        elif kind != wanted_kind:
            wrong.append(f"{path} is {kind}, not {wanted_kind}")
    if wrong:
        raise ValueError(f"{folder} is not of this model: " + "; ".join(wrong))


def _read_json(folder: Path) -> Any:
    with contextlib.closing(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.JsonRestore())


def _some(lines: Sequence[str]) -> str:
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return ", ".join([*lines[:LISTED], *more])


def _reason(error: BaseException) -> str:
    """What the disk said, without what TensorStore tells besides."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
