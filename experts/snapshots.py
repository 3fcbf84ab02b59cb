"""The newest snapshot of the cluster, shared by the threads of a process."""

import threading

from experts.messages import Snapshot

_NOTHING = Snapshot(version=0, epoch=0, ready=False, stage="no snapshot yet")


class SnapshotBoard:
    """One writer (`publish` is a DirectoryClient's on_snapshot), any number of readers.

    `generation` counts publications and touches: unlike a version it cannot repeat after a
    directory restart.
    """

    def __init__(self, snapshot: Snapshot = _NOTHING) -> None:
        self._changed = threading.Condition()
        self._state = (0, snapshot)

    @property
    def generation(self) -> int:
        return self._state[0]

    @property
    def current(self) -> tuple[int, Snapshot]:
        """Generation and snapshot that belong together."""
        return self._state

    def publish(self, snapshot: Snapshot) -> None:
        """Replace the snapshot and wake those who wait for news."""
        with self._changed:
            self._state = (self._state[0] + 1, snapshot)
            self._changed.notify_all()

    def touch(self) -> None:
        """Publish the same again: who waits for a worker shall look at all of them once more."""
        with self._changed:
            self._state = (self._state[0] + 1, self._state[1])
            self._changed.notify_all()

    def wait_newer(self, generation: int, timeout_s: float) -> bool:
        """Wait until there is a later generation; False when the time runs out first."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state[0] > generation, timeout_s)
