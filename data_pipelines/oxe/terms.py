"""The term language: which raw features make up a vector, written as data.

A vector (a standard action or state) is a list of terms, joined along the columns. A term names a
step feature, perhaps some of its columns, and operations, applied from left to right::

    "action[0:6]"                                    columns 0 to 5 of a feature
    "action[-1:] | clip | invert"                    its last column, clipped to 0..1, then 1 - x
    "action/gripper_closedness_action | relative"    a feature of one number a step is one column
    "observation/gripper_closed | zlib(1)"           byte strings, each one float32, compressed
    "zeros(3)"   "ones(1)"                           constants

    ["action[0:3]", "zeros(3)", "action[3:4]"]       [dx dy dz, 0 0 0, gripper]

Columns must exist: "[0:6]" of a feature four wide is an error, not four columns. Booleans become 0
and 1, and everything float32. The words of a step are a term, too: a text feature, or one of code
points, "observation/instruction | code_points".
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np

RawFeature = np.ndarray | Sequence[bytes]

_CONSTANT = re.compile(r"(zeros|ones)\((\d+)\)")
_FEATURE = re.compile(r"([^\[\]()|]+?)(?:\[(-?\d+)?:(-?\d+)?\])?")
_OPERATION = re.compile(r"(\w+)(?:\((\d+(?:\.\d+)?)\))?")


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term, parsed. `parse` makes one.

    Attributes:
      text: as written.
      feature: relative to "steps/"; empty for a constant.
      start, stop: columns, as in a slice.
      constant, width: of a constant.
      operations: names, each with its number or None.
    """

    text: str
    feature: str = ""
    start: int | None = None
    stop: int | None = None
    constant: float = 0.0
    width: int = 0
    operations: tuple[tuple[str, float | None], ...] = ()

    @property
    def columns(self) -> int | None:
        """How many columns it has; None where the data have to tell."""
        for name, number in reversed(self.operations):
            if name in DECODERS:
                return int(number or 0)
            if name == "euler":
                return 3
        if not self.feature:
            return self.width
        start, stop = self.start or 0, self.stop
        if start >= 0 and stop is not None and stop >= 0:
            return stop - start
        if start < 0 and (stop is None or stop < 0):
            return (stop or 0) - start
        return None

    def vector(self, raw: Mapping[str, RawFeature], steps: int) -> np.ndarray:
        """The term's columns, float32[steps, D].

        Args:
          raw: step features: numbers [T, ...], or T byte strings.
          steps: T.

        Raises:
          ValueError: the feature is of another kind, narrower than the term says or not finite;
            the message names it.
        """
        if not self.feature:
            return np.full((steps, self.width), self.constant, np.float32)
        values, operations = raw[self.feature], self.operations
        if operations and operations[0][0] in DECODERS:
            values, operations = self._decode(values), operations[1:]
        columns = self._columns(values)
        for name, number in operations:
            function = OPERATIONS[name].function
            try:
                columns = function(columns) if number is None else function(columns, number)
            except ValueError as error:
                raise ValueError(f"term {self.text!r}: {error}") from error
        return columns

    def words(self, raw: Mapping[str, RawFeature]) -> list[str]:
        """The term's text, one string a step.

        Raises:
          ValueError: the feature is of another kind or not valid text; the message names it.
        """
        values = raw[self.feature]
        if self.operations:
            if isinstance(values, np.ndarray) and values.ndim == 2 and values.dtype.kind in "iu":
                return [self._text(step, _nul_ended(row)) for step, row in enumerate(values)]
            raise ValueError(f"feature {self.feature!r} holds no code points (integers [T, n])")
        if isinstance(values, np.ndarray):
            raise ValueError(
                f"feature {self.feature!r} holds numbers ({values.dtype}), not text; "
                f"code points are read by '{self.feature} | code_points'"
            )
        return [self._text(step, (value, "utf-8")) for step, value in enumerate(values)]

    def _text(self, step: int, encoded: tuple[bytes, str]) -> str:
        """One step's string out of its bytes and their encoding."""
        try:
            return encoded[0].decode(encoded[1])
        except UnicodeDecodeError as error:
            raise ValueError(f"feature {self.feature!r}, step {step}: no text ({error})") from error

    def _decode(self, values: RawFeature) -> np.ndarray:
        """Byte strings as float32[T, D]."""
        name, number = self.operations[0]
        if isinstance(values, np.ndarray):
            raise ValueError(f"term {self.text!r}: the feature holds {values.dtype}, not bytes")
        rows = []
        for step, value in enumerate(values):
            try:
                rows.append(DECODERS[name].function(value, number))
            except (ValueError, zlib.error) as error:
                raise ValueError(f"term {self.text!r}, step {step}: {error}") from error
        return np.array(rows, np.float32).reshape(len(rows), int(number or 0))

    def _columns(self, values: RawFeature) -> np.ndarray:
        """The chosen columns of a feature, float32[T, D], checked to exist and to be finite."""
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf":
            kind = values.dtype if isinstance(values, np.ndarray) else "byte strings"
            raise ValueError(f"feature {self.feature!r} holds {kind}, where {self.text!r} is used")
        width = prod(values.shape[1:])
        bounds = [bound for bound in (self.start, self.stop) if bound is not None]
        picked = range(width)[self.start : self.stop]
        if any(not -width <= bound <= width for bound in bounds) or (bounds and not picked):
            raise ValueError(
                f"term {self.text!r}: the feature has {width} column(s) (shape {values.shape[1:]})"
            )
        columns = values.reshape(len(values), width)[:, self.start : self.stop]
        with np.errstate(over="ignore"):  # what float32 cannot hold is reported as not finite
            columns = columns.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(columns).all(axis=1))
        if bad.size:
            raise ValueError(f"feature {self.feature!r} is not finite at step {bad[0]}")
        return columns


