"""How long experts have been without any holder: when a router that may do so gives them up."""

import threading


class Outage:
    """Shared by the lanes of a router. One time for all experts: each layer of a step would
    otherwise wait anew for what the same dead worker held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since_s: float | None = None

    @property
    def lasts(self) -> bool:
        return self._since_s is not None

    def since(self, now_s: float) -> float:
        """When it began: now, unless it lasts already."""
        with self._lock:
            if self._since_s is None:
                self._since_s = now_s
            return self._since_s

    def end(self) -> None:
        """Every expert has a holder again."""
        self._since_s = None
