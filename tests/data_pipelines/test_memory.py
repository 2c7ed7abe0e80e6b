"""Memory for frames: whoever holds a view of it has it to himself, and it is used again after."""

import gc
import pickle

import numpy as np

from data_pipelines.memory import Memory


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    memory = Memory()
    array = memory.array((4, 5, 3))
    assert (array.shape, array.dtype) == ((4, 5, 3), np.uint8)
    assert array.flags.writeable and array.flags.c_contiguous
    place = address(array)
    array[:] = np.arange(60).reshape(4, 5, 3)
    view = array[1:][0].reshape(-1)[2:]
    expected = view.copy()
    del array
    gc.collect()
    others = [memory.array((4, 5, 3)) for _ in range(8)]
    for other in others:
        other[:] = 255
        assert not np.shares_memory(other, view)
    np.testing.assert_array_equal(view, expected)
    del view
    assert address(memory.array((5, 4, 3))) == place


def test_little_of_what_is_free_is_kept() -> None:
    memory = Memory()
    arrays = [memory.array((1000,)) for _ in range(50)]
    assert len({address(array) for array in arrays}) == 50
    arrays.clear()
    assert sum(len(free) for free in memory._free.values()) <= 4


def test_another_process_has_memory_of_its_own() -> None:
    memory = Memory()
    memory.array((10,))
    assert not pickle.loads(pickle.dumps(memory))._free
