"""Large arrays whose memory is reused.

The system zeroes fresh memory page by page, which costs as much as reading the records that go there.
"""

import threading
import weakref

import numpy as np

_KEPT = 4  # free buffers at most; batches come and go one by one


class BufferPool:
    """Hands out buffers; each returns by itself once the last array that views it is gone."""

    def __init__(self):
        self._free: list[memoryview] = []
        self._lock = threading.RLock()  # garbage collection, which calls _put, may start anywhere

    def __reduce__(self):
        return BufferPool, ()

    def bytes(self, count: int) -> np.ndarray:
        """(count,) uint8: zeros if the memory is new, else its previous contents."""
        with self._lock:
            buffer = next((buffer for buffer in self._free if buffer.nbytes == count), None)
            if buffer is None:
                buffer = memoryview(np.zeros(count, np.uint8))
            else:
                self._free = [other for other in self._free if other is not buffer]
        # A view keeps the array alive that owns its memory: NumPy follows arrays back to it, but stops at a memoryview.
        # So every view of this array keeps this array alive.
        array = np.frombuffer(buffer, np.uint8)
        weakref.finalize(array, self._put, buffer).atexit = False
        return array

    def _put(self, buffer: memoryview) -> None:
        with self._lock:
            self._free = [*self._free[-_KEPT + 1 :], buffer]
