"""TFRecord framing: what is written is read, and every kind of damage is named."""

from pathlib import Path

import grain
import pytest

from data_pipelines.rlds.tfrecord import TFRecordFile
from tests.data_pipelines.handmade import frame

PAYLOADS = [b"first", b"", b"a longer third record", b"\x00" * 1000]
OFFSETS = [0, 21, 37, 74]  # 16 bytes of framing a record


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(frame(payload) for payload in PAYLOADS))
    return path


def test_reads_every_record_by_number(path: Path) -> None:
    file = TFRecordFile(path)
    assert [file.read(record) for record in range(len(file))] == PAYLOADS
    assert file.records.tolist() == [
        [offset, len(p)] for offset, p in zip(OFFSETS, PAYLOADS, strict=True)
    ]
    with pytest.raises(IndexError, match="has 4 records, no record 4"):
        file.read(4)


def test_an_empty_file_has_no_record(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert len(TFRecordFile(tmp_path / "empty")) == 0


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        TFRecordFile(tmp_path / "nothing")


# Cut inside: the payload of record 3; its header; the data's CRC of record 2.
@pytest.mark.parametrize(("size", "record"), [(500, 3), (80, 3), (73, 2)])
def test_a_truncated_file_names_file_and_record(path: Path, size: int, record: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"{path.name}, record {record}: truncated"):
        TFRecordFile(path)


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
        file = TFRecordFile(path)
        file.read(record)


def test_a_file_that_changed_after_it_was_indexed_is_noticed(path: Path) -> None:
    file = TFRecordFile(path)
    path.write_bytes(frame(b"other") + path.read_bytes()[21:])
    assert file.read(0) == b"other"  # same layout, valid checksums: nothing to notice
    path.write_bytes(frame(b"short"[:4]) + path.read_bytes()[21:])
    with pytest.raises(ValueError, match="record 0: the file has changed"):
        file.read(0)
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match="record 0: truncated, 10 of 21 bytes are left"):
        file.read(0)


def test_equals_grain_on_real_data(shared_dir: Path) -> None:
    path = next((shared_dir / "data/bridge_dataset/1.0.0").glob("*-train.tfrecord-*"))
    file = TFRecordFile(path)
    expected = list(grain.experimental.TFRecordIterDataset(str(path)))
    assert len(expected) == 25
    assert [file.read(record) for record in range(len(file))] == expected
