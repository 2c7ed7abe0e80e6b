"""Files of torch weights: safetensors (one file or shards with an index) and torch's `.pt`.

Reading gives a plain dict of torch key -> array whose bytes stay in the mapped file until they are
used: shapes are known at once, and a checkpoint larger than memory can be imported part by part.
bfloat16 is `ml_dtypes.bfloat16`. A pickle is opened only through torch's `weights_only`, which
builds tensors and refuses anything that could run code.

    8 bytes: n, little endian | n bytes of JSON: name -> dtype, shape, [begin, end) | the arrays

Sources: https://github.com/huggingface/safetensors (format); transformers (shards and index).
"""

import json
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
SHARD_BYTES = 5 * 10**9  # what transformers writes


def load_torch_state(path: str | Path) -> dict[str, np.ndarray]:
    """Reads torch weights.

    Args:
      path: a `.safetensors` file; a directory with `model.safetensors` or with shards and
        `model.safetensors.index.json`; or torch's `.pt`, `.pth`, `.bin` (needs torch).

    Returns:
      torch key -> array in the file's dtype, mapped from the file and read-only where possible.

    Raises:
      FileNotFoundError: the file or a shard is not there.
      ValueError: the file is damaged, of unknown kind, or a pickle of more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        if (path / INDEX).exists():
            return _load_shards(path)
        path = path / SINGLE
    if not path.exists():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _load_pickle(path)
    allowed = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise ValueError(f"{path} ends in {path.suffix!r}; allowed: {allowed} or a directory")


def load_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Maps one safetensors file; see `load_torch_state`."""
    data: Any = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        if not 8 < start <= len(data):
            raise ValueError(f"a header of {start - 8} bytes in a file of {len(data)}")
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        return {key: _tensor(data[start:], key, **entry) for key, entry in header.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def _tensor(
    data: np.ndarray, key: str, *, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> np.ndarray:
    begin, end = data_offsets
    if dtype not in SAFETENSORS_DTYPES:
        raise ValueError(f"{key} has dtype {dtype}; allowed: {', '.join(SAFETENSORS_DTYPES)}")
    size = math.prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
    if not (0 <= begin <= end <= len(data) and end - begin == size and min(shape, default=0) >= 0):
        raise ValueError(
            f"{key} of shape {shape} and dtype {dtype} at bytes {begin} to {end} of {len(data)}"
        )
    return data[begin:end].view(SAFETENSORS_DTYPES[dtype]).reshape(shape)


def _load_shards(directory: Path) -> dict[str, np.ndarray]:
    """Follows the index; every shard must hold just the keys that the index says."""
    shard_of: dict[str, str] = json.loads((directory / INDEX).read_text())["weight_map"]
    state: dict[str, np.ndarray] = {}
    for name in sorted(set(shard_of.values())):
        path = directory / name
        if Path(name).name != name or not path.exists():
            raise FileNotFoundError(f"{directory / INDEX} names {name!r}, which is not there")
        shard = load_safetensors(path)
        expected = {key for key, shard_name in shard_of.items() if shard_name == name}
        if shard.keys() != expected:
            odd = ", ".join(sorted(shard.keys() ^ expected))
            raise ValueError(f"{path} and {directory / INDEX} disagree about {odd}")
        state |= shard
    return state


def _load_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(f"to read {path}")
    try:
        mapped = zipfile.is_zipfile(path)  # torch's format before 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    # What torch's unpickler raises on bytes that are no pickle of tensors.
    except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is not a file of plain tensors: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    odd = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if odd:
        raise ValueError(f"{path} holds more than tensors: {', '.join(map(str, odd))}")
    return {key: _from_torch(torch, value.detach()) for key, value in state.items()}


def _from_torch(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:  # NumPy's own types lack it
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _to_torch(torch: Any, value: np.ndarray) -> Any:
    if value.dtype == ml_dtypes.bfloat16:
        return torch.tensor(value.view(np.int16)).view(torch.bfloat16)
    return torch.tensor(value)


def _torch(purpose: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"torch is needed {purpose}: pip install 'lara-jax[torch]'") from error
    return torch


def save_pt(state: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Writes a torch state dict, as the reference's `torch.save(model.state_dict(), path)`.

    Arrays that are the same object (a tied head) share their storage in the file.
    """
    torch = _torch(f"to write {path}")
    tensors: dict[int, Any] = {}
    for value in state.values():
        if id(value) not in tensors:
            tensors[id(value)] = _to_torch(torch, np.asarray(value, order="C"))
    torch.save({key: tensors[id(value)] for key, value in state.items()}, path)


def save_safetensors(
    state: Mapping[str, np.ndarray], path: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes one file if `path` ends in `.safetensors`, else a directory as transformers does.

    Args:
      state: torch key -> array.
      path: `x.safetensors`, or a directory for `model.safetensors`, which becomes
        `model-00001-of-0000N.safetensors` and an index if it exceeds `shard_bytes`.
      shard_bytes: largest size of a shard; an array larger than that has its own.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        _save_shard(state, path)
        return
    path.mkdir(parents=True, exist_ok=True)
    shards = list(_shards(state, shard_bytes))
    if len(shards) == 1:
        _save_shard(state, path / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_shard(shard, path / name)
        weight_map |= dict.fromkeys(shard, name)
    size = sum(value.nbytes for value in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _shards(state: Mapping[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard: dict[str, np.ndarray] = {}
    size = 0
    for key, value in state.items():
        if shard and size + value.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[key] = value
        size += value.nbytes
    yield shard


def _save_shard(shard: Mapping[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save_file

    contiguous = {key: np.asarray(value, order="C") for key, value in shard.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
