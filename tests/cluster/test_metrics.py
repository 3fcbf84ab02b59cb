"""Metrics: every worker tells the catalogue's series and no others, whatever clients send."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from attention.messages import Stats
from cluster.config import parse_config
from cluster.errors import TABLE, InvalidRequest
from cluster.frontend.checks import check_length, check_number
from cluster.frontend.schema_errors import _CODES
from cluster.inline import InlineCluster
from cluster.observability.catalog import (
    BY_NAME,
    ERROR_CODES,
    FAILURE_CODES,
    METRIC_OF,
    METRICS,
    MemberRole,
    series_of,
)
from cluster.observability.member_samples import RouterSamples
from cluster.observability.samples import MemberSamples
from cluster.status import render_status
from experts.hop_counters import HopCounters
from experts.messages import MAX_SAMPLES
from experts.metrics import Sample
from tests.fakes import TIMEOUT_S

ROOT = Path(__file__).parents[2]
ROLES: tuple[MemberRole, ...] = ("placement", "experts", "router", "attention", "ingress")
REQUEST = {"prompt": "hello", "max_tokens": 5, "ignore_eos": True}
CODES_OF_OTHER_ROUTES = {
    *("directory_unreachable", "refused", "worker_not_found"),  # load of experts, operations
    *("method_not_allowed", "unknown_service"),
}


@pytest.fixture(scope="module")
def cluster(checkpoint_dir: Callable[[str], Path]) -> Iterator[InlineCluster]:
    router = {"mode": "deployment", "worker": {"hop_timeout_s": TIMEOUT_S}}
    config = {"model": str(checkpoint_dir("v3")), "router": router}
    with InlineCluster(parse_config(config)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster: InlineCluster) -> TestClient:
    return TestClient(cluster.ingress.http_app())


def wait_until(condition: Callable[[], bool]) -> None:
    """Members report once a second."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def samples_of(cluster: InlineCluster, role: MemberRole) -> list[Sample]:
    member: dict[str, Any] = {
        "placement": cluster.placement,
        "experts": cluster.experts[0],
        "router": cluster.routers[0],
        "attention": cluster.attention[0],
        "ingress": cluster.ingress,
    }
    return member[role].samples()  # type: ignore[no-any-return]


def values(samples: list[Sample]) -> dict[str, float]:
    """By name, of those with one series."""
    return {sample.name: sample.value for sample in samples}


@pytest.mark.parametrize("role", ROLES)
def test_a_member_tells_what_the_catalogue_says_of_it(
    cluster: InlineCluster, role: MemberRole
) -> None:
    samples = samples_of(cluster, role)
    wanted = {name for metric in METRICS if role in metric.roles for name in series_of(metric)}
    if role == "attention":  # the hops are a deployed router's
        wanted -= {name for m in METRICS if "router" in m.roles for name in series_of(m)}
    elif role == "router":
        assert len(samples) > len(wanted)
    else:
        assert wanted <= {sample.name for sample in samples}
    assert {sample.name for sample in samples} == wanted
    assert len(samples) <= MAX_SAMPLES
    for sample in samples:
        metric = METRIC_OF[sample.name]
        labels = [name for name, _ in sample.labels if name != "le"]
        assert tuple(labels) == metric.labels, sample


@pytest.mark.parametrize("role", ROLES)
def test_no_series_is_told_twice(cluster: InlineCluster, role: MemberRole) -> None:
    told = Counter((sample.name, sample.labels) for sample in samples_of(cluster, role))
    assert set(told.values()) == {1}


def test_attention_workers_that_route_themselves_tell_the_hops(
    checkpoint_dir: Callable[[str], Path],
) -> None:
    config = {"model": str(checkpoint_dir("v3")), "router": {"mode": "inline"}}
    with InlineCluster(parse_config(config)) as cluster:
        TestClient(cluster.ingress.http_app()).post("/v1/completions", json=REQUEST)
        samples = cluster.attention[0].samples()
    hops = {s.labels: s.value for s in samples if s.name == "shoal_hop_seconds_count"}
    assert set(hops) == {(("part", part),) for part in ("queue", "compute", "wire", "total")}
    assert len(set(hops.values())) == 1 and min(hops.values()) > 0


