"""What the members reported last, loads and samples, and the replies made of it. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from experts.load import ClusterLoad, LoadBoard
from experts.messages import (
    MAX_SAMPLES,
    ClusterLoadReply,
    LoadReport,
    MetricsReply,
    Samples,
    Snapshot,
    WorkerRows,
    WorkerSamples,
)
from experts.metrics import Sample
from experts.placement.space import ExpertSpace, Loads

MAX_ABSENT = 256
"""So many can come back and count on; what they had counted of the others would count twice."""


class Reports:
    """Of each live member the newest, of those that are gone the counters; its callers see to
    locking."""

    def __init__(self, space: ExpertSpace) -> None:
        self._layers = space.moe_layers
        self._loads = LoadBoard(len(space.moe_layers), space.num_experts)
        self._samples: dict[str, Samples] = {}
        self._gone: Counter[str] = Counter()
        self._absent: dict[str, Counter[str]] = {}  # of these, who may come back; oldest first

    def take_load(self, worker_id: str, report: LoadReport) -> None:
        """Raises ValueError when its rows are not of this model's shape."""
        self._loads.put(worker_id, report)

    def take_samples(self, worker_id: str, samples: Samples) -> None:
        """What one that comes back has counted on from is not of the past."""
        self._samples[worker_id] = samples
        if before := self._absent.pop(worker_id, None):
            now = _counters(samples)
            self._gone.subtract({name: n for name, n in before.items() if now[name] >= n})

    def drop(self, worker_id: str) -> None:
        """Forget a member but for its counters; an unknown one is no error."""
        self._loads.drop(worker_id)
        if samples := self._samples.pop(worker_id, None):
            self._absent[worker_id] = _counters(samples)
            self._gone.update(self._absent[worker_id])
        if len(self._absent) > MAX_ABSENT:
            del self._absent[next(iter(self._absent))]

    def layer_loads(self, workers: Iterable[str]) -> Loads:
        """Rows by layer within the window, {} if there are none."""
        rows = self._loads.total(workers).rows
        if not rows.any():
            return {}
        return dict(zip(self._layers, rows.tolist(), strict=True))

    def cluster_loads(self, workers: Sequence[str]) -> tuple[ClusterLoad, ClusterLoad]:
        """Within the window, and recently."""
        return self._loads.total(workers), self._loads.recent(workers)

    def gone(self) -> tuple[Sample, ...]:
        """What members that are not here any more had counted, by name, all labels together."""
        found = (Sample(name, (), n) for name, n in self._gone.items() if n > 0)
        return tuple(islice(found, MAX_SAMPLES))

    def samples(self, snapshot: Snapshot) -> list[WorkerSamples]:
        """Of all members."""
        return [
            WorkerSamples.model_construct(  # checked when they came
                worker_id=worker.worker_id,
                role=worker.role,
                samples=self._samples.get(worker.worker_id, ()),
            )
            for worker in snapshot.workers
        ]


def load_reply(
    epoch: int, layers: Sequence[int], window: ClusterLoad, recent: ClusterLoad
) -> ClusterLoadReply:
    """Both of the same workers."""
    return ClusterLoadReply(
        epoch=epoch,
        window_s=window.window_s,
        recent_s=recent.window_s,
        layers=tuple(layers),
        rows=tuple(map(tuple, window.rows.tolist())),
        recent_rows=tuple(map(tuple, recent.rows.tolist())),
        workers=tuple(
            WorkerRows(
                worker_id=worker,
                rows=tuple(rows.tolist()),
                recent_rows=tuple(recent.rows_by_worker[worker].tolist()),
            )
            for worker, rows in window.rows_by_worker.items()
        ),
    )


def metrics_reply(
    own: Sequence[Sample], members: Sequence[WorkerSamples], gone: Samples
) -> MetricsReply:
    """The directory first."""
    mine = WorkerSamples(worker_id="placement", role="placement", samples=tuple(own))
    return MetricsReply(workers=(mine, *members), gone=gone)


def _counters(samples: Samples) -> Counter[str]:
    """Those of a member by name."""
    found: Counter[str] = Counter()
    for name, _, value in samples:
        if name.endswith("_total"):
            found[name] += value  # type: ignore[assignment]  # typed for integers
    return found
