"""Hostile messages: honest ones, broken in their bytes or in their meaning. Seeded."""

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from lara_jax.serving.codec import pack
from tests.serving.fakes import openpi_request, reference_request

WHOLE = [
    b"",
    b"\xc1",
    b"\x91" * 4000,
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff" + b"\xa1a" * 100,
    b"\xc6\xff\xff\xff\xff",
    b"\x93" * 1000 + b"\xc0" * 3000,
    b"cos\nsystem\n(S'true'\ntR.",
]
ATOMS = [None, True, 0, -1, 2**63, 1e308, float("nan"), "", "x" * 9000, b"", b"\xff" * 20, [], {}]
ATOMS += ["\0", "|O", "<U5", [[]], {"a": {"b": []}}, list(range(600)), {"__ndarray__": True}]


def hostile_messages(seed: int, count: int) -> Iterator[bytes]:
    """So many messages, always the same for a seed; some of them may still be valid."""
    rng = np.random.default_rng(seed)
    honest = [pack(openpi_request()), pack(reference_request([0.1, 0.2])), pack({"type": "ping"})]
    for _ in range(count):
        data = honest[rng.integers(len(honest))]
        kind = rng.integers(10)
        if kind == 0:
            yield WHOLE[rng.integers(len(WHOLE))]
        elif kind == 1:
            yield rng.bytes(rng.integers(1, 200))
        elif kind < 5:
            yield _broken_bytes(data, rng)
        else:
            tree = msgpack.unpackb(data, strict_map_key=False)
            for _ in range(rng.integers(1, 4)):
                tree = _changed(tree, rng)
            yield msgpack.packb(tree)


def _broken_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut off, with a few bytes changed, or with a piece doubled."""
    start, stop = sorted(rng.integers(0, len(data), 2))
    kind = rng.integers(3)
    if kind == 0:
        return data[:stop]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(len(data))] = rng.integers(256)
        return bytes(changed)
    return data[:stop] + data[start:]


def _changed(tree: Any, rng: np.random.Generator) -> Any:
    """The tree with one of its values replaced, left out or given another name."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        return ATOMS[rng.integers(len(ATOMS))]
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[rng.integers(len(keys))]
    changed = tree.copy()
    kind = rng.random()
    if kind < 0.1:
        del changed[key]
    elif kind < 0.2 and isinstance(changed, dict):
        changed[rng.bytes(3) if rng.random() < 0.5 else "other"] = changed.pop(key)
    else:
        changed[key] = _changed(tree[key], rng)
    return changed
