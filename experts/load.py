"""How many token rows each expert computed lately: what placement balances. Pure.

A worker counts (LoadCounter), the directory keeps each worker's newest counts and adds them up
(LoadBoard); `layer_balance` says how even the sum is.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

from experts.placement.eplb import balancedness

WINDOW_S = 60.0
Counts = npt.NDArray[np.int64]


class LoadCounter:
    """Rows by (layer, expert) over a sliding window, kept in `num_buckets` slices of time."""

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        window_s: float = WINDOW_S,
        num_buckets: int = 12,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._layers = {layer: i for i, layer in enumerate(layers)}
        self._num_experts = num_experts
        self.window_s = window_s
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


@dataclass(frozen=True)
class ClusterLoad:
    """All workers within the window. A row is one token computed by one expert (a pair)."""

    window_s: float  # the longest that a worker counts over
    rows: Counts  # [L, E]
    rows_by_worker: Mapping[str, Counts]  # worker_id -> rows of its layers [L]


class LoadBoard:
    """The newest counts of each live worker; its callers see to locking."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        self._newest: dict[str, tuple[float, Counts]] = {}  # worker_id -> window_s, [L, E]

    def put(self, worker_id: str, window_s: float, rows: Sequence[Sequence[int]]) -> None:
        """Replace what the worker said before. Raises ValueError unless `rows` is [L, E]."""
        num_layers, num_experts = self._shape
        if len(rows) != num_layers or any(len(row) != num_experts for row in rows):
            widths = sorted({len(row) for row in rows})
            raise ValueError(f"rows of {len(rows)} layers of {widths} experts, not {self._shape}")
        self._newest[worker_id] = window_s, np.array(rows, np.int64)

    def drop(self, worker_id: str) -> None:
        """Forget a worker; an unknown one is no error."""
        self._newest.pop(worker_id, None)

    def total(self, workers: Iterable[str]) -> ClusterLoad:
        """The sum over these workers; one that has said nothing yet computed nothing."""
        nothing = np.zeros(self._shape, np.int64)
        counts = {worker: self._newest.get(worker, (0.0, nothing)) for worker in workers}
        return ClusterLoad(
            max((window_s for window_s, _ in counts.values()), default=0.0) or WINDOW_S,
            sum((rows for _, rows in counts.values()), start=nothing),
            {worker: rows.sum(axis=1) for worker, (_, rows) in counts.items()},
        )


@dataclass(frozen=True)
class LayerBalance:
    """How even one layer's rows are: mean / max, 1.0 is even (or idle).

    `workers`: of the rows of each live expert worker, idle ones included: what a step waits for,
    and what moving and replicating experts betters. `experts`: of the rows of each logical expert,
    which only the traffic decides.
    """

    workers: float
    experts: float


def layer_balance(
    rows: Sequence[Sequence[int]], rows_by_worker: Sequence[Sequence[int]]
) -> list[LayerBalance]:
    """For each of L layers, from rows [L, E] and rows_by_worker [W, L]."""
    of_workers = list(zip(*rows_by_worker, strict=True)) or [()] * len(rows)
    return [
        LayerBalance(balancedness(workers), balancedness(experts))
        for workers, experts in zip(of_workers, rows, strict=True)
    ]
