"""How many token rows each expert computed lately: what placement balances."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


class LoadCounter:
    """Rows by (layer, expert) over a sliding window, kept in `num_buckets` slices of time."""

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        window_s: float = 60.0,
        num_buckets: int = 12,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._layers = {layer: i for i, layer in enumerate(layers)}
        self._num_experts = num_experts
        self._bucket_s = window_s / num_buckets
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: deque[tuple[int, Counts]] = deque(maxlen=num_buckets)  # (slice, [L, E])

    def add(self, layer: int, expert_ids: npt.NDArray[np.int32]) -> None:
        """One row for each entry of expert_ids [P]; an id may repeat."""
        now = int(self._clock() / self._bucket_s)
        with self._lock:
            if not self._buckets or self._buckets[-1][0] != now:
                empty = np.zeros((len(self._layers), self._num_experts), np.int64)
                self._buckets.append((now, empty))
            np.add.at(self._buckets[-1][1][self._layers[layer]], expert_ids, 1)

    def totals(self) -> dict[int, list[int]]:
        """layer -> rows of each expert [E] within the window."""
        oldest = int(self._clock() / self._bucket_s) - (self._buckets.maxlen or 0) + 1
        with self._lock:
            recent = [counts for slice_, counts in self._buckets if slice_ >= oldest]
            total = np.sum(recent, axis=0) if recent else None
        nothing = [0] * self._num_experts
        return {
            layer: nothing[:] if total is None else total[i].tolist()
            for layer, i in self._layers.items()
        }
