"""Samples the expert tier and the machine while a trace runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.sse import get_json

INTERVAL_S = 0.5


@dataclass(frozen=True)
class Sample:
    """One moment; `time_s` is since the trace began."""

    time_s: float
    allocated: int
    """Expert workers that Serve has: starting, running and stopping ones. They take a device."""
    serving: int
    """Members that hold experts."""
    cpu: float
    """Part of the machine's cores that was busy since the last sample, whoever used them."""
    pressure: float
    """Part of that time in which something that could run waited for a core."""


class Watch:
    """Samples from `start` to `stop`, in a thread of its own."""

    def __init__(self, url: str, count_allocated: Callable[[], int]) -> None:
        self._url = url
        self._count_allocated = count_allocated
        self._stopping = threading.Event()
        self._samples: list[Sample] = []
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._begin_s = 0.0
        self._failure: Exception | None = None

    def start(self, begin_s: float) -> None:
        """`begin_s` on time.perf_counter is second 0."""
        self._begin_s = begin_s
        self._thread.start()

    def stop(self) -> list[Sample]:
        """All samples. Raises what ended the sampling too early."""
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._samples

    def _run(self) -> None:
        try:
            self._sample_until_stopped()
        except Exception as error:  # a day with half of its samples would look cheap
            self._failure = error

    def _sample_until_stopped(self) -> None:
        last = _Machine.now()
        while not self._stopping.wait(INTERVAL_S):
            try:
                serving, allocated = self._count_serving(), self._count_allocated()
            except OSError:
                continue  # the next sample comes soon
            now = _Machine.now()
            time_s = now.time_s - self._begin_s
            self._samples.append(Sample(time_s, allocated, serving, *now.since(last)))
            last = now

    def _count_serving(self) -> int:
        status, body = get_json(self._url, "/status")
        if status != 200:
            raise OSError(f"/status answers {status}")
        return num_serving(body)


def num_serving(status: dict[str, Any]) -> int:
    """Expert workers that hold something, in the body of /status."""
    return sum(bool(worker["num_experts"]) for worker in status["workers"])


def count_replicas(deployment: str) -> Callable[[], int]:
    """Counts what Ray Serve has of a deployment, in whatever state."""
    from ray import serve

    from cluster.launcher import APP_NAME

    def count() -> int:
        found = serve.status().applications[APP_NAME].deployments[deployment]
        return sum(found.replica_states.values())

    return count


@dataclass(frozen=True)
class _Machine:
    """Counters of the kernel; all of them only grow."""

    time_s: float
    busy_ticks: int
    all_ticks: int
    waiting_s: float

    @staticmethod
    def now() -> _Machine:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        user, nice, system, idle, iowait, irq, softirq, steal = ticks[:8]
        busy = user + nice + system + irq + softirq + steal
        some = Path("/proc/pressure/cpu").read_text().split("\n", 1)[0]
        waiting_s = int(some.rpartition("total=")[2]) / 1e6
        return _Machine(time.perf_counter(), busy, busy + idle + iowait, waiting_s)

    def since(self, last: _Machine) -> tuple[float, float]:
        """CPU and pressure, each 0..1."""
        ticks = max(1, self.all_ticks - last.all_ticks)
        waited = (self.waiting_s - last.waiting_s) / (self.time_s - last.time_s)
        return (self.busy_ticks - last.busy_ticks) / ticks, min(1.0, waited)