@cache
def parse(text: str) -> Term:
    """Reads a term of a vector.

    Raises:
      ValueError: not a term, or an unknown operation; the message lists the known ones.
    """
    term, known_operations = _parse(text), {**OPERATIONS, **DECODERS}
    for position, (name, number) in enumerate(term.operations):
        operation = known_operations.get(name)
        if operation is None:
            known = ", ".join(f"{k}(n)" if v.number else k for k, v in known_operations.items())
            raise ValueError(f"term {text!r}: unknown operation {name!r}; known: {known}")
        if operation.number != (number is not None):
            usage = f"{name}(n)" if operation.number else name
            raise ValueError(f"term {text!r}: operation {name!r} is written {usage!r}")
        if name in DECODERS and (position or (term.start, term.stop) != (None, None)):
            raise ValueError(f"term {text!r}: {name!r} must come first, on a whole feature")
    return term


@cache
def parse_language(text: str) -> Term:
    """Reads a term of words.

    Raises:
      ValueError: not a text feature, perhaps with "| code_points".
    """
    term = _parse(text)
    whole = term.feature and (term.start, term.stop) == (None, None)
    if not whole or term.operations not in ((), (("code_points", None),)):
        raise ValueError(
            f"language term {text!r}: expected a text feature, or 'FEATURE | code_points'"
        )
    return term


def _parse(text: str) -> Term:
    """Source and operations, names unchecked."""
    source, *rest = (part.strip() for part in text.split("|"))
    operations = []
    for part in rest:
        found = _OPERATION.fullmatch(part)
        if found is None:
            raise ValueError(f"term {text!r}: {part!r} is not an operation")
        operations.append((found[1], None if found[2] is None else float(found[2])))
    if constant := _CONSTANT.fullmatch(source):
        value = 0.0 if constant[1] == "zeros" else 1.0
        if operations or int(constant[2]) < 1:
            raise ValueError(f"term {text!r}: a constant is written 'zeros(n)' or 'ones(n)', n > 0")
        return Term(text=text, constant=value, width=int(constant[2]))
    feature = _FEATURE.fullmatch(source)
    if feature is None:
        raise ValueError(
            f"term {text!r}: {source!r} is neither a feature, as 'action[0:6]', nor a constant"
        )
    start, stop = (None if bound is None else int(bound) for bound in feature.groups()[1:])
    return Term(
        text=text, feature=feature[1].strip(), start=start, stop=stop, operations=tuple(operations)
    )


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 1)


def _invert(values: np.ndarray) -> np.ndarray:
    return 1 - values


def _divide(values: np.ndarray, number: float) -> np.ndarray:
    return values / np.float32(number)


