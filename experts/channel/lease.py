"""Memory that another process has opened must not be freed before that process has closed it.

The owner keeps one end of a pipe and sends the other one along with the handle. Who opened the
memory closes its end after the memory; the kernel does so for a process that dies. Then the owner's
end hangs up, and only then it lets the memory go.

CUDA driver API, cuIpcCloseMemHandle: freeing an exported allocation before is undefined behaviour.
"""

import contextlib
import os
import select
import threading


class Lease:
    """Keeps `memory` alive until its owner and its borrower have both closed."""

    def __init__(self, memory: object) -> None:
        self._memory: object = memory
        self._kept, self._given = os.pipe()

    def give(self) -> int:
        """The descriptor for the borrower; the caller closes it once it is sent."""
        given, self._given = self._given, -1
        return given

    def close(self) -> None:
        """The owner needs the memory no more. Returns at once. May be called twice."""
        if self._given >= 0:
            os.close(self.give())
        kept, self._kept = self._kept, -1
        if kept < 0:
            return
        memory, self._memory = self._memory, None
        with contextlib.suppress(RuntimeError):  # at the end of the process all memory goes
            waiting = threading.Thread(target=_keep, args=(memory, kept), name="lease", daemon=True)
            waiting.start()


def _keep(memory: object, kept: int) -> None:
    """Until the borrower's end is closed; nobody writes to it."""
    poller = select.poll()
    poller.register(kept, 0)  # a hang-up is always told
    poller.poll()
    os.close(kept)
