"""Messages as bytes: msgpack, with arrays as openpi's clients write them.

    {"prompt": "stack the blocks", "observation/state": float32[8]}

    -> a map whose array is again a map, with keys of bytes:
       {"prompt": ..., "observation/state": {b"__ndarray__": True, b"data": 32 bytes,
                                             b"dtype": "<f4", b"shape": [8]}}

The other side is not trusted: what it sends can only become plain values and arrays of numbers, in
bounded time and memory. There are no pickles, no objects and no extension types in this format;
every array must say exactly as many bytes as it has. Server and client read by the same rules.

Source of the array's form: openpi-client 0.1.2 (`msgpack_numpy`).
"""

import math
from typing import Any

import msgpack
import numpy as np

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
MAX_DIMENSIONS = 6
MAX_SIDE = 2**31 - 1
# Of values other than the bytes of arrays; an honest request has some dozen.
MAX_ITEMS = 512  # in a list or a map
MAX_CONTAINERS = 1024  # lists and maps in a message
MAX_TEXT_BYTES = 8192


class Refused(ValueError):
    """A message that breaks the rules; what it says may be told to who sent it."""


def pack(message: Any) -> bytes:
    """Bytes of a message.

    Args:
      message: None, booleans, numbers, strings, bytes, lists and maps of such, and arrays and
        scalars of NumPy with a dtype among `DTYPES`.

    Raises:
      ValueError: an array of another dtype.
      TypeError: any other kind of value.
    """
    return msgpack.packb(message, default=_pack_array)


def unpack(data: bytes) -> Any:
    """The message that the bytes hold; arrays are read-only views of them.

    Raises:
      Refused: the bytes are no message, or one with too many or forbidden things in it.
    """
    containers = 0

    def counted(value: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > MAX_CONTAINERS:
            raise Refused(f"the message has more than {MAX_CONTAINERS} lists and maps")
        return value

    def unpack_map(pairs: list[tuple[str | bytes, Any]]) -> Any:
        values = dict(counted(pairs))
        if len(values) != len(pairs):
            raise Refused("a map has the same key twice")
        if ARRAY in values:
            return _unpack_array(values)
        return _unpack_scalar(values) if SCALAR in values else values

    try:
        return msgpack.unpackb(
            data,
            list_hook=counted,
            object_pairs_hook=unpack_map,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_TEXT_BYTES,
            max_ext_len=0,
        )
    except Refused:
        raise
    except ValueError as error:  # of msgpack and of UTF-8
        raise Refused(f"no msgpack message: {error}") from error


def _pack_array(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"cannot pack a value of type {type(value).__name__}")
    dtype = value.dtype.newbyteorder("<")
    if dtype.str not in DTYPES:
        raise ValueError(f"cannot pack dtype {value.dtype}; allowed: {', '.join(DTYPES)}")
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": dtype.str}
    data = value.astype(dtype, copy=False).tobytes()
    return {ARRAY: True, b"data": data, b"dtype": dtype.str, b"shape": value.shape}


def _unpack_array(values: dict[Any, Any]) -> np.ndarray:
    dtype, data = _typed(values, (ARRAY, b"data", b"dtype", b"shape"))
    shape = values[b"shape"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise Refused(f"an array's shape is no list of at most {MAX_DIMENSIONS} numbers")
    if not all(type(side) is int and 0 <= side <= MAX_SIDE for side in shape):
        raise Refused(f"an array's shape holds something other than whole numbers 0..{MAX_SIDE}")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise Refused("an array has not the bytes that its dtype and shape ask for")
    return np.frombuffer(data, dtype).reshape(shape)


def _unpack_scalar(values: dict[Any, Any]) -> np.generic:
    dtype, data = _typed(values, (SCALAR, b"data", b"dtype"))
    kinds = (int, float) if dtype.kind == "f" else (int,)
    if type(data) not in kinds:
        raise Refused(f"a scalar of dtype {dtype} holds a {type(data).__name__}")
    if dtype.kind != "f" and not np.iinfo(dtype).min <= data <= np.iinfo(dtype).max:
        raise Refused(f"a scalar is out of the range of its dtype {dtype}")
    return dtype.type(data)


def _typed(values: dict[Any, Any], keys: tuple[bytes, ...]) -> tuple[np.dtype, Any]:
    """dtype and data of a map that stands for an array or a scalar."""
    if set(values) != set(keys) or values[keys[0]] is not True:
        raise Refused(f"an array or scalar must have the keys {', '.join(map(repr, keys))}")
    name = values[b"dtype"]
    if not isinstance(name, str) or name not in DTYPES:
        raise Refused(f"an array's dtype is not among the allowed: {', '.join(DTYPES)}")
    return np.dtype(name), values[b"data"]
