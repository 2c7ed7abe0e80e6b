"""TFRecord framing: what is written is read, and every kind of damage is named."""

from pathlib import Path

import grain
import pytest

from data_pipelines.rlds.tfrecord import Record, masked_crc, read_records
from tests.data_pipelines.handmade import frame

PAYLOADS = [b"first", b"", b"a longer third record", b"\x00" * 1000]
OFFSETS = [0, 21, 37, 74]  # 16 bytes of framing a record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(frame(payload) for payload in PAYLOADS))
    return path


def read(path: Path) -> list[Record]:
    return list(read_records(path))


def test_reads_every_record(path: Path) -> None:
    records = read(path)
    assert [record.payload for record in records] == PAYLOADS
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert [record.offset for record in records] == [offset + 12 for offset in OFFSETS]
    assert [record.crc for record in records] == [masked_crc(payload) for payload in PAYLOADS]


def test_an_empty_file_has_no_record(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read(tmp_path / "empty") == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing")


# Cut inside: the payload of record 3; its header; the data's CRC of record 2.
@pytest.mark.parametrize(("size", "record"), [(500, 3), (80, 3), (73, 2)])
def test_a_truncated_file_names_file_and_record(path: Path, size: int, record: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{path.name}, record {record}: truncated"):
        read(path)


@pytest.mark.parametrize(
    ("byte", "record", "message"),
    [
        (OFFSETS[2] + 1, 2, "bad CRC of the length"),
        (OFFSETS[2] + 9, 2, "bad CRC of the length"),
        (OFFSETS[2] + 12, 2, "bad CRC of the data"),
        (OFFSETS[3] - 1, 2, "bad CRC of the data"),
    ],
)
def test_a_flipped_bit_names_file_and_record(
    path: Path, byte: int, record: int, message: str
) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{path.name}, record {record}: {message}"):
        read(path)


def test_equals_grain_on_real_data(shared_dir: Path) -> None:
    path = next((shared_dir / "data/bridge_dataset/1.0.0").glob("*-train.tfrecord-*"))
    expected = list(grain.experimental.TFRecordIterDataset(str(path)))
    assert len(expected) == 25
    assert [record.payload for record in read_records(path)] == expected
