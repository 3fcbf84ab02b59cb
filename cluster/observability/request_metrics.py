"""What requests were, for metrics: vLLM's histograms and our counts, kept by each ingress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from cluster.frontend.observer import RequestRecord
from cluster.observability.catalog import (
    ERROR_CODES,
    FAILURE_CODES,
    FINISHED_REASONS,
    METRICS,
    OTHER,
)
from experts.metrics import Histogram, Labels, Sample


class RequestMetrics:
    """A RequestObserver. Its event loop writes, other threads read.

    Whatever clients send, the series stay those of the catalogue.
    """

    def __init__(self, model: str) -> None:
        self._model: Labels = (("model_name", model),)
        self._admitted = self._cancelled = 0
        self._refused = _zeros(ERROR_CODES)
        self._failed = _zeros(FAILURE_CODES)
        self._finished = Counter(dict.fromkeys(FINISHED_REASONS, 0))
        self._expert_s = 0.0
        self._histograms = {
            metric.name: Histogram(metric.bounds)
            for metric in METRICS
            if metric.kind == "histogram" and metric.roles == ("ingress",)
        }

    # ---- as RequestObserver

    def on_started(self, request_id: str) -> None:
        self._admitted += 1

    def on_refused(self, request_id: str, code: str) -> None:
        self._refused[code if code in ERROR_CODES else OTHER] += 1

    def on_kept(self, request_id: str) -> None:
        """Nothing: it ran no request."""

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        if gap_s is not None:
            self._see("inter_token_latency_seconds", gap_s)

    def on_finished(self, record: RequestRecord) -> None:
        self._expert_s += record.timing.expert_ms / 1e3
        self._count_end(record)
        if record.outcome == "ok":  # fast failures would make the latencies look better
            self._observe(record)

    # ---- for others

    def samples(self) -> Iterator[Sample]:
        """All series."""
        for name, histogram in self._histograms.items():
            yield from histogram.samples(name, self._model)
        for reason, count in self._finished.items():
            labels = (*self._model, ("finished_reason", reason))
            yield Sample("vllm_request_success_total", labels, count)
        yield Sample("shoal_requests_admitted_total", (), self._admitted)
        yield from _by_code("shoal_requests_refused_total", self._refused)
        yield from _by_code("shoal_requests_failed_total", self._failed)
        yield Sample("shoal_requests_cancelled_total", (), self._cancelled)
        yield Sample("shoal_request_expert_seconds_total", (), self._expert_s)

    # ---- inside

    def _count_end(self, record: RequestRecord) -> None:
        for reason in record.finish_reasons:
            self._finished[reason if reason in FINISHED_REASONS else "error"] += 1
        unfinished = record.num_sequences - len(record.finish_reasons)
        if record.outcome == "cancelled":
            self._cancelled += 1
            self._finished["abort"] += unfinished
        elif record.outcome == "error":
            self._failed[record.code if record.code in FAILURE_CODES else OTHER] += 1
            self._finished["error"] += unfinished

    def _observe(self, record: RequestRecord) -> None:
        timing = record.timing
        self._see("e2e_request_latency_seconds", record.e2e_s)
        self._see("request_prompt_tokens", record.prompt_tokens)
        self._see("request_generation_tokens", record.completion_tokens)
        if record.ttft_s is None:
            return
        self._see("time_to_first_token_seconds", record.ttft_s)
        self._see("request_queue_time_seconds", timing.queue_s)
        self._see("request_prefill_time_seconds", timing.prefill_s)
        self._see("request_decode_time_seconds", timing.decode_s)
        for token_s in record.token_s:
            self._see("request_time_per_output_token_seconds", token_s)

    def _see(self, name: str, value: float) -> None:
        self._histograms[f"vllm_{name}"].observe(value)


def _zeros(codes: Iterable[str]) -> Counter[str]:
    return Counter(dict.fromkeys((*sorted(codes), OTHER), 0))


def _by_code(name: str, counts: Counter[str]) -> Iterable[Sample]:
    return [Sample(name, (("code", code),), count) for code, count in tuple(counts.items())]
