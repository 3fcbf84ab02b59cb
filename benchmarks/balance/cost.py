"""What load counting, reporting and planning take from throughput: measured in two ways.

paired     rounds of the same requests with the workers' counters and with counters that do nothing,
           in one process, by turns (on off, off on, ..): what else the machine does hits the two
           rounds of a pair alike.
accounted  what the work costs by itself, in microseconds, times how often it is done. Free of the
           noise between rounds, blind to what a call does to caches and other threads.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from serving.plan import Scenario
from serving.summary import summarise
from serving.systems import EngineSystem

from cluster.config import parse_config
from cluster.inline import InlineCluster
from experts.load import LoadCounter
from experts.messages import LoadReport, encode
from experts.worker import ExpertWorker

READY_TIMEOUT_S = 600.0
REPORT_EVERY_S = 1.0
NUM_WORKERS = 2
DECODE = Scenario("decode", prompt_tokens=16, new_tokens=128, num_requests=16, concurrency=8)
WARM_UP = -1  # seed of rounds that no pair has
NUM_CALLS = 2000


class NoCounter:
    """In the place of a LoadCounter: as if nothing were computed, so nothing is reported either."""

    def __init__(self, counter: LoadCounter) -> None:
        self._report = counter.report()

    def add(self, layer: int, expert_ids: npt.NDArray[np.int32]) -> None:
        """Nothing."""

    def report(self) -> LoadReport:
        """What it was before."""
        return self._report


@dataclass(frozen=True)
class Accounted:
    """Microseconds of each part, and how often it is done."""

    add_us: float
    """Counting a batch of the mean size."""
    batch_us: float
    """Computing one."""
    batches_per_s: float
    """Of all workers."""
    report_us: float
    """Adding up a worker's window and writing its message, once a second."""
    plan_us: float
    """One step of rebalancing, once in `rebalance_every_s`."""
    rebalance_every_s: float

    @property
    def share(self) -> float:
        """Of one core's time."""
        reports_us = self.report_us * NUM_WORKERS / REPORT_EVERY_S
        plans_us = self.plan_us / self.rebalance_every_s
        return (self.add_us * self.batches_per_s + reports_us + plans_us) / 1e6


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """With 95 % confidence, by ranks alone (the binomial as a normal); all of a few values."""
    ordered = sorted(values)
    rank = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
    return ordered[rank], ordered[-1 - rank]


@dataclass(frozen=True)
class Cost:
    """Of counting and balancing."""

    tokens_per_s: list[tuple[float, float]]
    """Of each pair of rounds: with, without."""
    accounted: Accounted

    @property
    def paired(self) -> list[float]:
        """Share of throughput that each pair lost; negative where the round with it was faster."""
        return [1 - with_it / without for with_it, without in self.tokens_per_s]

    @property
    def median(self) -> float:
        return statistics.median(self.paired)

    @property
    def interval(self) -> tuple[float, float]:
        """In which the median of ever more pairs would lie, with 95 % confidence."""
        return median_interval(self.paired)


def measure(folder: Path, num_pairs: int, plan_us: float, scenario: Scenario = DECODE) -> Cost:
    """On a cluster in this process; `plan_us` is what a step of rebalancing takes."""
    config = parse_config(
        {
            "model": str(folder),
            "router": {"mode": "inline"},
            "experts": {"num_workers": NUM_WORKERS},
            "attention": {"engine": {"enable_prefix_caching": False}},
        }
    )
    cluster = InlineCluster(config)
    try:
        cluster.wait_ready(READY_TIMEOUT_S)
        system = EngineSystem(cluster.ingress.pool, cluster.close)
        rounds = _Rounds(system, [member.worker for member in cluster.experts], scenario)
        rounds.run(WARM_UP, counting=True)
        pairs = [rounds.run_pair(number) for number in range(num_pairs)]
        accounted = rounds.account(plan_us, config.experts.rebalance.every_s)
    finally:
        cluster.close()
    return Cost(pairs, accounted)


class _Rounds:
    """The same requests with and without counting."""

    def __init__(
        self, system: EngineSystem, workers: list[ExpertWorker], scenario: Scenario
    ) -> None:
        self._system, self._workers, self._scenario = system, workers, scenario

    def run_pair(self, seed: int) -> tuple[float, float]:
        """tokens/s with and without; what was first in one pair is second in the next."""
        order = (True, False) if seed % 2 == 0 else (False, True)
        found = {counting: self.run(seed, counting=counting) for counting in order}
        return found[True], found[False]

    def run(self, seed: int, *, counting: bool) -> float:
        """tokens/s of a round; its prompts depend on the seed only."""
        scenario = self._scenario
        with contextlib.nullcontext() if counting else _without_counters(self._workers):
            records = self._system.run(scenario, seed)
        figures = summarise(records, scenario.prompt_tokens, scenario.new_tokens)
        return figures["output_tokens_per_s"]

    def account(self, plan_us: float, rebalance_every_s: float) -> Accounted:
        """From one round more."""
        before, begin = self._counts(), time.perf_counter()
        self.run(WARM_UP, counting=True)
        seconds = time.perf_counter() - begin
        batches, pairs, busy_s = (self._counts() - before).tolist()
        counter = self._workers[0].load_counter
        return Accounted(
            add_us=add_us(counter, round(pairs / batches)),
            batch_us=busy_s / batches * 1e6,
            batches_per_s=batches / seconds,
            report_us=report_us(counter),
            plan_us=plan_us,
            rebalance_every_s=rebalance_every_s,
        )

    def _counts(self) -> npt.NDArray[np.float64]:
        """Batches, pairs, busy seconds of all workers."""
        counters = [worker.counters for worker in self._workers]
        return np.array([(c.batches, c.pairs, c.busy_s) for c in counters]).sum(axis=0)


@contextlib.contextmanager
def _without_counters(workers: list[ExpertWorker]) -> Iterator[None]:
    real = [worker.load_counter for worker in workers]
    for worker, counter in zip(workers, real, strict=True):
        worker.load_counter = NoCounter(counter)  # type: ignore[assignment]
    try:
        yield
    finally:
        for worker, counter in zip(workers, real, strict=True):
            worker.load_counter = counter


def add_us(counter: LoadCounter, num_pairs: int) -> float:
    """Of counting a batch."""
    layer, rows = next(iter(counter.totals().items()))
    expert_ids = np.arange(num_pairs, dtype=np.int32) % len(rows)
    return median_us(lambda: counter.add(layer, expert_ids))


def report_us(counter: LoadCounter) -> float:
    """Of a worker's report, as its member makes it."""
    return median_us(lambda: encode(counter.report()))


def median_us(call: Callable[[], object]) -> float:
    """Of many calls."""
    return statistics.median(_us(call) for _ in range(NUM_CALLS))


def _us(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6
