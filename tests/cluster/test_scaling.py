"""Ray Serve scales the experts on their load, as a Serve config file asks it to: YAML in, no flags.

What `serve deploy` and KubeRay do with `serveConfigV2` is done here with the same text and the same
Serve; chaos tests scale under `shoal serve`.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import GRACEFUL_SHUTDOWN_S
from tests.cluster.conftest import RayHarness, Server
from tests.fakes import TIMEOUT_S

SERVE_CONFIG = """
applications:
  - name: shoal
    route_prefix: /
    import_path: cluster.app:build_app
    args:
      model: {model}
      deterministic: true
      runtime_dir: {sockets}
      ingress:
        num_workers: 2
      experts:
        num_workers: 2
        emulated_pairs_per_s: 500
        scaling:
          min_workers: 2
          max_workers: 3
          upscale_delay_s: 0
          downscale_delay_s: 2
          settle_s: 3
          report_every_s: 0.5
          window_s: 2
"""
PROMPT = list(range(20, 40))
STREAM = "/v1/experts/load/stream?interval_s=1"
SCALE_TIMEOUT_S = 2 * GRACEFUL_SHUTDOWN_S
METRIC_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def config(
    checkpoint_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    sockets = tmp_path_factory.mktemp("sockets")
    text = SERVE_CONFIG.format(model=checkpoint_dir("v3"), sockets=sockets)
    parsed: dict[str, Any] = yaml.safe_load(text)
    return parsed


@pytest.fixture(scope="module")
def from_yaml(ray_harness: RayHarness, config: dict[str, Any]) -> Iterator[Server]:
    """The application of SERVE_CONFIG on the shared Ray."""
    with ray_harness.from_serve_config(config, "v3") as server:
        yield server


def num_workers(server: Server, role: str) -> int:
    return sum(worker["role"] == role for worker in server.get("/status")["workers"])


def wait_for(server: Server, count: int, role: str = "experts") -> float:
    """Seconds until there are so many workers of a role."""
    begun_s = time.monotonic()
    while (found := num_workers(server, role)) != count:
        if time.monotonic() - begun_s > SCALE_TIMEOUT_S:
            pytest.fail(f"{found} {role} workers, not {count}")
        time.sleep(0.2)
    return time.monotonic() - begun_s


def wait_for_tier(server: Server, **size: int) -> None:
    """Until /status tells this size of the experts' tier; wanted: by Serve's autoscaler."""
    deadline_s = time.monotonic() + SCALE_TIMEOUT_S
    while (told := server.get("/status")["tiers"].get("experts")) != size:
        if time.monotonic() > deadline_s:
            pytest.fail(f"{told}, not {size}")
        time.sleep(0.2)


class Load:
    """Streams that go on until told to stop; every answer must be the same."""

    def __init__(self, server: Server, num_streams: int) -> None:
        self.answers: list[list[int]] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(num_streams)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.answers.append(ask(self._server))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def ask(server: Server) -> list[int]:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return list(server.post("/v1/completions", body)["choices"][0]["token_ids"])


@pytest.mark.ray
@pytest.mark.alone
def test_the_pool_follows_the_load_up_and_down(from_yaml: Server) -> None:
    assert num_workers(from_yaml, "experts") == 2
    wait_for_tier(from_yaml, wanted=2, present=2)
    expected = ask(from_yaml)
    load = Load(from_yaml, 4)
    try:
        grew_s = wait_for(from_yaml, 3)
        wait_for_tier(from_yaml, wanted=3, present=3)
        held = [w["num_experts"] for w in from_yaml.get("/status")["workers"] if w["num_slots"]]
    finally:
        load.stop()
    assert load.answers and all(answer == expected for answer in load.answers)
    shrank_s = wait_for(from_yaml, 2)
    wait_for_tier(from_yaml, wanted=2, present=2)
    assert ask(from_yaml) == expected
    assert re.search(r"Experts: 2 -> 3 workers, (load|pressure): .+", controller_log())
    assert re.search(r"Experts: 3 -> 2 workers, spare: .+", controller_log())
    wait_for_metric("ray_shoal_scaling_decisions_total{", 'cause="spare"', 'deployment="Experts"')
    wait_for_metric("ray_shoal_replicas_wanted{", 'tier="experts"', " 2.0")
    print(f"grew after {grew_s:.1f} s, shrank after {shrank_s:.1f} s, held {held}")


@pytest.mark.ray
@pytest.mark.alone
def test_an_ingress_that_is_watched_stops_and_is_not_counted_as_dead(
    ray_harness: RayHarness, config: dict[str, Any], from_yaml: Server
) -> None:
    """Serve waits until nothing is open at a replica; one that takes too long is killed."""
    wait_for(from_yaml, 2, "ingress")
    [application] = config["applications"]
    one_ingress = {**application, "deployments": [{"name": "Ingress", "num_replicas": 1}]}
    with ExitStack() as stack:
        for _ in range(8):  # both have some
            watch = urllib.request.urlopen(from_yaml.url + STREAM, timeout=TIMEOUT_S)
            assert stack.enter_context(watch).readline().startswith(b"data: ")
        ray_harness.apply({"applications": [one_ingress]})
        stopped_s = wait_for(from_yaml, 1, "ingress")
    assert stopped_s < GRACEFUL_SHUTDOWN_S
    assert from_yaml.get("/status")["counters"]["deaths"] == 0
    print(f"stopped after {stopped_s:.1f} s")


def controller_log() -> str:
    """What Serve's controller wrote since Ray was started."""
    import ray._private.worker as ray_worker

    logs = Path(ray_worker.global_worker.node.get_logs_dir_path()) / "serve"
    return "".join(file.read_text() for file in logs.glob("controller_*.log"))


def wait_for_metric(*parts: str) -> None:
    """Until a line of what Prometheus would scrape from this node has all the parts."""
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    deadline_s = time.monotonic() + METRIC_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            lines = response.read().decode().splitlines()
        if any(all(part in line for part in parts) for line in lines):
            return
        time.sleep(0.5)
    pytest.fail(f"no metric with {parts} after {METRIC_TIMEOUT_S} s")


def test_the_config_is_the_one_that_serve_reads(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(SERVE_CONFIG.format(model="/models/x", sockets=tmp_path))
    assert ServeDeploySchema.model_validate(config).applications[0].name == "shoal"
