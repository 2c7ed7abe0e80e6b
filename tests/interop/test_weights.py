"""Files: what is written is read back bit for bit; what is damaged or dangerous is refused."""

import json
import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lara_jax.interop.weights import INDEX, SINGLE, load_torch_state, save_pt, save_safetensors

TIED = np.arange(6, dtype=np.float32).reshape(2, 3)
STATE = {
    "embed": TIED,
    "head": TIED,
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "brain": np.array([1.5, -2, 3e38, 1e-40], ml_dtypes.bfloat16),
    "half": np.array([1.5, -2, 6e4], np.float16),
    "scalar": np.float32(3.5).reshape(()),
    "empty": np.zeros((0, 3), np.float32),
}


def assert_read(path: Path) -> None:
    state = load_torch_state(path)
    assert state.keys() == STATE.keys()
    for key, value in STATE.items():
        assert (state[key].dtype, state[key].shape) == (value.dtype, value.shape), key
        assert state[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_safetensors(tmp_path: Path, name: str) -> None:
    save_safetensors(STATE, tmp_path / name)
    assert_read(tmp_path / name)


def test_shards(tmp_path: Path) -> None:
    save_safetensors(STATE, tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert not (tmp_path / SINGLE).exists()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in STATE.values())
    assert_read(tmp_path)

    (tmp_path / shards[1]).unlink()
    with pytest.raises(FileNotFoundError, match=shards[1]):
        load_torch_state(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_safetensors(STATE, tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    del index["weight_map"]["half"]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="disagree about half"):
        load_torch_state(tmp_path)


def test_index_cannot_point_outside(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    save_safetensors(STATE, tmp_path / "secret.safetensors")
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="secret"):
        load_torch_state(folder)


def _header(entry: dict[str, Any]) -> bytes:
    header = json.dumps({"a": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of"),
        (struct.pack("<Q", 2) + b"[]", "not a valid safetensors"),
        (struct.pack("<Q", 2) + b"\xff}", "not a valid safetensors"),
        (_header({"dtype": "F32", "shape": [2]}), "data_offsets"),
        (_header({"dtype": "F8", "shape": [8], "data_offsets": [0, 8]}), "a has dtype F8"),
        (_header({"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}), "0 to 12 of 8"),
        (_header({"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}), r"\[1\].*0 to 8"),
        (_header({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}), "-4 to 0"),
        (_header({"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}), r"\[-1, -1\]"),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_torch_state(path)
    assert str(path) in str(error.value)


def test_truncated_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": TIED}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="0 to 24 of 23"):
        load_torch_state(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "folder"])
def test_absent(tmp_path: Path, name: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        load_torch_state(tmp_path / name)


def test_unknown_suffix(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"'.npz'; allowed: .safetensors, .pt"):
        load_torch_state(path)


@pytest.mark.torch
class TestTorchFiles:
    def test_round_trip(self, tmp_path: Path) -> None:
        save_pt(STATE, tmp_path / "x.pt")
        assert_read(tmp_path / "x.pt")

    def test_tied_arrays_share_storage(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        save_pt(STATE, tmp_path / "x.pt")
        state = torch.load(tmp_path / "x.pt", weights_only=True)
        assert state["embed"].data_ptr() == state["head"].data_ptr()

    def test_old_format(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
        torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
        state = load_torch_state(tmp_path / "x.bin")
        np.testing.assert_array_equal(state["a"], TIED)
        assert state["b"].dtype == ml_dtypes.bfloat16

    def test_parameters_and_views(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        weight = torch.nn.Parameter(torch.arange(6.0, dtype=torch.bfloat16).reshape(3, 2).T)
        torch.save({"a": weight}, tmp_path / "x.pt")
        value = load_torch_state(tmp_path / "x.pt")["a"]
        np.testing.assert_array_equal(value.astype(np.float32), [[0, 2, 4], [1, 3, 5]])

    def test_malicious_pickle_is_refused(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        trap = tmp_path / "trap"

        class Evil:
            def __reduce__(self) -> Any:
                return (Path.touch, (trap,))

        torch.save({"a": Evil()}, tmp_path / "x.pt")
        (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
        for name in ("x.pt", "y.pt"):
            with pytest.raises(ValueError, match=f"{name} is not a file of plain tensors"):
                load_torch_state(tmp_path / name)
        assert not trap.exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "holds a list, not a state dict"),
            ({"a": 1, "b": 2.5}, "more than tensors: a, b"),
        ],
    )
    def test_more_than_tensors(self, tmp_path: Path, content: Any, message: str) -> None:
        torch = pytest.importorskip("torch")
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            load_torch_state(tmp_path / "x.pt")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no more", b"plain text"])
    def test_damaged(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "x.pt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a file of plain tensors"):
            load_torch_state(path)


def test_torch_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"torch is needed to read .*x.pt: pip install"):
        load_torch_state(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="torch is needed to write"):
        save_pt(STATE, tmp_path / "y.pt")
