"""The term language: grippers, rotations, encoded features, and terms that are none."""

import zlib
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_pipelines.oxe.terms import OPERATIONS, parse, parse_language


def vector(term: str, values: Any) -> np.ndarray:
    return parse(term).vector({"x": values}, len(values))


def column(term: str, values: list[float]) -> list[float]:
    result = vector(term, np.array(values, np.float32))
    assert result.dtype == np.float32
    assert result.shape == (len(values), 1)
    return result[:, 0].tolist()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ([1, 0.6, 0.3, 0], [1, 0, 0, 0]),
        ([0, 0.6, 0.3, 1, 0.5, 0.04], [0, 1, 1, 1, 0, 0]),
        ([0.96, 0.5, 0.25], [1, 0.25, 0.25]),  # undecided to the end: the last raw value
        ([0.95, 0.05, 0.0], [0, 0, 0]),  # the thresholds themselves are undecided
        ([0.5], [0.5]),
        ([], []),
    ],
)
def test_look_ahead_makes_a_gripper_binary(raw: list[float], expected: list[float]) -> None:
    assert column("x | look_ahead", raw) == expected


@pytest.mark.parametrize(
    ("commands", "positions"),
    [
        ([0, 1, 0, -1, 0], [1, 0, 0, 1, 1]),  # the first closes, so it was open
        ([0, -1, 0, 1], [0, 1, 1, 0]),  # the first opens, so it was closed
        ([0, 0.1, -0.1], [1, 1, 1]),  # no command: open
        ([-0.11, 0.11], [1, 0]),
        ([1], [0]),
        ([], []),
    ],
)
def test_relative_commands_become_positions(commands: list[float], positions: list[float]) -> None:
    assert column("x | relative", commands) == positions


def test_grippers_of_two_columns_are_independent() -> None:
    raw = np.array([[0, 0.5], [1, 0], [-1, 1]], np.float32)
    np.testing.assert_array_equal(vector("x | relative", raw), [[1, 0], [0, 0], [1, 0]])
    np.testing.assert_array_equal(vector("x | look_ahead", raw), [[0, 0], [1, 0], [0, 1]])


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("x | clip", [0, 0.25, 1]),
        ("x | invert", [2, 0.75, -1]),
        ("x | clip | invert", [1, 0.75, 0]),
        ("x | invert | clip", [1, 0.75, 0]),
        ("x|divide(2)|invert", [1.5, 0.875, 0]),
        ("x | divide(0.5)", [-2, 0.5, 4]),
    ],
)
def test_operations_go_from_left_to_right(term: str, expected: list[float]) -> None:
    assert column(term, [-1, 0.25, 2]) == expected


@pytest.mark.parametrize(
    ("term", "columns"),
    [
        ("x", [0, 1, 2, 3]),
        ("x[0:2]", [0, 1]),
        ("x[1:]", [1, 2, 3]),
        ("x[:3]", [0, 1, 2]),
        ("x[-1:]", [3]),
        ("x[-3:-1]", [1, 2]),
        (" x [1:2] ", [1]),
    ],
)
def test_columns_are_those_of_a_slice(term: str, columns: list[int]) -> None:
    np.testing.assert_array_equal(vector(term, np.arange(8.0).reshape(2, 4))[0], columns)


@pytest.mark.parametrize(
    ("term", "count"),
    [
        ("x", None),
        ("x[0:6]", 6),
        ("x[:2] | clip", 2),
        ("x[6:7]", 1),
        ("x[-1:]", 1),
        ("x[-3:-1]", 2),
        ("x[2:]", None),
        ("x[:-1]", None),
        ("x[-3:5]", None),
        ("x | euler", 3),
        ("x | zlib(4) | divide(2)", 4),
        ("zeros(5)", 5),
    ],
)
def test_a_term_says_how_wide_it_is_where_it_knows(term: str, count: int | None) -> None:
    assert parse(term).columns == count


