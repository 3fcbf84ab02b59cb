"""Metrics of a real cluster: what Ray's agent serves on the node, and what the ingress does."""

from __future__ import annotations

import re
import time
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.observability.catalog import METRICS, series_of
from tests.cluster.conftest import Server

pytestmark = pytest.mark.ray

TOLD_TIMEOUT_S = 40.0
"""Workers tell Ray every 5 s, Ray its agents every 10 s."""
REQUEST = {"prompt": "hello", "max_tokens": 4, "ignore_eos": True}
ROLES = {"placement", "experts", "router", "attention", "ingress"}
NOT_OURS = ("nixl", "kv_offload", "external_prefix_cache")
"""Features of vLLM that Ray's panels show besides."""


def samples_at(url: str) -> list[Any]:
    with urllib.request.urlopen(url, timeout=60) as response:
        text = response.read().decode()
    return [s for family in text_string_to_metric_families(text) for s in family.samples]


def samples_of_ray() -> list[Any]:
    """What Prometheus finds on this node."""
    import ray

    return samples_at(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics")


def wait_for(missing: Callable[[], Any], timeout_s: float = TOLD_TIMEOUT_S) -> None:
    """Returns once nothing is missing."""
    deadline_s = time.monotonic() + timeout_s
    while found := missing():
        assert time.monotonic() < deadline_s, found
        time.sleep(0.5)


def role_of(sample: Any) -> str:
    return str(sample.labels["worker_id"]).partition("-")[0]


@pytest.fixture
def requested(server: Server) -> Server:
    """Some request has come through."""
    server.post("/v1/completions", REQUEST)
    return server


def test_ray_serves_the_whole_catalogue(requested: Server) -> None:
    wanted = {f"ray_{name}" for metric in METRICS for name in series_of(metric)}
    wait_for(lambda: wanted - {sample.name for sample in samples_of_ray()})
    ours = [s for s in samples_of_ray() if s.name in wanted and "worker_id" in s.labels]
    assert {role_of(sample) for sample in ours} == ROLES
    of_vllm = [sample for sample in ours if sample.name.startswith("ray_vllm_")]
    assert {sample.labels["model_name"] for sample in of_vllm} == {requested.model}


def test_rays_own_panels_find_their_series(requested: Server) -> None:
    """Those of the Serve LLM dashboard that comes with Ray, as far as Shoal has what they show."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.dashboard.modules.metrics.dashboards import serve_llm_dashboard_panels as stock
    queries = [
        target.expr
        for row in stock.serve_llm_dashboard_config.rows
        for panel in row.panels
        for target in panel.targets
    ]
    names = set(re.findall(r"\bray_\w+", " ".join(queries))) - {"ray_io_cluster"}
    wanted = {name for name in names if not any(part in name for part in NOT_OURS)}
    assert len(wanted) > 20
    wait_for(lambda: wanted - {sample.name for sample in samples_of_ray()})


def test_ray_tells_the_same_numbers_as_the_ingress(requested: Server) -> None:
    """Sums of histograms too; and the attention workers' requests, by which panels find them."""

    def missing() -> dict[str, tuple[float, float]]:
        ours, rays = samples_at(f"{requested.url}/metrics"), samples_of_ray()

        def of_ray(name: str, worker_ids: set[str], **labels: str) -> float:
            return sum(
                sample.value
                for sample in rays
                if sample.name == name
                and sample.labels.get("worker_id", "") in worker_ids | {""}
                and labels.items() <= sample.labels.items()
            )

        alive = {sample.labels["worker_id"] for sample in ours}
        pairs = {
            name: (
                sum(sample.value for sample in ours if sample.name == name),
                of_ray(f"ray_{name}", alive),
            )
            for name in (
                "vllm_generation_tokens_total",
                "vllm_time_to_first_token_seconds_sum",
                "vllm_time_to_first_token_seconds_bucket",
                "shoal_hop_seconds_sum",
                "shoal_worker_requests_total",
            )
        }
        num_requests = pairs["shoal_worker_requests_total"][0]
        counted = of_ray(
            "ray_serve_deployment_request_counter_total", set(), deployment="Attention"
        )
        different = {n: pair for n, pair in pairs.items() if pair[0] != pytest.approx(pair[1])}
        different |= {n: pair for n, pair in pairs.items() if not pair[0]}
        if counted < num_requests:  # Ray keeps the counts of workers that are gone
            different["for Serve"] = num_requests, counted
        return different

    wait_for(missing)


def test_the_ingress_serves_all_workers(requested: Server) -> None:
    assert {role_of(sample) for sample in samples_at(f"{requested.url}/metrics")} == ROLES


def test_actors_have_readable_names(server: Server) -> None:
    import ray

    actors = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    tiers = {name.split("#")[1] for name in actors if name.startswith("SERVE_REPLICA::shoal#")}
    assert tiers == {"Placement", "Experts", "Router", "Attention", "Ingress"}


def test_status_tells_tiers_and_rates(requested: Server) -> None:
    def missing() -> bool:
        requested.post("/v1/completions", REQUEST)
        return not requested.get("/status")["rates"]["generated_tokens_per_s"] > 0

    wait_for(missing)  # engines tell once a second; growth is between two looks
    status = requested.get("/status")
    assert status["tiers"]["experts"] == {"wanted": 2, "present": 2}
    assert all(w["busy"] is not None for w in status["workers"] if w["role"] == "experts")