def test_the_parts_of_hops_are_told_of_the_same_answers() -> None:
    """While they are told, more come in."""
    counters = HopCounters()
    reply: Any = SimpleNamespace(queue_us=20, compute_us=30)
    counters.count_answer(reply, 0.001)
    router: Any = SimpleNamespace(counters=[], hop_counters=[counters])
    counts = []
    for sample in RouterSamples(router)():
        counters.count_answer(reply, 0.001)
        if sample.name == "shoal_hop_seconds_count":
            counts.append(sample.value)
    assert counts == [1, 1, 1, 1]
    assert sum(counters.histograms().total.counts) > 4


@pytest.mark.parametrize("role", ROLES)
def test_bounds_are_those_that_are_counted_by(cluster: InlineCluster, role: MemberRole) -> None:
    bounds: dict[str, set[str]] = {}
    for name, labels, _ in samples_of(cluster, role):
        if "le" in dict(labels):
            bounds.setdefault(METRIC_OF[name].name, set()).add(dict(labels)["le"])
    assert bounds == {name: {*map(str, BY_NAME[name].bounds), "+Inf"} for name in bounds}


def test_all_codes_of_errors_are_known() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "cluster").rglob("*.py"))
    known = {error.default_code for error in TABLE} | set(re.findall(r'\bcode="(\w+)"', sources))
    assert known - ERROR_CODES - FAILURE_CODES == CODES_OF_OTHER_ROUTES
    assert set(_CODES.values()) <= ERROR_CODES
    assert {"deadline_exceeded", "internal_error"} == ERROR_CODES & FAILURE_CODES
    for check in (
        lambda: check_number("n", 0, 1, 2),
        lambda: check_number("top_p", 2.0, 0, 1),
        lambda: check_length("stop", ["a", "b"], 1),
        lambda: check_length("user", "ab", 1),
    ):
        with pytest.raises(InvalidRequest) as raised:
            check()
        assert raised.value.code in ERROR_CODES


def test_more_samples_than_can_be_told_are_left_out() -> None:
    many = [Sample("shoal_experts_held", (), i) for i in range(MAX_SAMPLES + 1)]
    assert MemberSamples(lambda: iter(many))() == many[:-1]


def test_a_request_is_counted(cluster: InlineCluster, client: TestClient) -> None:
    before = {role: values(samples_of(cluster, role)) for role in ROLES}
    assert client.post("/v1/completions", json=REQUEST).status_code == 200
    after = {role: values(samples_of(cluster, role)) for role in ROLES}

    def grown(role: MemberRole, name: str) -> float:
        return after[role][name] - before[role][name]

    assert grown("attention", "vllm_generation_tokens_total") == 5
    assert grown("attention", "vllm_prompt_tokens_total") == 5
    assert grown("attention", "shoal_worker_requests_total") == 1
    assert grown("attention", "shoal_step_seconds_count") == 5
    assert grown("ingress", "vllm_time_to_first_token_seconds_count") == 1
    assert grown("ingress", "vllm_inter_token_latency_seconds_count") == 4
    assert grown("ingress", "vllm_request_generation_tokens_sum") == 5
    assert grown("ingress", "vllm_request_prompt_tokens_sum") == 5
    assert grown("ingress", "shoal_request_expert_seconds_total") > 0
    assert grown("ingress", "shoal_requests_admitted_total") == 1
    num_hops = 3 * 5  # MoE layers, steps; each to at least one worker
    assert grown("router", "shoal_hop_seconds_count") >= num_hops
    assert grown("experts", "shoal_worker_batches_total") > 0


def test_rows_of_a_worker_are_those_of_its_experts(
    cluster: InlineCluster, client: TestClient
) -> None:
    """One per token and expert, as in the heat map, where a page shows both."""
    assert client.post("/v1/completions", json=REQUEST).status_code == 200
    for member in cluster.experts:
        by_expert = np.frombuffer(member.worker.load_counter.report().rows, "<i8")
        rows = values(member.samples())["shoal_worker_rows_total"]
        assert 0 < rows == by_expert.sum()


MEMBERS = {"placement", "experts-0", "experts-1", "router-0", "attention-0", "ingress-0"}


