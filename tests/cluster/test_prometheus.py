"""A real Prometheus scrapes the real cluster: every panel and every alert finds its series."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.deploy.manifests.alerting import Scope
from cluster.deploy.manifests.alerts import alerts
from cluster.deploy.manifests.boards import BOARDS
from cluster.deploy.manifests.monitoring import RAY_JOB, by_hand
from cluster.deploy.sections import AlertLimits
from tests.cluster.conftest import RayHarness, Server

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus: apt-get install prometheus"),
]
DATA_TIMEOUT_S = 90.0
"""Thrice the time until rates have two samples: workers tell Ray every 5 s, Ray its agents every
10 s."""
PAUSE_S = 0.2
"""Between requests: the cores are for who tells of them."""
VARIABLES = {"$job": ".*", "$cluster": ".*", "$__rate_interval": "1m"}
RAYS_VARIABLES = {"$deployment": ".*", "$vllm_model_name": ".*", "$workerid": ".*"}
RAYS_VARIABLES |= {"$interval": "1m", "[24h:1m]": "[10m:1s]"}  # looks at more than whole minutes
BRIEFLY_TRUE = {
    "ShoalWorkersMissing",
    "ShoalWorkersDoNotJoin",
    "ShoalScalingBlind",
    "ShoalHopsFail",
}
"""While a dead worker is replaced; none fires then, for it must be so for 15 minutes."""
NOT_OURS = ("nixl", "kv_offload", "external_prefix_cache")
"""Features of vLLM that stock panels show besides."""


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=60) as response:
            return json.load(response)["data"]

    def values(self, query: str) -> list[float]:
        """Of all series, without those that are no number, as 0/0 is."""
        found = self.get("query", query=query)["result"]
        return [v for v in (float(series["value"][1]) for series in found) if not math.isnan(v)]

    def without_data(self, queries: Iterable[str], timeout_s: float = DATA_TIMEOUT_S) -> list[str]:
        """Those that still have none after `timeout_s`."""
        missing = list(dict.fromkeys(queries))
        deadline = time.monotonic() + timeout_s
        while missing and time.monotonic() < deadline:
            missing = [query for query in missing if not self.values(query)]
            time.sleep(0.5)
        return missing


def post(server: Server, body: dict[str, Any]) -> int:
    """HTTP status of a completion."""
    headers = {"Content-Type": "application/json"}
    url = server.url + "/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


class Traffic:
    """Requests, good and bad, one after the other until `stop`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stopping = threading.Event()
        self.unexpected: list[list[int]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        good = {"prompt": "A prompt that comes again. " * 4, "max_tokens": 8, "ignore_eos": True}
        while not self._stopping.is_set():
            statuses = [post(self._server, body) for body in (good, {**good, "model": "another"})]
            if statuses != [200, 404]:
                self.unexpected.append(statuses)
            self._stopping.wait(PAUSE_S)


def wait_for(what: str, is_so: Any, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not in {timeout_s:.0f} s: {what}"
        time.sleep(0.2)


def experts_of(server: Server) -> list[dict[str, Any]]:
    return [worker for worker in server.get("/status")["workers"] if worker["role"] == "experts"]


def harm(server: Server) -> None:
    """A stranger talks to a worker, then another worker dies; Serve replaces it."""
    first, second = experts_of(server)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(first["endpoint"].partition(":")[2])
        stranger.sendall(b"x" * 4096)
    os.kill(second["pid"], signal.SIGKILL)


@contextmanager
def prometheus_of_this_ray(folder: Path) -> Iterator[Prometheus]:
    """With the settings for machines without Kubernetes, but looking every two seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    from cluster.launcher import free_port

    nodes = [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes()]
    discovery = folder / "targets.json"
    discovery.write_text(json.dumps([{"labels": {"job": RAY_JOB}, "targets": nodes}]))
    files = by_hand()
    settings = yaml.safe_load(files.pop("prometheus.yml"))
    settings["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    settings["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(discovery)]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    for name, text in files.items():
        (folder / name).write_text(text)
    address = f"127.0.0.1:{free_port()}"
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", "--log.level=error"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    found = Prometheus(f"http://{address}")

    def answers() -> bool:
        assert process.poll() is None, (folder / "log").read_text()
        try:
            return bool(found.values("up"))
        except OSError:
            return False

    try:
        wait_for("Prometheus has looked once", answers)
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def prometheus(
    ray_harness: RayHarness, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Over a cluster that has requests and has seen some harm."""
    server = ray_harness.serve(deterministic=True)
    with prometheus_of_this_ray(tmp_path_factory.mktemp("prometheus")) as found:
        traffic = Traffic(server)
        harm(server)
        yield found
        wait_for("two expert workers again", lambda: len(experts_of(server)) == 2)
        traffic.stop()
        assert traffic.unexpected == []


def substituted(query: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        query = query.replace(name, value)
    return query


def rules(prometheus: Prometheus) -> list[dict[str, Any]]:
    (group,) = prometheus.get("rules")["groups"]
    return list(group["rules"])


def test_every_panel_has_data(prometheus: Prometheus) -> None:
    lines = [line for board in BOARDS.values() for panel in board.panels for line in panel.lines]
    assert prometheus.without_data(substituted(line.query, VARIABLES) for line in lines) == []


def test_every_alert_looks_at_series_that_there_are(prometheus: Prometheus) -> None:
    """But for causes and fields that are counted only when something is wrong."""
    queries = [a.query for a in alerts(Scope(RAY_JOB, f'job="{RAY_JOB}"'), AlertLimits())]
    selectors = [s for query in queries for s in re.findall(r"\w+{[^}]*}", query)]
    there = [re.sub(r',(cause=|field!)~"[^"]*"', "", selector) for selector in selectors]
    assert prometheus.without_data(there) == []


def test_every_rule_is_evaluated_and_one_death_calls_nobody(prometheus: Prometheus) -> None:
    wait_for("all were evaluated", lambda: {r["health"] for r in rules(prometheus)} == {"ok"})

    def active() -> set[str]:
        """Pending ones, too: they would fire if it stayed as it is."""
        return {rule["name"] for rule in rules(prometheus) if rule["state"] != "inactive"}

    wait_for("all is well again", lambda: active() <= BRIEFLY_TRUE)


def test_what_serve_wants_is_told_as_long_as_it_wants_it(prometheus: Prometheus) -> None:
    wanted = 'ray_serve_autoscaling_target_replicas{application="shoal",deployment="Experts"}'
    assert prometheus.without_data([wanted]) == []
    assert prometheus.values(wanted) == [2.0]  # set once, at the deployment


def test_the_harm_was_counted(prometheus: Prometheus) -> None:
    told = (
        'ray_shoal_worker_deaths_total{role="experts"} > 0',
        "ray_shoal_frame_errors_total > 0",
        'ray_shoal_requests_refused_total{code="model_not_found"} > 0',
    )
    assert prometheus.without_data(told) == []


def test_panels_that_ray_has_for_vllm_show_us(prometheus: Prometheus) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.dashboard.modules.metrics.dashboards import serve_llm_dashboard_panels as stock
    queries = [
        substituted(target.expr.format(global_filters=""), RAYS_VARIABLES)
        for row in stock.serve_llm_dashboard_config.rows
        for panel in row.panels
        for target in panel.targets
    ]
    ours = [query for query in queries if not any(name in query for name in NOT_OURS)]
    assert len(ours) > 40
    assert prometheus.without_data(ours) == []