def _look_ahead(values: np.ndarray) -> np.ndarray:
    """Makes a gripper's commanded position binary by looking ahead.

    Above 0.95 it is open (1), below 0.05 closed (0); in between it is on its way to the next
    decided value, so it takes that: [1, 0.6, 0.3, 0] -> [1, 0, 0, 0]. A run that is undecided to
    the end takes the last raw value, as in the source; the "binary" normalisation settles it.

    Source: OpenVLA c8f03f4, prismatic/vla/datasets/rlds/utils/data_utils.py,
    binarize_gripper_actions.
    """
    is_open, is_closed = values > 0.95, values < 0.05
    steps = np.arange(len(values))[:, None]
    decided = np.where(is_open | is_closed, steps, len(values))
    ahead = np.minimum.accumulate(decided[::-1], axis=0)[::-1]  # the next decided step, or T
    return np.take_along_axis(np.concatenate([is_open, values[-1:]]), ahead, axis=0)


def _relative(values: np.ndarray) -> np.ndarray:
    """Makes a gripper's commands, +1 close and -1 open, the position they lead to.

    Commands within 0.1 of zero change nothing. The first command is taken to change the state, so
    before it the gripper is the other way; without any command it is open (1):
    [0, 1, 0, -1] -> [1, 0, 0, 1].

    Source: OpenVLA c8f03f4, prismatic/vla/datasets/rlds/utils/data_utils.py,
    rel2abs_gripper_actions.
    """
    if not len(values):
        return values
    opens = np.where(np.abs(values) > 0.1, values < 0, np.nan).astype(np.float32)
    steps = np.arange(len(values))[:, None]
    commanded = ~np.isnan(opens)
    latest = np.maximum.accumulate(np.where(commanded, steps, -1), axis=0)
    first = np.take_along_axis(opens, np.argmax(commanded, axis=0)[None], axis=0)
    before = np.where(np.isnan(first), np.float32(1), 1 - first)
    return np.where(latest < 0, before, np.take_along_axis(opens, np.maximum(latest, 0), axis=0))


def _euler(values: np.ndarray) -> np.ndarray:
    """Unit quaternions x, y, z, w as angles about x, y, z in rad, R = Rz Ry Rx.

    Where y is a quarter turn, only the sum or difference of the others is defined, and z is 0.

    Source: tensorflow_graphics, geometry/transformation/euler.py, from_quaternion.
    """
    if values.shape[1] != 4:
        raise ValueError(f"a quaternion has 4 columns, not {values.shape[1]}")
    x, y, z, w = values.T
    r00, r10, r20 = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w), 2 * (x * z - y * w)
    r01, r02 = 2 * (x * y - z * w), 2 * (x * z + y * w)
    r21, r22 = 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    pitch = -np.arcsin(np.clip(r20, -1, 1))
    sign = np.where(r20 < 0, np.float32(-1), np.float32(1))
    locked = np.abs(np.abs(r20) - 1) < 1e-6
    roll = np.where(locked, np.arctan2(-sign * r01, -sign * r02), np.arctan2(r21, r22))
    yaw = np.where(locked, np.float32(0), np.arctan2(r10, r00))
    return np.stack([roll, np.where(locked, -sign * np.float32(np.pi / 2), pitch), yaw], axis=1)


def _inflate(value: bytes, number: float) -> np.ndarray:
    """A zlib-compressed string of little-endian float32s."""
    data = zlib.decompress(value)
    if len(data) != 4 * number:
        raise ValueError(f"{len(data)} bytes, not {number:g} float32 numbers")
    return np.frombuffer(data, "<f4")


def _nul_ended(points: np.ndarray) -> tuple[bytes, str]:
    """Code points up to the first NUL, as bytes and their encoding."""
    ends = np.flatnonzero(points == 0)
    return points[: ends[0] if ends.size else None].astype("<u4").tobytes(), "utf-32-le"


@dataclass(frozen=True)
class _Operation:
    """What an operation does, and whether it is written with a number."""

    function: Callable[..., np.ndarray]
    number: bool = False


OPERATIONS: Mapping[str, _Operation] = {
    "clip": _Operation(_clip),
    "invert": _Operation(_invert),
    "divide": _Operation(_divide, number=True),
    "look_ahead": _Operation(_look_ahead),
    "relative": _Operation(_relative),
    "euler": _Operation(_euler),
}
DECODERS: Mapping[str, _Operation] = {"zlib": _Operation(_inflate, number=True)}
