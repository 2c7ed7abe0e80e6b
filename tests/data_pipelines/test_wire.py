"""The zero-copy Example scan equals protobuf, and damage is a ValueError."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.rlds.tfrecord import read_records
from data_pipelines.rlds.wire import scan
from tests.data_pipelines.handmade import example, tabletop_record

INTEGERS = np.array([0, 1, 127, 128, 300, -1, -(2**63), 2**63 - 1, 2**35])
STRINGS = [b"", b"x" * 127, b"y" * 128, b"z" * 20000, b"w" * 3_000_000]


def assert_equals_protobuf(record: bytes) -> None:
    expected = tf_example_pb2.Example.FromString(record).features.feature
    lists = scan(record)
    assert set(lists) == set(expected)
    for key, found in lists.items():
        kind = expected[key].WhichOneof("kind") or ""
        assert found.kind == kind
        values = getattr(expected[key], kind).value if kind else []
        if kind == "bytes_list":
            assert found.strings() == list(values)
        else:
            np.testing.assert_array_equal(found.numbers(), values)


def test_reads_every_kind_of_list() -> None:
    record = example({"i": INTEGERS, "small": np.arange(5), "s": STRINGS, "none": []})
    assert_equals_protobuf(record)
    lists = scan(record)
    assert lists["i"].numbers().dtype == np.int64
    assert [record[o : o + n] for o, n in zip(*lists["s"].spans(), strict=True)] == STRINGS


def test_floats_are_a_view_of_the_record() -> None:
    record = example({"f": np.arange(5, dtype=np.float32)})
    numbers = scan(record)["f"].numbers()
    np.testing.assert_array_equal(numbers, np.arange(5, dtype=np.float32), strict=True)
    assert np.shares_memory(numbers, np.frombuffer(record, np.uint8))


def test_a_feature_without_values_is_an_empty_list_of_any_kind() -> None:
    proto = tf_example_pb2.Example()
    proto.features.feature["empty"].SetInParent()
    empty = scan(proto.SerializeToString())["empty"]
    assert (empty.kind, empty.strings(), empty.numbers().tolist()) == ("", [], [])


def field(number: int, payload: bytes) -> bytes:
    assert len(payload) < 128
    return bytes([number << 3 | 2, len(payload)]) + payload


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (2, b"\x0d\x00\x00\x80\x3f\x0d\x00\x00\x00\x40", [1.0, 2.0]),
        (3, b"\x08\x05\x08\xac\x02", [5, 300]),
        (3, b"\x0a\x02\x01\x02\x08\x07", [1, 2, 7]),  # a packed run, then one by itself
    ],
)
def test_unpacked_values(kind: int, values: bytes, expected: list[float]) -> None:
    entry = field(1, b"k") + field(2, field(kind, values))
    record = field(1, field(1, entry))
    assert_equals_protobuf(record)
    assert scan(record)["k"].numbers().tolist() == expected


def test_unknown_fields_are_skipped() -> None:
    entry = field(1, b"k") + field(2, field(3, field(1, b"\x07") + b"\x18\x05") + field(9, b"new"))
    record = b"\x11" + bytes(8) + field(1, field(1, entry)) + b"\x1d" + bytes(4)
    assert_equals_protobuf(record)


def test_equals_protobuf_on_real_data(shared_dir: Path) -> None:
    path = next((shared_dir / "data/bridge_dataset/1.0.0").glob("*-train.tfrecord-*"))
    for record in islice(read_records(path), 0, None, 5):
        assert_equals_protobuf(record.payload)


def test_a_list_is_asked_for_what_it_is() -> None:
    lists = scan(example({"i": np.arange(3), "s": [b"a"]}))
    with pytest.raises(ValueError, match="int64_list holds no byte strings"):
        lists["i"].spans()
    with pytest.raises(ValueError, match="bytes_list holds no numbers"):
        lists["s"].numbers()


def test_every_truncation_is_an_error() -> None:
    whole = example({"f": np.arange(3, dtype=np.float32), "s": [b"abc", b"d" * 200]})
    for length in range(1, len(whole)):
        with pytest.raises(ValueError):
            for found in scan(whole[:length]).values():
                found.strings() if found.kind == "bytes_list" else found.numbers()


def test_damage_is_a_value_error_and_nothing_else() -> None:
    whole = example(
        {key: tabletop_record(0, 2)[key] for key in ("steps/is_last", "steps/action")}
        | {"s": [b"abc", b"d" * 200], "i": INTEGERS}
    )
    random, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        damaged = bytearray(whole)
        for position in random.integers(0, len(whole), 3):
            damaged[position] = random.integers(0, 256)
        try:
            for found in scan(bytes(damaged)).values():
                found.strings() if found.kind == "bytes_list" else found.numbers()
        except ValueError:
            refused += 1
    assert refused > 100