def families_of(client: TestClient) -> dict[str, Any]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def workers_of(families: dict[str, Any]) -> set[str]:
    return {sample.labels["worker_id"] for family in families.values() for sample in family.samples}


def test_metrics_has_all_members_in_prometheus_format(client: TestClient) -> None:
    def is_complete() -> bool:
        families = families_of(client)
        missing = {metric.name.removesuffix("_total") for metric in METRICS} - families.keys()
        return missing == {"shoal_scaling_decisions"} and workers_of(families) == MEMBERS

    wait_until(is_complete)
    families = families_of(client)
    for name, family in families.items():
        metric = BY_NAME.get(name) or BY_NAME[f"{name}_total"]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        allowed = {*metric.labels, "worker_id"} | ({"le"} if metric.bounds else set())
        assert all(set(sample.labels) <= allowed for sample in family.samples)


def test_what_clients_send_makes_no_series(client: TestClient) -> None:
    def series() -> set[tuple[str, ...]]:
        return {
            (sample.name, *map(str, sorted(sample.labels.items())))
            for family in families_of(client).values()
            for sample in family.samples
        }

    client.post("/v1/completions", json=REQUEST)
    wait_until(lambda: workers_of(families_of(client)) == MEMBERS)
    before = series()
    for number in range(20):
        odd = f"odd-{number}\n{{}}\"'"
        headers = {"X-Request-Id": f"id-{number}", "Authorization": f"Bearer key-{number}"}
        for body in (
            REQUEST | {"user": odd, "cache_salt": odd, "stop": [odd]},
            REQUEST | {"model": odd},
            REQUEST | {f"field{number}": odd},
            REQUEST | {"max_tokens": f"{odd}"},
            REQUEST | {"n": 10_000 + number},
        ):
            client.post("/v1/completions", json=body, headers=headers)
        client.get(f"/metrics/{number}", headers=headers)
        client.post("/v1/chat/completions", content=odd.encode(), headers=headers)
    assert series() == before


def test_status_is_the_same_at_every_ingress(
    cluster: InlineCluster, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what only the ingresses know."""
    told = {
        f"ingress-{number}": [
            Sample("shoal_requests_parked", (), 3 + number),
            Sample("shoal_requests_replayed_total", (), 5),
        ]
        for number in range(2)
    }
    monkeypatch.setattr(cluster.ingress.metrics, "_read", lambda: told)
    status = client.get("/status").json()
    assert (status["parked"], status["counters"]["replays"]) == (7, 10)
    assert "replays" not in status
    assert "10 replays, 7 waiting for a worker" in str(render_status(status).renderables[0])


def test_metrics_do_not_wait_for_a_status(
    cluster: InlineCluster, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answers = threading.Event(), threading.Event()

    def slow() -> list[Stats]:
        asked.set()
        assert answers.wait(TIMEOUT_S)
        return []

    monkeypatch.setattr(cluster.ingress.pool, "stats", slow)
    with ThreadPoolExecutor(1) as threads:
        status = threads.submit(client.get, "/status")
        try:
            assert asked.wait(TIMEOUT_S)
            assert client.get("/metrics").status_code == 200
            assert not status.done()
        finally:
            answers.set()
        assert status.result(TIMEOUT_S).json()["engines"] == []


def test_without_metrics_nothing_is_told(checkpoint_dir: Callable[[str], Path]) -> None:
    config = {"model": str(checkpoint_dir("v3")), "observability": {"metrics": False}}
    with InlineCluster(parse_config(config)) as cluster:
        client = TestClient(cluster.ingress.http_app())
        assert client.post("/v1/completions", json=REQUEST).status_code == 200
        assert client.get("/metrics").status_code == 404
        status = client.get("/status").json()
        unknown = {name: status[name] for name in ("rates", "counters", "parked")}
        assert unknown == dict.fromkeys(unknown)
        assert str(render_status(status).renderables[0]) == "v3: ready"
        assert all(worker["busy"] is None for worker in status["workers"])
        reply = cluster.ingress._line.ask_metrics()
        assert [w.worker_id for w in reply.workers if w.samples] == ["placement"]
