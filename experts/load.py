"""How many token rows each expert computed lately: what placement balances. Pure.

A worker counts (LoadCounter), the directory keeps each worker's newest counts and adds them up
(LoadBoard); `layer_balance` says how even the sum is.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

from experts.placement.eplb import balancedness

WINDOW_S = 60.0
RECENT_S = 5.0
NUM_SLICES = 60
Counts = npt.NDArray[np.int64]


class LoadCounter:
    """Rows by (layer, expert) over a sliding window, kept in NUM_SLICES slices of time.

    The window is what placement goes by. Its newest complete slices, `recent_s` in all (about
    RECENT_S, less if the window is shorter), are for people who watch.
    """

    def __init__(
        self,
        layers: Iterable[int],
        num_experts: int,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._layers = {layer: i for i, layer in enumerate(layers)}
        self.window_s = window_s
        self._slice_s = window_s / NUM_SLICES
        self._num_recent = min(max(1, round(RECENT_S / self._slice_s)), NUM_SLICES - 1)
        self.recent_s = self._num_recent * self._slice_s
        self._clock = clock
        self._lock = threading.Lock()
        # V3: 7 MB. Slice n is at n % NUM_SLICES until NUM_SLICES later ones have begun.
        self._slices = np.zeros((NUM_SLICES, len(self._layers), num_experts), np.int64)
        self._now = int(clock() / self._slice_s)

    def add(self, layer: int, expert_ids: npt.NDArray[np.int32]) -> None:
        """One row for each entry of expert_ids [P]; an id may repeat."""
        with self._lock:
            self._begin_slice()
            np.add.at(self._slices[self._now % NUM_SLICES, self._layers[layer]], expert_ids, 1)

    def totals(self) -> dict[int, list[int]]:
        """layer -> rows of each expert [E] within the window."""
        with self._lock:
            self._begin_slice()
            return self._by_layer(self._slices.sum(axis=0))

    def recent(self) -> dict[int, list[int]]:
        """layer -> rows of each expert [E] within the `recent_s` before the slice of now."""
        with self._lock:
            self._begin_slice()
            numbers = np.arange(self._now - self._num_recent, self._now) % NUM_SLICES
            return self._by_layer(self._slices[numbers].sum(axis=0))

    def _begin_slice(self) -> None:
        """Clear what has left the window. Caller holds the lock."""
        now = int(self._clock() / self._slice_s)
        for number in range(max(self._now + 1, now - NUM_SLICES + 1), now + 1):
            self._slices[number % NUM_SLICES] = 0
        self._now = now

    def _by_layer(self, rows: Counts) -> dict[int, list[int]]:
        return dict(zip(self._layers, rows.tolist(), strict=True))


@dataclass(frozen=True)
class ClusterLoad:
    """All workers within the window. A row is one token computed by one expert (a pair)."""

    window_s: float  # the longest that a worker counts over
    rows: Counts  # [L, E]
    rows_by_worker: Mapping[str, Counts]  # worker_id -> rows of its layers [L]


class LoadBoard:
    """The newest counts of each live worker; its callers see to locking.

    `window_s`: what `total` tells while no worker has said anything.
    """

    def __init__(self, num_layers: int, num_experts: int, window_s: float = WINDOW_S) -> None:
        self._shape = (num_layers, num_experts)
        self._window_s = window_s
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
            max((window_s for window_s, _ in counts.values()), default=0.0) or self._window_s,
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
