"""Shuffling without a table: where an index goes in a permutation that a seed decides.

The indices are laid out as a grid; its rows and columns are turned by amounts that depend on the
other one, back and forth (a Feistel network, on any radix). Each turn can be undone, so that no two
indices meet. Indices that land in the grid's few cells past the end go round again::

    length 10, 4 x 3     0 1 2     row + f(column) mod 4
                         3 4 5     column + g(row) mod 3      three times, other f and g each time
                         6 7 8
                         9 . .

The permutation is part of what a run has seen, so it is spelt out here in integer arithmetic: the
same on every machine and with every release of the packages we use. For lengths below some 30 not
all permutations are equally likely.

Source: Luby and Rackoff 1988 (Feistel networks from random functions); Black and Rogaway 2002
(arbitrary domains, cycle walking).
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Odd multipliers whose products mix well (the second step takes the upper half, which all bits of
# the input reach).
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)
_UNIFORM = 2**32  # no seed of a permutation has it


def permuted(
    indices: np.ndarray, lengths: np.ndarray, seeds: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """The places of N indices, each in a permutation of its own.

    Args:
      indices: int64[N], in [0, length).
      lengths: int64[N], at least 1.
      seeds: N times integers; different ones give unrelated permutations.

    Returns:
      int64[N] in [0, length), in one permutation another one for every index.
    """
    for i in np.flatnonzero((indices < 0) | (indices >= lengths)):
        raise IndexError(f"index {indices[i]} of {lengths[i]}")
    which = list(zip(lengths.tolist(), seeds, strict=True))
    numbers = {each: number for number, each in enumerate(dict.fromkeys(which))}
    distinct = np.array([_keys(*each) for each in numbers], np.uint64).reshape(-1, 8)
    grids = distinct[[numbers[each] for each in which]].T
    places = indices.astype(np.uint64)
    going = np.arange(len(places))
    while len(going):
        places[going] = _turned(places[going], *grids[:, going])
        going = going[places[going] >= lengths[going].astype(np.uint64)]
    return places.astype(np.int64)


def uniform(seed: int, indices: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each of int64[N], decided by seed and index: float64[N]."""
    *_, key = _keys(1, (seed, _UNIFORM))
    return _mixed(indices.astype(np.uint64) ^ np.uint64(key)) / 2.0**32


def _turned(
    index: np.ndarray, rows: np.ndarray, columns: np.ndarray, *keys: np.ndarray
) -> np.ndarray:
    """Where indices of grids of so many rows and columns go; all uint64[N]."""
    row, column = index // columns, index % columns
    for row_key, column_key in zip(keys[::2], keys[1::2], strict=True):
        row = (row + _mixed(column ^ row_key)) % rows
        column = (column + _mixed(row ^ column_key)) % columns
    return row * columns + column


def _mixed(values: np.ndarray) -> np.ndarray:
    """32 bits of each of uint64[N] that depend on all of its bits."""
    first = values * _FIRST
    return ((first ^ first >> _HALF) * _SECOND) >> _HALF


@lru_cache(maxsize=4096)
def _keys(length: int, seed: tuple[int, ...]) -> tuple[int, ...]:
    """Rows and columns of a grid, then keys of 40 bits for three turns of rows and of columns."""
    rows = math.isqrt(length - 1) + 1
    digest = hashlib.sha256(json.dumps(seed).encode()).digest()
    keys = (int.from_bytes(digest[5 * i : 5 * i + 5], "little") for i in range(6))
    return rows, -(-length // rows), *keys
