"""What an ingress counts of its requests, rates from it, and what it asks of the directory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster.frontend.observer import RequestRecord, Timing
from cluster.observability.catalog import OTHER
from cluster.observability.cluster_metrics import SHARED_S, ClusterMetrics, by_label, sum_of
from cluster.observability.exposition import expose
from cluster.observability.rates import Rate, RequestRates, quantile
from cluster.observability.request_metrics import RequestMetrics
from cluster.observability.status import count_events, describe_tiers, describe_workers
from experts.channel.channel import ChannelError
from experts.messages import MetricsReply, Snapshot, WorkerInfo, WorkerSamples
from experts.metrics import Labels, Sample

TIMING = Timing(queue_s=0.25, prefill_s=0.5, decode_s=1.0, hop_s=0.75, expert_ms=40.0)
RECORD = RequestRecord(
    request_id="r",
    answer_id="cmpl-1",
    protocol="http",
    kind="completion",
    model="m",
    stream=False,
    num_sequences=2,
    prompt_tokens=7,
    cached_tokens=0,
    completion_tokens=10,
    finish_reasons=("stop", "length"),
    outcome="ok",
    code="",
    e2e_s=2.0,
    ttft_s=0.8,
    timing=TIMING,
    num_replays=0,
    key_name="",
    trace_id="",
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def value(samples: list[Sample], name: str, **labels: str) -> float:
    """Of the one series with these labels."""
    found = [
        s.value for s in samples if s.name == name and labels.items() <= dict(s.labels).items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


class TestRequestMetrics:
    def test_a_finished_request(self) -> None:
        metrics = RequestMetrics("m")
        metrics.on_started("r")
        metrics.on_finished(RECORD)
        samples = list(metrics.samples())
        for name, seconds in {
            "time_to_first_token_seconds": 0.8,
            "e2e_request_latency_seconds": 2.0,
            "request_queue_time_seconds": 0.25,
            "request_prefill_time_seconds": 0.5,
            "request_decode_time_seconds": 1.0,
            "request_time_per_output_token_seconds": 0.25,  # 1 s for 10 / 2 - 1 tokens
            "request_prompt_tokens": 7,
            "request_generation_tokens": 10,
        }.items():
            assert value(samples, f"vllm_{name}_sum", model_name="m") == seconds
            assert value(samples, f"vllm_{name}_count") == 1
        assert value(samples, "vllm_time_to_first_token_seconds_bucket", le="0.75") == 0
        assert value(samples, "vllm_time_to_first_token_seconds_bucket", le="1.0") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="stop") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="length") == 1
        assert value(samples, "shoal_request_expert_seconds_total") == 0.04

    def test_a_cancelled_one_and_a_failed_one_are_told_apart(self) -> None:
        metrics = RequestMetrics("m")
        cut = replace(RECORD, finish_reasons=("stop",), ttft_s=None)
        metrics.on_finished(replace(cut, outcome="cancelled"))
        metrics.on_finished(replace(cut, outcome="error", code="engine_error"))
        samples = list(metrics.samples())
        assert value(samples, "shoal_requests_cancelled_total") == 1
        assert value(samples, "shoal_requests_failed_total", code="engine_error") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="stop") == 2
        assert value(samples, "vllm_request_success_total", finished_reason="abort") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="error") == 1
        assert value(samples, "vllm_e2e_request_latency_seconds_count") == 2
        assert value(samples, "vllm_request_queue_time_seconds_count") == 0  # no token: not known

    def test_gaps_are_observed_and_first_tokens_are_none(self) -> None:
        metrics = RequestMetrics("m")
        metrics.on_tokens(1, None)
        metrics.on_tokens(2, 0.004)
        samples = list(metrics.samples())
        assert metrics.generated_tokens == 3
        assert value(samples, "vllm_inter_token_latency_seconds_count") == 1
        assert value(samples, "vllm_inter_token_latency_seconds_bucket", le="0.0025") == 0
        assert value(samples, "vllm_inter_token_latency_seconds_bucket", le="0.005") == 1

    def test_words_of_no_list_share_a_series(self) -> None:
        metrics = RequestMetrics("m")
        before = {sample[:2] for sample in metrics.samples()}
        for number in range(1000):
            metrics.on_refused(f"id-{number}", f"code-{number}")
            failed = {"outcome": "error", "code": f"code-{number}", "model": f"model-{number}"}
            record = replace(RECORD, finish_reasons=(f"reason-{number}",), **failed)
            metrics.on_finished(replace(record, key_name=f"key-{number}", request_id=str(number)))
        samples = list(metrics.samples())
        assert {sample[:2] for sample in samples} == before
        assert value(samples, "shoal_requests_refused_total", code=OTHER) == 1000
        assert value(samples, "shoal_requests_failed_total", code=OTHER) == 1000


class TestRates:
    def test_any_number_of_readers_share_a_rate(self) -> None:
        clock = Clock()
        rate = Rate(clock)
        clock.now_s += 2.0
        assert rate.read(10) == 5.0
        clock.now_s += 0.5
        assert rate.read(11) == 5.0  # too soon for another
        clock.now_s += 0.5
        assert rate.read(12) == 2.0

    def test_rates_of_requests_are_of_the_last_ten_seconds(self) -> None:
        clock, metrics = Clock(), RequestMetrics("m")
        rates = RequestRates(metrics, clock)
        for second in range(30):
            metrics.on_started("r")
            for _ in range(1 if second < 20 else 4):
                metrics.on_tokens(1, 0.01 if second < 20 else 0.1)
            clock.now_s += 1.0
            rates.note()
        found = rates.read()
        assert found["window_s"] == 10.0
        assert found["requests_per_s"] == 1.0
        assert found["generated_tokens_per_s"] == 4.0
        assert found["ttft_s"] is None
        assert 0.075 < found["itl_s"]["p50"] <= found["itl_s"]["p99"] <= 0.1

    def test_without_notes_the_window_says_how_long_it_is(self) -> None:
        clock, metrics = Clock(), RequestMetrics("m")
        rates = RequestRates(metrics, clock)
        metrics.on_tokens(50, None)
        clock.now_s += 25.0
        assert rates.read()["window_s"] == 25.0
        assert rates.read()["generated_tokens_per_s"] == 2.0

    def test_quantile_of_counts(self) -> None:
        bounds = (1.0, 2.0, 4.0)
        assert quantile(bounds, [0, 10, 0, 0], 0.5) == 1.5
        assert quantile(bounds, [10, 0, 10, 0], 0.5) == 1.0
        assert quantile(bounds, [10, 0, 10, 0], 0.75) == 3.0
        assert quantile(bounds, [0, 0, 0, 5], 0.5) == 4.0  # above all bounds


def told(worker_id: str, name: str, number: float, labels: Labels = ()) -> WorkerSamples:
    role: Any = worker_id.partition("-")[0]
    samples = (Sample(name, labels, number),)
    return WorkerSamples(worker_id=worker_id, role=role, samples=samples)


class TestClusterMetrics:
    def test_those_who_ask_within_half_a_second_share_an_answer(self) -> None:
        clock, asked = Clock(), []

        def ask() -> MetricsReply:
            asked.append(clock.now_s)
            return MetricsReply(workers=(told("experts-0", "shoal_worker_busy", len(asked)),))

        own = iter(range(10))
        metrics = ClusterMetrics(
            "ingress-0", lambda: [Sample("shoal_requests_parked", (), next(own))], ask, clock
        )
        assert sum_of(metrics.read(), "shoal_worker_busy") == 1
        clock.now_s += SHARED_S - 0.01
        again = metrics.read()
        assert sum_of(again, "shoal_worker_busy") == 1
        assert sum_of(again, "shoal_requests_parked") == 1  # its own are always fresh
        clock.now_s += 0.01
        assert sum_of(metrics.read(), "shoal_worker_busy") == 2

    def test_without_a_directory_its_own_are_told(self) -> None:
        def ask() -> MetricsReply:
            raise ChannelError("no line to the directory")

        own = [Sample("shoal_requests_parked", (), 3)]
        workers = ClusterMetrics("ingress-0", lambda: own, ask).read()
        text = expose(workers.items()).decode()
        assert 'shoal_requests_parked{worker_id="ingress-0"} 3.0' in text

    def test_samples_that_the_catalogue_does_not_know_are_left_out(self) -> None:
        text = expose([("experts-0", [Sample("shoal_of_tomorrow", (), 1)])])
        assert text == b""


class TestStatus:
    def test_workers_tell_how_busy_they_are(self) -> None:
        workers = tuple(
            WorkerInfo(worker_id=f"{role}-0", role=role, endpoint="", pid=1, node="")  # type: ignore[arg-type]
            for role in ("experts", "attention", "ingress")
        )
        snapshot = Snapshot(
            version=1,
            epoch=1,
            ready=True,
            stage="ready",
            workers=workers,
            holders={"1": (("experts-0",), ())},
            drained=("experts-0",),
        )
        samples = {
            "experts-0": [
                Sample("shoal_worker_busy", (), 0.5),
                Sample("shoal_worker_waiting_batches", (), 3),
                Sample("shoal_worker_rows_per_s", (), 80.0),
            ],
            "attention-0": [Sample("vllm_num_requests_waiting", (("model_name", "m"),), 2)],
        }
        experts, attention, ingress = describe_workers(snapshot, samples)
        parts = ("num_experts", "drained", "busy", "queue", "rows_per_s")
        assert [experts[part] for part in parts] == [1, True, 0.5, 3, 80.0]
        assert [attention[part] for part in parts] == [0, False, None, 2, None]
        assert [ingress[part] for part in parts] == [0, False, None, None, None]
        assert describe_workers(None, samples) == []

    def test_tiers_and_events(self) -> None:
        def by_tier(name: str, **numbers: float) -> list[Sample]:
            return [Sample(name, (("tier", tier),), n) for tier, n in numbers.items()]

        placement = [
            *by_tier("shoal_replicas_wanted", experts=3, attention=1),
            *by_tier("shoal_replicas_present", experts=2, attention=1, router=1),
            Sample("shoal_worker_deaths_total", (("role", "experts"),), 2),
            Sample("shoal_worker_deaths_total", (("role", "router"),), 1),
        ]
        hedges = [Sample("shoal_hedges_total", (), 4)]
        samples = {"placement": placement, "router-0": hedges, "router-1": hedges}
        assert describe_tiers(samples) == {
            "experts": {"wanted": 3, "present": 2},
            "attention": {"wanted": 1, "present": 1},
            "router": {"wanted": None, "present": 1},
        }
        events = {"replays": 5, "deaths": 3, "moves": 0, "hedges": 8, "preemptions": 0}
        assert count_events(samples, [], num_replays=5) == events
        assert by_label(samples, "shoal_worker_deaths_total", "role") == {"experts": 2, "router": 1}
        assert describe_tiers({}) == {}
