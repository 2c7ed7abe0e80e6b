"""Memory for frames that is used again as soon as nobody looks at it any more.

A batch of frames takes megabytes, which an operating system hands out anew page by page, each
filled with zeros first; that alone would take a sixth of the time of decoding them. So the memory
comes back here::

    Memory.array(shape) --> array --> views of it, a Batch, ... the last of them is gone
          ^                                                                  |
          '---------------------------- the memory <-------------------------'

To its users it is an array as any other, theirs for as long as they hold it or a view of it.
"""

import math
import weakref
from collections import defaultdict, deque
from typing import Any

import numpy as np

_KEPT = 4  # pieces of a size that are not in use; more are given back to the operating system


class Memory:
    """Makes arrays of pixels; may be used by many threads, and is sent to a process empty."""

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=_KEPT))

    def __reduce__(self) -> Any:
        return Memory, ()

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array, uint8[*shape], of whatever values."""
        size = math.prod(shape)
        free = self._free[size]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8)
        lease = _Lease(memory, shape)
        weakref.finalize(lease, free.append, memory).atexit = False
        return np.asarray(lease)


class _Lease:
    """Holds memory for an array, which holds this: it is gone when the last view of it is.

    NumPy lets a view of a view hold the array at the bottom alone, unless that is no array: without
    this in between, the array that `Memory` makes could go before its views do.
    """

    def __init__(self, memory: np.ndarray, shape: tuple[int, ...]) -> None:
        self.__array_interface__ = {**memory.__array_interface__, "shape": shape}
