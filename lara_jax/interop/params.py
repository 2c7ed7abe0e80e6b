"""Import and export of parameters by the table of `hf_keys`: nothing left over, nothing left out.

Both directions walk the same entries. Export copies nothing it can view; import fills one array a
parameter, block by block, so that the peak is the source's mapped pages plus the result.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from lara_jax.interop.hf_keys import (
    Entry,
    KeyMismatch,
    Layout,
    entries,
    flatten,
    is_tied,
)

DTYPES = tuple(np.dtype(d) for d in (np.float32, np.float16, ml_dtypes.bfloat16))


@dataclass(frozen=True)
class NewTokens:
    """How rows of the vocabulary that the source lacks are made: as copies of one of its rows.

    The reference starts its special tokens from the row of `<<`, also those whose ids fall on
    unused rows that the source's table already has: name these in `ids`.

    Attributes:
      seed_id: the row to copy.
      ids: rows to overwrite besides those beyond the source's end.
    """

    seed_id: int
    ids: tuple[int, ...] = ()


def export_params(
    params: Mapping[str, Any], layout: Layout, *, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """Our parameters under torch's names.

    Args:
      params: tree of arrays, with a `teacher` entry if the EMA vision tower is to be written too;
        `layout.select(params)` leaves out what a layout cannot hold.
      dtype: float32 (bitwise), bfloat16 or float16.

    Returns:
      torch key -> array; views of `params` where no copy was needed.

    Raises:
      KeyMismatch: for a parameter that has no name in this layout.
    """
    if np.dtype(dtype) not in DTYPES:
        raise ValueError(f"dtype is {np.dtype(dtype)}; allowed: {', '.join(map(str, DTYPES))}")
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    flat = {path: value.astype(dtype, copy=False) for path, value in flat.items()}
    shapes = {path: value.shape for path, value in flat.items()}
    state = {
        entry.key: entry.axes.to_torch(flat[entry.path][entry.index])
        for entry in entries(shapes, layout)
    }
    if layout.tied_head and is_tied(flat):
        state[f"{layout.lm_head}.weight"] = state[f"{layout.text}embed_tokens.weight"]
    return state


def import_params(
    source: Mapping[str, np.ndarray],
    abstract_params: Mapping[str, Any],
    layout: Layout,
    *,
    new_tokens: NewTokens | None = None,
    drop: Collection[str] = (),
) -> dict[str, Any]:
    """Our parameters from a torch state dict: every key consumed, every parameter filled.

    Args:
      source: torch key -> array of float32, float16 or bfloat16.
      abstract_params: the tree to fill (only shapes are read). With a `teacher` entry (shapes of
        the vision tower) the source's EMA teacher goes there; else its keys are unexpected.
      new_tokens: how to fill a vocabulary larger than the source's; None forbids that.
      drop: parts of the source to leave out on purpose ("teacher", "action_expert", ...).

    Returns:
      The tree of `abstract_params` as float32 arrays.

    Raises:
      KeyMismatch: listing all keys that are missing, unexpected, or of wrong shape or dtype.
    """
    for part in drop:
        layout.prefixes(part)
        if part in abstract_params:
            raise ValueError(f"{part!r} is to be filled and to be dropped")
    dropped = tuple(prefix for part in drop for prefix in layout.prefixes(part))
    source = {key: value for key, value in source.items() if not key.startswith(dropped)}
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract_params).items()}
    table = {entry.key: entry for entry in entries(shapes, layout)}
    tied_key = f"{layout.lm_head}.weight" if is_tied(shapes) else None

    embedding_key = f"{layout.text}embed_tokens.weight"
    problems = list(_problems(source, table, tied_key, embedding_key, new_tokens))
    if problems:
        heading = f"{len(problems)} keys do not fit between {layout.name} weights and model:"
        raise KeyMismatch("\n  ".join([heading, *problems]))

    flat = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for key, entry in table.items():
        value = source[key]
        if entry.axes.vocab and new_tokens is not None:
            value = _grown(value, entry.axes.torch[0], new_tokens)
        flat[entry.path][entry.index] = entry.axes.to_ours(value)
    return unflatten_dict({tuple(path.split("/")): value for path, value in flat.items()})


def _problems(
    source: Mapping[str, np.ndarray],
    entries: Mapping[str, Entry],
    tied_key: str | None,
    embedding_key: str,
    new_tokens: NewTokens | None,
) -> Iterator[str]:
    """A line for every key that does not fit."""
    for key in sorted(entries.keys() - source.keys()):
        yield f"missing {key} {entries[key].axes.torch}, for {entries[key].path}"
    for key in sorted(source.keys() - entries.keys() - {tied_key}):
        yield f"unexpected {key} {source[key].shape}"
    for key in sorted(entries.keys() & source.keys()):
        value, entry = source[key], entries[key]
        if value.dtype not in DTYPES:
            yield f"wrong dtype {key}: {value.dtype}, not one of {', '.join(map(str, DTYPES))}"
        ours = entry.axes.torch
        if value.shape == ours:
            continue
        reason = ""
        if entry.axes.vocab and value.shape[1:] == ours[1:]:
            if value.shape[0] < ours[0] and new_tokens is not None:
                continue
            larger = value.shape[0] > ours[0]
            reason = " (more tokens)" if larger else " (fewer tokens: say how new ones start)"
        yield f"wrong shape {key}: {value.shape} in the source, {ours} in the model{reason}"
    if tied_key is not None and tied_key in source and embedding_key in source:
        head, embedding = source[tied_key], source[embedding_key]
        if not np.array_equal(head, embedding):
            yield f"{tied_key} differs from {embedding_key}, though the model's head is tied"


def _grown(rows: np.ndarray, size: int, new_tokens: NewTokens) -> np.ndarray:
    """`rows` with copies of the seed's row for new tokens."""
    for name, token, limit in [
        ("seed_id", new_tokens.seed_id, len(rows)),
        *(("ids", token, size) for token in new_tokens.ids),
    ]:
        if not 0 <= token < limit:
            raise ValueError(f"new_tokens.{name} is {token}; allowed: 0 to {limit - 1}")
    grown = np.empty((size, *rows.shape[1:]), rows.dtype)
    grown[: len(rows)] = rows
    grown[len(rows) :] = grown[list(new_tokens.ids)] = rows[new_tokens.seed_id]
    return grown
