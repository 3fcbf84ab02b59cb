"""Device time of a function: medians of CUDA events, with cold caches.

Serving runs these kernels from CUDA graphs, so each function is captured once and its replays are
timed; what cannot be captured is timed as it is, and says so. Before every run a buffer of twice
the L2 cache is written: the data comes from memory, and the host's work for the launch is hidden
behind that write.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch

WARM_UPS = 2
MIN_RUNS, MAX_RUNS = 5, 50
BUDGET_S = 0.1
MIN_FLUSH_BYTES = 64 << 20

Work = Callable[[], object]


class Timing(NamedTuple):
    """how: of a graph's replay, of eager launches, or not at all."""

    seconds: float | None
    how: Literal["graph", "eager", "not measured"]


class Timer(Protocol):
    """Something that times a function."""

    capture_failure: str
    """Why something could not be captured, if so: torch's allocator may have kept what broke, and
    the next unit needs a new process."""

    def time(self, work: Work) -> Timing:
        """Runs it at least once."""


class NoTimer:
    """Runs the function and times nothing: for machines whose times say nothing."""

    capture_failure = ""

    def time(self, work: Work) -> Timing:
        work()
        return Timing(None, "not measured")


class CudaTimer:
    """Times on the current CUDA device."""

    def __init__(self) -> None:
        self.capture_failure = ""
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, MIN_FLUSH_BYTES), dtype=torch.uint8).cuda()

    def time(self, work: Work) -> Timing:
        """Median seconds, launch excluded."""
        for _ in range(WARM_UPS):
            work()
        torch.cuda.synchronize()
        try:
            graph = _capture(work)
        except RuntimeError as error:
            first = error.__context__ or error  # what ends the capture fails too
            self.capture_failure = f"{type(first).__name__}: {first}"
            torch.cuda.synchronize()
            return Timing(self._median(work), "eager")
        return Timing(self._median(graph.replay), "graph")

    def _median(self, run: Work) -> float:
        first = self._once(run)
        runs = min(MAX_RUNS, max(MIN_RUNS, int(BUDGET_S / max(first, 1e-6))))
        return statistics.median(self._once(run) for _ in range(runs))

    def _once(self, run: Work) -> float:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3


def _capture(work: Work) -> torch.cuda.CUDAGraph:
    """Raises RuntimeError if something in it waits for the device or cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph
