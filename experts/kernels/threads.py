"""The helper threads of this process: started, stopped, and what the compiled pool knows."""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from experts.kernels import pool

_LIBC_FUNCTIONS: Final = {
    pool.SCHED_YIELD: "sched_yield",
    pool.MUTEX_LOCK: "pthread_mutex_lock",
    pool.MUTEX_UNLOCK: "pthread_mutex_unlock",
    pool.COND_WAIT: "pthread_cond_wait",
    pool.COND_BROADCAST: "pthread_cond_broadcast",
    pool.ALLOCATE: "aligned_alloc",
    pool.FREE: "free",
}


class HelperThreads:
    """num_threads - 1 threads that wait in compiled code, without the GIL.

    `address` is that of the pool's fields and stays the same. A forked child has no threads: there
    the pool falls back to the calling thread alone until `start` is called again.
    """

    def __init__(self, bodies: Sequence[int]) -> None:
        memory = np.zeros(pool.FIELDS + 8, np.int64)
        skipped = -memory.ctypes.data % 64 // 8  # a field group is a cache line
        self._fields = memory[skipped : skipped + pool.FIELDS]
        self._bodies = list(bodies)
        self._threads: list[threading.Thread] = []
        self._help = _function(pool.help_until_stopped)
        self._stop = _function(pool.stop_helpers)
        self.address: int = self._fields.ctypes.data
        self._reset()
        os.register_at_fork(after_in_child=self._forget)
        # Compiled code may be unmapped when the interpreter ends: nobody must be inside then.
        atexit.register(self.stop)

    @property
    def num_threads(self) -> int:
        """The caller of a kernel included."""
        return int(self._fields[pool.NUM_THREADS])

    def start(self, num_threads: int) -> None:
        """Have num_threads - 1 helpers, in place of those there are. No kernel may be running."""
        self.stop()
        self._threads = [
            threading.Thread(
                target=self._help, args=(self.address,), name=f"kernel-helper-{i}", daemon=True
            )
            for i in range(1, num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self._fields[pool.NUM_THREADS] = num_threads

    def stop(self) -> None:
        """End the helpers; callers work alone."""
        self._fields[pool.NUM_THREADS] = 1
        if self._threads:
            self._stop(self.address)
            for thread in self._threads:
                thread.join()
        self._reset()

    def _forget(self) -> None:
        self._threads = []
        self._reset()

    def _reset(self) -> None:
        self._fields[:] = 0
        self._fields[pool.NUM_THREADS] = 1
        self._fields[pool.BODIES : pool.BODIES + len(self._bodies)] = self._bodies
        libc = ctypes.CDLL(None)
        for field, name in _LIBC_FUNCTIONS.items():
            self._fields[field] = ctypes.cast(getattr(libc, name), ctypes.c_void_p).value or 0
        libc.pthread_mutex_init(ctypes.c_void_p(self.address + 8 * pool.MUTEX), None)
        libc.pthread_cond_init(ctypes.c_void_p(self.address + 8 * pool.CONDITION), None)


def _function(compiled: Any) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(compiled.address)