def test_constants_are_as_long_as_the_episode() -> None:
    np.testing.assert_array_equal(parse("zeros(2)").vector({}, 3), np.zeros((3, 2), np.float32))
    np.testing.assert_array_equal(
        parse("ones(1)").vector({}, 2), np.ones((2, 1), np.float32), strict=True
    )


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8, np.float16, np.float64])
def test_all_numbers_become_float32(dtype: type) -> None:
    result = vector("x", np.array([0, 1], dtype))
    np.testing.assert_array_equal(result, np.array([[0], [1]], np.float32), strict=True)


def test_quaternions_become_euler_angles() -> None:
    rotations = Rotation.random(200, random_state=0)
    result = vector("x | euler", rotations.as_quat().astype(np.float32))
    np.testing.assert_allclose(result, rotations.as_euler("xyz"), atol=2e-5)


@pytest.mark.parametrize("quarter", [-1.0, 1.0])
@pytest.mark.parametrize("roll", [-2.0, 0.0, 0.7])
def test_a_quarter_turn_about_y_has_no_turn_about_z(quarter: float, roll: float) -> None:
    rotation = Rotation.from_euler("xyz", [[roll, quarter * np.pi / 2, 0.4]])
    result = vector("x | euler", rotation.as_quat().astype(np.float32))
    assert result[0, 2] == 0
    assert result[0, 1] == pytest.approx(quarter * np.pi / 2, abs=1e-6)
    again = Rotation.from_euler("xyz", result.astype(np.float64))
    assert (again * rotation.inv()).magnitude()[0] < 1e-3


def test_compressed_numbers_are_inflated() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = [zlib.compress(row.tobytes()) for row in values]
    np.testing.assert_array_equal(vector("x | zlib(3)", stored), values, strict=True)
    np.testing.assert_array_equal(vector("x | zlib(3) | invert", stored), 1 - values)
    assert vector("x | zlib(3)", []).shape == (0, 3)


def test_words_are_utf8() -> None:
    raw = {"x": ["schiebe über".encode(), b""]}
    assert parse_language("x").words(raw) == ["schiebe über", ""]


@pytest.mark.parametrize("width", [8, 20])
def test_code_points_end_at_the_first_nul(width: int) -> None:
    points = np.zeros((3, width), np.int32)
    points[0, :8] = [ord(letter) for letter in "für Räd🤖"]
    points[1, :4] = [ord("a"), 0, ord("b"), 0]  # what follows a NUL is not read
    raw = {"x": points}
    assert parse_language("x | code_points").words(raw) == ["für Räd🤖", "a", ""]


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("x | open", r"unknown operation 'open'; known: clip, invert, divide\(n\), look_ahead, "),
        ("x | code_points", "unknown operation 'code_points'"),
        ("x | divide", r"operation 'divide' is written 'divide\(n\)'"),
        ("x | clip(2)", "operation 'clip' is written 'clip'"),
        ("x | invert | zlib(2)", "'zlib' must come first, on a whole feature"),
        ("x[0:1] | zlib(1)", "'zlib' must come first"),
        ("x[0]", r"'x\[0\]' is neither a feature"),
        ("x[0:1", "neither a feature"),
        ("", "'' is neither a feature"),
        ("zeros(0)", "a constant is written"),
        ("ones(2) | invert", "a constant is written"),
        ("x | ", "'' is not an operation"),
        ("x | clip()", r"'clip\(\)' is not an operation"),
    ],
)
def test_what_is_no_term(term: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(term)


@pytest.mark.parametrize("term", ["x[0:1]", "x | clip", "zeros(1)", "x | code_points | clip"])
def test_what_is_no_language_term(term: str) -> None:
    with pytest.raises(ValueError, match="expected a text feature"):
        parse_language(term)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_take_an_empty_episode(name: str) -> None:
    operation = OPERATIONS[name]
    term = f"x | {name}(2)" if operation.number else f"x | {name}"
    assert len(vector(term, np.zeros((0, 4), np.float32))) == 0
