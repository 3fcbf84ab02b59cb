"""What each kind of worker tells in numbers, from the counters that it keeps anyway.

Once a second the line to the directory asks, every few seconds Ray's metrics do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from attention.worker import AttentionWorker
from cluster.observability.catalog import HOP_PARTS, QUEUE_BOUNDS
from cluster.observability.rates import Rate
from experts.channel.channel import ChannelCounters
from experts.hop import Fault
from experts.metrics import Histogram, Labels, Sample
from experts.worker import ExpertWorker
from router.client import RouterClient
from router.worker import RouterWorker

Clock = Callable[[], float]
CHECKSUMS = ("header_crc", "payload_crc", "envelope_crc")


class ExpertSamples:
    """Of an expert worker."""

    def __init__(self, worker: ExpertWorker, clock: Clock = time.monotonic) -> None:
        self._worker = worker
        self._busy, self._rows = Rate(clock), Rate(clock)

    def __call__(self) -> Iterator[Sample]:
        worker, counters = self._worker, self._worker.counters
        yield Sample("shoal_worker_busy", (), min(1.0, self._busy.read(counters.busy_s)))
        yield Sample("shoal_worker_rows_total", (), counters.pairs)
        yield Sample("shoal_worker_rows_per_s", (), self._rows.read(counters.pairs))
        yield Sample("shoal_worker_batches_total", (), counters.batches)
        yield Sample("shoal_worker_waiting_batches", (), worker.num_waiting)
        yield Sample("shoal_experts_held", (), len(worker.holds))
        reasons = {"refused": counters.refused, "not_here": counters.not_here}
        yield from _by_word("shoal_worker_refusals_total", "reason", reasons)
        yield from _queue(counters.queue_us_buckets, counters.queue_us)
        yield from _channel(worker.channel_counters)


class RouterSamples:
    """Of a router, deployed or inside an attention worker."""

    def __init__(self, worker: RouterWorker) -> None:
        self._worker = worker

    def __call__(self) -> Iterator[Sample]:
        lanes, clients = self._worker.counters, self._worker.hop_counters
        hops = [client.histograms() for client in clients]
        for part in HOP_PARTS:
            times = _sum_of([getattr(told, part) for told in hops])
            yield from times.samples("shoal_hop_seconds", (("part", part),))
        for fault in Fault:
            count = sum(client.faults[fault] for client in clients)
            yield Sample("shoal_hop_faults_total", (("fault", fault.name.lower()),), count)
        yield Sample("shoal_hedges_total", (), sum(lane.hedges for lane in lanes))
        yield Sample("shoal_resent_pairs_total", (), sum(lane.resent_pairs for lane in lanes))
        yield Sample("shoal_holder_waits_total", (), sum(lane.waits for lane in lanes))


class DeployedRouterSamples(RouterSamples):
    """Of one that attention workers send to."""

    def __call__(self) -> Iterator[Sample]:
        yield from super().__call__()
        yield Sample("shoal_worker_waiting_batches", (), self._worker.num_waiting)
        yield from _channel(self._worker.channel_counters)


class AttentionSamples:
    """Of an attention worker and its way to the experts."""

    def __init__(
        self,
        worker: AttentionWorker,
        moe: RouterClient | RouterWorker,
        model: str,
        clock: Clock = time.monotonic,
    ) -> None:
        self._worker = worker
        self._moe = moe
        self._model: Labels = (("model_name", model),)
        self._busy = Rate(clock)

    def __call__(self) -> Iterator[Sample]:
        stats = self._worker.engine.stats()
        for name, value in {
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
            "num_requests_swapped": 0,
            "kv_cache_usage_perc": 1 - stats.kv_blocks_free / max(1, stats.kv_blocks_total),
            "prompt_tokens_total": stats.admitted_prompt_tokens,
            "generation_tokens_total": stats.generated_tokens,
            "prefix_cache_queries_total": stats.admitted_prompt_tokens,
            "prefix_cache_hits_total": stats.admitted_cached_tokens,
            "num_preemptions_total": stats.num_preemptions,
        }.items():
            yield Sample(f"vllm_{name}", self._model, value)
        yield Sample("shoal_worker_busy", (), min(1.0, self._busy.read(stats.busy_s)))
        yield Sample("shoal_worker_requests_total", (), stats.requests_received)
        yield Sample("shoal_recomputed_tokens_total", (), stats.recomputed_tokens)
        yield from self._worker.engine.step_times.samples("shoal_step_seconds")
        yield Sample("shoal_step_errors_total", (), stats.step_errors)
        if isinstance(self._moe, RouterClient):
            yield Sample("shoal_router_failovers_total", (), self._moe.failovers)
        else:
            yield from RouterSamples(self._moe)()


def _by_word(name: str, label: str, counts: Mapping[str, float]) -> Iterator[Sample]:
    for word, count in counts.items():
        yield Sample(name, ((label, word),), count)


def _sum_of(histograms: Sequence[Histogram]) -> Histogram:
    """Of the same bounds."""
    total = Histogram(histograms[0].bounds)
    total.counts = [sum(counts) for counts in zip(*(h.counts for h in histograms), strict=True)]
    total.total = sum(histogram.total for histogram in histograms)
    return total


def _queue(buckets: Sequence[int], total_us: int) -> Iterator[Sample]:
    """buckets: batches by the bit length of the microseconds that they waited."""
    waits = Histogram(QUEUE_BOUNDS)
    first = round(QUEUE_BOUNDS[0] * 1e6).bit_length()
    last = first + len(QUEUE_BOUNDS) - 1
    waits.counts = [sum(buckets[:first]), *buckets[first:last], sum(buckets[last:])]
    waits.total = total_us / 1e6
    return waits.samples("shoal_worker_queue_seconds")


def _channel(counters: ChannelCounters) -> Iterator[Sample]:
    moved = {"in": counters.bytes_in, "out": counters.bytes_out}
    yield from _by_word("shoal_channel_bytes_total", "direction", moved)
    errors = dict.fromkeys(CHECKSUMS, 0)  # told from the start: a rate misses a first event else
    errors |= {"auth": counters.auth_failures, "handler": counters.handler_errors}
    errors |= counters.bad_frames
    yield from _by_word("shoal_frame_errors_total", "field", errors)
