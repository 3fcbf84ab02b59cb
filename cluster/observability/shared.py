"""One computation for everybody who asks meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

View = TypeVar("View")


class Shared(Generic[View]):
    """Calls `view` in a thread of its own, once for all who wait for it to begin: however many ask,
    one call runs and one is due, and nobody gets what was seen before they asked. Any thread."""

    def __init__(self, view: Callable[[], View], name: str) -> None:
        self._view = view
        self._thread = ThreadPoolExecutor(1, name)
        self._lock = Lock()
        self._due: Future[View] | None = None

    def ask(self) -> Future[View]:
        """Not to be cancelled: others may have it too. Raises RuntimeError once closed."""
        with self._lock:
            if self._due is None:
                self._due = self._thread.submit(self._run)
            return self._due

    def close(self) -> None:
        """End the thread, after what it is at."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> View:
        with self._lock:
            self._due = None
        return self._view()
