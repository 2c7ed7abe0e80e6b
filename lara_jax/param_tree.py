"""Parts of a parameter tree, by path: chosen, put back together, found by pattern.

A part of a tree is the same nest of dicts without the other leaves, so gradients and moments of a
part hold no room for the rest:

    {"text": {"norm": n, "embed": e}, "vision": v}  --select {"text/norm"}-->  {"text": {"norm": n}}
"""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"text/norm/scale": leaf, ...}."""
    return flatten_dict(tree, sep="/")


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    return unflatten_dict(leaves, sep="/")


def select(tree: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The part of the tree with these paths."""
    return nested({path: leaf for path, leaf in flat(tree).items() if path in paths})


def overlay(tree: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the leaves of a part of it in place of its own."""
    return nested(flat(tree) | flat(part))


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a glob (`*` also stands for slashes) matches the whole path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def check_patterns(where: str, patterns: Sequence[str], paths: Iterable[str]) -> None:
    """Every pattern has to match something.

    Raises:
      ValueError: one does not; with the paths that look most like it.
    """
    known = list(paths)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.0)
            raise ValueError(
                f"{where}: the pattern {pattern!r} matches no parameter; near it: {', '.join(near)}"
            )
