"""Messages as bytes: what goes in comes out, and what should not come in does not."""

import msgpack
import numpy as np
import pytest

from lara_jax.serving.codec import (
    DTYPES,
    MAX_CONTAINERS,
    MAX_ITEMS,
    MAX_TEXT_BYTES,
    Refused,
    pack,
    unpack,
)


def array(**changes) -> bytes:
    """Two float32 in an array's map, some of it changed or (None) left out."""
    fields = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    fields |= {key.encode(): value for key, value in changes.items()}
    return msgpack.packb({"x": {k: v for k, v in fields.items() if v is not None}})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3)])
def test_arrays_come_back_as_they_were(dtype, shape):
    values = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    back = unpack(pack({"x": values}))["x"]
    assert back.dtype == values.dtype and back.shape == shape
    np.testing.assert_array_equal(back, values)
    assert not back.flags.writeable


def test_other_values_come_back_as_they_were():
    message = {"a": [1, 2.5, None, True, "ü", b"\0"], "b": {"c": {}}, "n": -(2**63)}
    assert unpack(pack(message)) == message
    scalar = unpack(pack(np.float32(0.1)))
    assert scalar == np.float32(0.1) and scalar.dtype == np.float32
    assert unpack(pack(np.arange(6, dtype=">i4").reshape(2, 3).T))[2, 1] == 5


@pytest.mark.parametrize("value", [np.array([None]), np.array(1j), np.array("x"), np.array([True])])
def test_packs_numbers_only(value):
    with pytest.raises(ValueError, match="cannot pack dtype"):
        pack(value)
    with pytest.raises(TypeError, match="cannot pack a value of type object"):
        pack({"x": object()})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no msgpack message"),
        (b"\xc1", "no msgpack message"),
        (b"\x01\x01", "extra data"),
        (b"\x92\x01", "incomplete"),
        (b"\xa2\xff\xfe", "utf-8"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete|exceeds"),
        (b"\xd6\xff\0\0\0\x01", "exceeds max_ext_len"),  # a time stamp
        (b"\xc7\x05\x01aaaaa", "exceeds max_ext_len"),
        (b"\x81\x01\x02", "not allowed for map key"),
        (b"\x82\xa1a\x01\xa1a\x02", "same key twice"),
        (b"\x91" * 5000, "no msgpack message"),
        (msgpack.packb("x" * (MAX_TEXT_BYTES + 1)), "exceeds max_str_len"),
        (msgpack.packb([0] * (MAX_ITEMS + 1)), "exceeds max_array_len"),
        (msgpack.packb([[[]] * 500] * 3), f"more than {MAX_CONTAINERS} lists and maps"),
        (msgpack.packb([[{}] * 500] * 3), f"more than {MAX_CONTAINERS} lists and maps"),
        (array(dtype="|O"), "dtype is not among the allowed"),
        (array(dtype="|V8"), "dtype is not among"),
        (array(dtype="<c8"), "dtype is not among"),
        (array(dtype="<U2"), "dtype is not among"),
        (array(dtype="<M8[s]"), "dtype is not among"),
        (array(dtype="float32"), "dtype is not among"),
        (array(dtype=["<f4"]), "dtype is not among"),
        (array(dtype=None), "must have the keys"),
        (array(extra=1), "must have the keys"),
        (array(__ndarray__=1), "must have the keys"),
        (array(data=bytes(7)), "not the bytes"),
        (array(data="aaaaaaaa"), "not the bytes"),
        (array(shape=[3]), "not the bytes"),
        (array(shape=[2**31 - 1] * 6), "not the bytes"),
        (array(shape=[0, 2**63], data=b""), "whole numbers"),
        (array(shape=[0] + [2**31 - 1] * 5, data=b""), "no msgpack message"),
        (array(shape=[-2]), "whole numbers"),
        (array(shape=[2.0]), "whole numbers"),
        (array(shape=[True, 2]), "whole numbers"),
        (array(shape=2), "no list of at most"),
        (array(shape=[1] * 7 + [2]), "no list of at most"),
        (msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}), "holds a str"),
        (msgpack.packb({b"__npgeneric__": True, b"data": 1.5, b"dtype": "<i4"}), "holds a float"),
        (
            msgpack.packb({b"__npgeneric__": True, b"data": 256, b"dtype": "|u1"}),
            "out of the range",
        ),
        (msgpack.packb({b"__npgeneric__": True, b"data": True, b"dtype": "|u1"}), "holds a bool"),
    ],
)
def test_refuses(data, message):
    with pytest.raises(Refused, match=message):
        unpack(data)


def test_a_pickle_stays_bytes():
    pickled = b"cos\nsystem\n(S'true'\ntR."
    assert unpack(msgpack.packb({"x": pickled})) == {"x": pickled}
    with pytest.raises(Refused):
        unpack(pickled)
