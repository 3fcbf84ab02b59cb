"""How many token rows each expert computed lately: what placement balances. Pure.

A worker counts (LoadCounter), the directory keeps each worker's newest report and adds them up
(LoadBoard); `layer_balance` says how even the sum is.
"""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
import numpy.typing as npt

from experts.messages import LoadReport
from experts.placement.eplb import balancedness

WINDOW_S = 60.0
RECENT_S = 5.0
NUM_SLICES = 60
MAX_ROWS = 1 << 40  # of an expert in a report: sums over all workers and experts fit int64
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
        return dict(zip(self._layers, self._window().tolist(), strict=True))

    def report(self) -> LoadReport:
        """For the directory."""
        return LoadReport(
            window_s=self.window_s,
            rows=pack(self._window()),
            recent_s=self.recent_s,
            recent_rows=pack(self._recent()),
        )

    def _window(self) -> Counts:
        with self._lock:
            self._begin_slice()
            rows: Counts = self._slices.sum(axis=0)
        return rows

    def _recent(self) -> Counts:
        """Within the `recent_s` before the slice of now."""
        with self._lock:
            self._begin_slice()
            numbers = np.arange(self._now - self._num_recent, self._now) % NUM_SLICES
            rows: Counts = self._slices[numbers].sum(axis=0)
        return rows

    def _begin_slice(self) -> None:
        """Clear what has left the window. Caller holds the lock."""
        now = int(self._clock() / self._slice_s)
        if now == self._now:
            return
        for number in range(max(self._now + 1, now - NUM_SLICES + 1), now + 1):
            self._slices[number % NUM_SLICES] = 0
        self._now = now


def pack(rows: Counts) -> bytes:
    """Rows [L, E] for a LoadReport: int64, little-endian, layer by layer."""
    return rows.astype("<i8", copy=False).tobytes()


def unpack(packed: bytes, num_layers: int, num_experts: int) -> Counts:
    """The rows [L, E] of a LoadReport, read-only. Raises ValueError."""
    if len(packed) != 8 * num_layers * num_experts:
        raise ValueError(f"{len(packed)} bytes of rows, not those of {num_layers} x {num_experts}")
    rows = np.frombuffer(packed, "<i8").astype(np.int64, copy=False)
    if rows.min() < 0 or rows.max() >= MAX_ROWS:
        raise ValueError("rows: a number is not in 0..2^40")
    return rows.reshape(num_layers, num_experts)


@dataclass(frozen=True)
class ClusterLoad:
    """All workers within a window. A row is one token computed by one expert (a pair)."""

    window_s: float  # the longest that a worker counts over
    rows: Counts  # [L, E]
    rows_by_worker: Mapping[str, Counts]  # worker_id -> rows of its layers [L]


class LoadBoard:
    """The newest report of each live worker; its callers see to locking."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        self._window: dict[str, tuple[float, Counts]] = {}  # worker_id -> window_s, [L, E]
        self._recent: dict[str, tuple[float, Counts]] = {}

    def put(self, worker_id: str, report: LoadReport) -> None:
        """Replace what the worker said before. Raises ValueError unless rows are [L, E]."""
        rows, recent_rows = (unpack(r, *self._shape) for r in (report.rows, report.recent_rows))
        self._window[worker_id] = report.window_s, rows
        self._recent[worker_id] = report.recent_s, recent_rows

    def drop(self, worker_id: str) -> None:
        """Forget a worker; an unknown one is no error."""
        self._window.pop(worker_id, None)
        self._recent.pop(worker_id, None)

    def total(self, workers: Iterable[str]) -> ClusterLoad:
        """The sum over these workers; one that has said nothing yet computed nothing."""
        return self._sum(self._window, workers, WINDOW_S)

    def recent(self, workers: Iterable[str]) -> ClusterLoad:
        """The same of the newest part of the window."""
        return self._sum(self._recent, workers, RECENT_S)

    def _sum(
        self, newest: Mapping[str, tuple[float, Counts]], workers: Iterable[str], window_s: float
    ) -> ClusterLoad:
        """window_s: that of an answer without any report."""
        nothing = np.zeros(self._shape, np.int64)
        counts = {worker: newest.get(worker, (0.0, nothing)) for worker in workers}
        return ClusterLoad(
            max((seconds for seconds, _ in counts.values()), default=0.0) or window_s,
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
