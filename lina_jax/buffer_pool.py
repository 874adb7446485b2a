"""Large arrays whose memory is used again.

Fresh memory is zeroed by the system page by page, which costs as much as reading the records that are put there.
"""

import threading
import weakref

import numpy as np

_KEPT = 4  # free buffers: batches come and go one by one


class BufferPool:
    """Hands out buffers; each comes back by itself when the last array that shows it is gone."""

    def __init__(self):
        self._free: list[memoryview] = []
        self._lock = threading.RLock()  # a collection, which ends in _put, may begin anywhere

    def __reduce__(self):
        return BufferPool, ()

    def bytes(self, count: int) -> np.ndarray:
        """(count,) uint8: all zero when new, else as it was left."""
        with self._lock:
            buffer = next((buffer for buffer in self._free if buffer.nbytes == count), None)
            if buffer is None:
                buffer = memoryview(np.zeros(count, np.uint8))
            else:
                self._free = [other for other in self._free if other is not buffer]
        # NumPy looks through arrays for the owner of a view's memory, but not through a memoryview: every view of this
        # array keeps this array alive.
        array = np.frombuffer(buffer, np.uint8)
        weakref.finalize(array, self._put, buffer).atexit = False
        return array

    def _put(self, buffer: memoryview) -> None:
        with self._lock:
            self._free = [*self._free[-_KEPT + 1 :], buffer]
