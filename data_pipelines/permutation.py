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
from functools import lru_cache

_MASK = 2**64 - 1
# Odd multipliers whose products mix well (the second step takes the upper half, which all bits of
# the input reach).
_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def permuted(index: int, length: int, *seed: int) -> int:
    """The place of an index in a permutation.

    Args:
      index: in [0, length).
      length: at least 1.
      seed: integers; different ones give unrelated permutations.

    Returns:
      An integer in [0, length), another one for every index.
    """
    if not 0 <= index < length:
        raise IndexError(f"index {index} of {length}")
    rows = math.isqrt(length - 1) + 1
    columns = -(-length // rows)
    while True:
        row, column = divmod(index, columns)
        for row_key, column_key in _keys(seed):
            mixed = (column ^ row_key) * _FIRST & _MASK
            row = (row + ((mixed ^ mixed >> 32) * _SECOND & _MASK) // 2**32) % rows
            mixed = (row ^ column_key) * _FIRST & _MASK
            column = (column + ((mixed ^ mixed >> 32) * _SECOND & _MASK) // 2**32) % columns
        index = row * columns + column
        if index < length:
            return index


@lru_cache(maxsize=1024)
def _keys(seed: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Keys of 40 bits for three turns of rows and of columns."""
    digest = hashlib.sha256(json.dumps(seed).encode()).digest()
    words = [int.from_bytes(digest[5 * i : 5 * i + 5], "little") for i in range(6)]
    return ((words[0], words[1]), (words[2], words[3]), (words[4], words[5]))
