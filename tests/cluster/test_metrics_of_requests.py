"""What an ingress counts of its requests, rates from it, and what it asks of the directory."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from cluster.config import parse_config
from cluster.frontend.observer import RequestRecord, Timing
from cluster.inline import InlineCluster
from cluster.observability.catalog import METRIC_OF, METRICS, OTHER
from cluster.observability.cluster_metrics import SHARED_S, ClusterMetrics, by_label, sum_of
from cluster.observability.exposition import Exposition
from cluster.observability.rates import ClusterRates, Rate, quantile
from cluster.observability.request_metrics import RequestMetrics
from cluster.observability.status import (
    count_events,
    count_requests,
    describe_tiers,
    describe_workers,
)
from experts.channel.channel import ChannelError
from experts.messages import MetricsReply, Snapshot, WorkerInfo, WorkerSamples
from experts.metrics import Labels, Sample
from tests.fakes import TIMEOUT_S

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
    token_s=(0.125, 0.25),
    timing=TIMING,
    num_replays=0,
    key_name="",
    trace_id="",
)


NUM_READERS = 50


@pytest.fixture(scope="module")
def cluster(checkpoint_dir: Callable[[str], Path]) -> Iterator[InlineCluster]:
    with InlineCluster(parse_config({"model": str(checkpoint_dir("v3"))})) as cluster:
        yield cluster


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


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
            "request_prompt_tokens": 7,
            "request_generation_tokens": 10,
        }.items():
            assert value(samples, f"vllm_{name}_sum", model_name="m") == seconds
            assert value(samples, f"vllm_{name}_count") == 1
        per_token = "vllm_request_time_per_output_token_seconds"
        assert value(samples, f"{per_token}_count") == 2
        assert value(samples, f"{per_token}_sum") == 0.375
        assert value(samples, "vllm_time_to_first_token_seconds_bucket", le="0.75") == 0
        assert value(samples, "vllm_time_to_first_token_seconds_bucket", le="1.0") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="stop") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="length") == 1
        assert value(samples, "shoal_request_expert_seconds_total") == 0.04

    def test_a_cancelled_one_and_a_failed_one_are_told_apart(self) -> None:
        metrics = RequestMetrics("m")
        cut = replace(RECORD, finish_reasons=("stop",))
        metrics.on_finished(replace(cut, outcome="cancelled"))
        metrics.on_finished(replace(cut, outcome="error", code="engine_error"))
        samples = list(metrics.samples())
        assert value(samples, "shoal_requests_cancelled_total") == 1
        assert value(samples, "shoal_requests_failed_total", code="engine_error") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="stop") == 2
        assert value(samples, "vllm_request_success_total", finished_reason="abort") == 1
        assert value(samples, "vllm_request_success_total", finished_reason="error") == 1

    def test_only_those_that_end_well_are_in_the_histograms(self) -> None:
        metrics = RequestMetrics("m")
        metrics.on_finished(replace(RECORD, outcome="cancelled"))
        metrics.on_finished(replace(RECORD, outcome="error", code="no_worker", e2e_s=0.001))
        samples = list(metrics.samples())
        assert not any(sample.value for sample in samples if sample.name.endswith("_count"))
        metrics.on_finished(RECORD)
        assert value(list(metrics.samples()), "vllm_e2e_request_latency_seconds_sum") == 2.0

    def test_all_that_are_admitted_are_counted(self) -> None:
        metrics = RequestMetrics("m")
        metrics.on_started("a")
        metrics.on_started("b")
        metrics.on_refused("c", "invalid_json")
        assert value(list(metrics.samples()), "shoal_requests_admitted_total") == 2

    def test_gaps_are_observed_and_first_tokens_are_none(self) -> None:
        metrics = RequestMetrics("m")
        metrics.on_tokens(1, None)
        metrics.on_tokens(2, 0.004)
        samples = list(metrics.samples())
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


class Cluster:
    """Samples of ingresses and two engines, and the rates that one ingress finds in them."""

    def __init__(self, num_ingresses: int = 1) -> None:
        self.clock = Clock()
        self.rates = ClusterRates(self.clock)
        self.ingresses = [RequestMetrics("m") for _ in range(num_ingresses)]
        self.engines = [500, 700]
        self.prompt_tokens = 0

    def work(self, tokens: int = 1, gap_s: float = 0.01, ingress: int = 0) -> None:
        """One request of 8 tokens."""
        self.ingresses[ingress].on_started("r")
        self.ingresses[ingress].on_tokens(tokens, gap_s)
        self.engines[0] += tokens
        self.prompt_tokens += 8

    def note(self, *others: ClusterRates, after_s: float = 1.0) -> None:
        self.clock.now_s += after_s
        model = (("model_name", "m"),)
        samples = {f"ingress-{i}": list(one.samples()) for i, one in enumerate(self.ingresses)}
        for number, tokens in enumerate(self.engines):
            samples[f"attention-{number}"] = [
                Sample("vllm_generation_tokens_total", model, tokens),
                Sample("vllm_prompt_tokens_total", model, 0 if number else self.prompt_tokens),
            ]
        for rates in (self.rates, *others):
            rates.note(samples)


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

    def test_rates_are_of_the_last_ten_seconds(self) -> None:
        cluster = Cluster()
        for second in range(30):
            slow = second >= 20
            cluster.work(tokens=4 if slow else 1, gap_s=0.1 if slow else 0.01)
            cluster.note()
        found = cluster.rates.read()
        assert found["window_s"] == 10.0
        assert found["requests_per_s"] == 1.0
        assert found["generated_tokens_per_s"] == 4.0
        assert found["prompt_tokens_per_s"] == 8.0
        assert found["ttft_s"] is None
        assert 0.075 < found["itl_s"]["p50"] <= found["itl_s"]["p99"] <= 0.1

    def test_without_notes_the_window_says_how_long_it_is(self) -> None:
        cluster = Cluster()
        cluster.note()
        cluster.work(tokens=52, gap_s=0.01)
        cluster.note(after_s=26.0)
        assert cluster.rates.read()["window_s"] == 26.0
        assert cluster.rates.read()["generated_tokens_per_s"] == 2.0

    def test_all_ingresses_find_the_same_whichever_the_requests_went_to(self) -> None:
        cluster = Cluster(num_ingresses=2)
        other = ClusterRates(cluster.clock)
        for second in range(5):
            cluster.work(ingress=second % 2)
            cluster.note(other)
        assert cluster.rates.read() == other.read()
        assert other.read()["requests_per_s"] == 1.0

    def test_workers_that_come_and_go_are_no_jumps(self) -> None:
        cluster = Cluster(num_ingresses=2)
        for _ in range(3):
            cluster.work(tokens=2)
            cluster.note()
        gone = cluster.engines.pop()
        cluster.work(tokens=2)
        cluster.note()
        cluster.engines.append(gone + 1_000)  # has served others before it was seen here
        cluster.work(tokens=0)
        cluster.note()
        assert cluster.rates.read()["generated_tokens_per_s"] == 6 / 4

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
    def test_those_who_ask_within_half_a_second_share_an_answer_and_its_text(self) -> None:
        clock, asked = Clock(), []

        def ask() -> MetricsReply:
            asked.append(clock.now_s)
            return MetricsReply(workers=(told("experts-0", "shoal_worker_busy", len(asked)),))

        own = [Sample("shoal_requests_parked", (), 3)]
        metrics = ClusterMetrics("ingress-0", lambda: own, ask, clock)
        assert sum_of(metrics.read(), "shoal_worker_busy") == 1
        text = metrics.text()
        clock.now_s += SHARED_S - 0.01
        assert sum_of(metrics.read(), "shoal_worker_busy") == 1
        assert metrics.text() is text  # not written again
        clock.now_s += 0.01
        assert b'shoal_worker_busy{worker_id="experts-0"} 2.0' in metrics.text()

    def test_without_a_directory_its_own_are_told(self) -> None:
        def ask() -> MetricsReply:
            raise ChannelError("no line to the directory")

        own = [Sample("shoal_requests_parked", (), 3)]
        text = ClusterMetrics("ingress-0", lambda: own, ask).text()
        assert b'shoal_requests_parked{worker_id="ingress-0"} 3.0' in text

    def test_sums_ever_do_not_shrink_when_a_worker_dies_and_no_series_jumps(self) -> None:
        clock, name = Clock(), "shoal_hedges_total"
        gone = Sample(name, (), 5), Sample("vllm_num_preemptions_total", (), 2)
        replies = [
            MetricsReply(workers=(told("router-0", name, 5), told("router-1", name, 5))),
            MetricsReply(workers=(told("router-1", name, 5),), gone=gone),
        ]
        metrics = ClusterMetrics("ingress-0", list, lambda: replies.pop(0), clock)
        assert count_events(metrics.read_ever())["hedges"] == 10
        clock.now_s += SHARED_S
        assert count_events(metrics.read_ever())["hedges"] == 10
        assert count_events(metrics.read_ever())["preemptions"] == 2
        assert sum_of(metrics.read(), name) == 5  # a rate of series wants no jump
        assert metrics.text().count(b"shoal_hedges_total{") == 1

    def test_the_first_who_asks_finds_rates_too(self) -> None:
        clock = Clock()
        metrics = ClusterMetrics("ingress-0", list, lambda: MetricsReply(workers=()), clock)
        metrics.tick()
        wait_until(lambda: bool(metrics.rates._moments))
        clock.now_s += 5.0
        metrics.tick()  # too early to note again
        metrics.read()
        assert metrics.rates.read()["window_s"] == 5.0
        metrics.close()


def test_a_directory_that_hangs_holds_up_no_tokenisation(cluster: InlineCluster) -> None:
    """However many read /status and /metrics meanwhile: prompts become tokens in the default
    executor, which has a handful of threads."""
    asked, answer = threading.Event(), threading.Event()

    def hang() -> MetricsReply:
        asked.set()
        answer.wait()
        return MetricsReply(workers=())

    async def read_and_tokenise(app: FastAPI) -> int:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shoal") as client:
            paths = ("/status", "/metrics") * NUM_READERS
            readers = [asyncio.create_task(client.get(path)) for path in paths]
            try:
                while not asked.is_set():
                    await asyncio.sleep(0)
                async with asyncio.timeout(TIMEOUT_S):
                    await client.post("/tokenize", json={"prompt": "shoal " * 1000})
                return sum(reader.done() for reader in readers)
            finally:
                answer.set()
                answers = await asyncio.gather(*readers)
                assert {each.status_code for each in answers} == {200}

    metrics = cluster.ingress.metrics
    with metrics._lock:  # after a question that is under way
        metrics._ask, metrics._asked_s = hang, -math.inf
    assert asyncio.run(read_and_tokenise(cluster.ingress.http_app())) == 0


class TestExposition:
    def test_it_is_what_prometheus_client_writes(self) -> None:
        """Byte by byte, whatever the values, new or written before."""
        exposition = Exposition()
        for number in (0.0, 3.0, 1e16, 0.1, 1 / 3, math.inf, 0.0):
            samples = [
                Sample("shoal_requests_parked", (), number),
                Sample("shoal_hop_faults_total", (("fault", 'a"b\\c\n'),), number),
                Sample("shoal_hop_seconds_bucket", (("part", "wire"), ("le", "+Inf")), number),
            ]
            workers = {f"ingress-{i}": samples for i in range(2)}
            assert exposition.text(workers.items()) == generate_latest(Written(workers))

    def test_samples_that_the_catalogue_does_not_know_are_left_out(self) -> None:
        samples = [Sample("shoal_of_tomorrow", (), 1)]
        assert Exposition().text([("experts-0", samples)]) == b""

    def test_workers_that_are_gone_are_forgotten(self) -> None:
        exposition = Exposition()
        samples = [Sample("shoal_worker_busy", (), 0.5)]
        exposition.text([("experts-0", samples), ("experts-1", samples)])
        text = exposition.text([("experts-1", samples)])
        assert b"experts-0" not in text
        assert list(exposition._written) == ["experts-1"]


class Written(Collector):
    """Workers' samples as prometheus_client alone would have them."""

    def __init__(self, workers: dict[str, list[Sample]]) -> None:
        self._workers = workers

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            family = Family(metric.name.removesuffix("_total"), metric.help, metric.kind)
            for worker_id, samples in self._workers.items():
                for name, labels, number in samples:
                    if METRIC_OF[name] is metric:
                        family.add_sample(name, dict(labels) | {"worker_id": worker_id}, number)
            if family.samples:
                yield family


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
        ingress = [
            Sample("shoal_requests_replayed_total", (), 5),
            Sample("shoal_requests_refused_total", (("code", "draining"),), 2),
            Sample("shoal_requests_refused_total", (("code", "invalid_json"),), 1),
            Sample("shoal_requests_cancelled_total", (), 1),
        ]
        samples = {"placement": placement, "router-0": hedges, "router-1": hedges}
        samples |= {"ingress-0": ingress, "ingress-1": ingress}
        assert describe_tiers(samples) == {
            "experts": {"wanted": 3, "present": 2},
            "attention": {"wanted": 1, "present": 1},
            "router": {"wanted": None, "present": 1},
        }
        preempted = Sample("vllm_num_preemptions_total", (("model_name", "m"),), 6)
        samples |= {"attention-0": [preempted], "attention-1": [preempted]}
        events = {"replays": 10, "deaths": 3, "moves": 0, "hedges": 8, "preemptions": 12}
        assert count_events(samples) == events
        requests = {"requests_running": 0, "requests_waiting": 0, "refused": 6, "cancelled": 2}
        assert count_requests(samples, []) == requests
        assert by_label(samples, "shoal_worker_deaths_total", "role") == {"experts": 2, "router": 1}
        assert describe_tiers({}) == {}
