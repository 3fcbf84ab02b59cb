"""One Ray for all tests; applications are put on it one after the other."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import TIMEOUT_S

READY_TIMEOUT_S = 600.0
POLL_S = 0.05


@dataclass(frozen=True)
class Server:
    """A deployed application."""

    url: str
    grpc_address: str
    model: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:  # its text says why, unlike the status line
                pytest.fail(f"POST {path}: {error.code} {error.read().decode()}")

    def wait_idle(self) -> float:
        """Seconds until no block of any worker is in use; fails the test after TIMEOUT_S."""
        started = time.monotonic()
        while time.monotonic() - started < TIMEOUT_S:
            engines = self.get("/status")["engines"]
            if all(e["kv_blocks_free"] == e["kv_blocks_total"] for e in engines):
                return time.monotonic() - started
            time.sleep(POLL_S)
        pytest.fail(f"blocks still in use after {TIMEOUT_S} s: {engines}")


def wait_ready(url: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Poll /readyz: what a load balancer does."""
    deadline = time.monotonic() + timeout_s
    last: Any = None
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            last = error.read()
        except OSError as error:
            last = error
        time.sleep(POLL_S)
    pytest.fail(f"{url} not ready after {timeout_s} s: {last!r}")


class RayHarness:
    """Deploys configurations; asking twice for the same one costs nothing.

    Its Ray believes in one GPU, whatever the machine has; workers compute on the CPU unless a test
    says otherwise.
    """

    def __init__(self, checkpoint_dir: Callable[[str], Path]) -> None:
        os.environ["RAY_OVERRIDE_RESOURCES"] = '{"GPU": 1}'
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray 2.60 warns at import
            import cluster.app  # noqa: F401
        from cluster.config import parse_config
        from cluster.launcher import LocalCluster, free_port

        self._checkpoint_dir = checkpoint_dir
        self._parse = parse_config
        self._listen = {"http_port": free_port(), "grpc_port": free_port()}
        base = self._config("v3", {})
        self.local = LocalCluster(base, dashboard=False)
        self._current: Any = None
        self.local.start_ray()

    def _config(self, preset: str, settings: dict[str, Any]) -> Any:
        folder = str(self._checkpoint_dir(preset))
        common = {"model": folder, "listen": self._listen, "device": "cpu"}
        return self._parse({**common, **settings})

    def serve(self, preset: str = "v3", **settings: Any) -> Server:
        """The application of these settings, ready."""
        config = self._config(preset, settings)
        url = f"http://127.0.0.1:{self._listen['http_port']}"
        if config != self._current:
            if self._current is not None:
                self.local.undeploy()
            self._current = None
            self.local.deploy(config)
            wait_ready(url)
            self._current = config
        return Server(url, f"127.0.0.1:{self._listen['grpc_port']}", config.model_name)

    @contextmanager
    def from_serve_config(self, config: dict[str, Any], model: str) -> Iterator[Server]:
        """The applications of a Serve config file instead of one of `serve`."""
        if self._current is not None:
            self.local.undeploy()
        self._current = None
        self.apply(config)
        url = f"http://127.0.0.1:{self._listen['http_port']}"
        wait_ready(url)
        yield Server(url, f"127.0.0.1:{self._listen['grpc_port']}", model)
        self.local.undeploy()

    def apply(self, config: dict[str, Any]) -> None:
        """Tell Serve what a Serve config file says now."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from ray.serve.context import _get_global_client
            from ray.serve.schema import ServeDeploySchema
        schema = ServeDeploySchema.model_validate(config)
        _get_global_client().deploy_apps(schema, _blocking=False)

    def refusal(self, preset: str = "v3", **settings: Any) -> str:
        """What a start with these settings, which cannot be, says."""
        from cluster.config import StartFailed

        if self._current is not None:
            self.local.undeploy()
        self._current = None
        with pytest.raises(StartFailed) as raised:
            self.local.deploy(self._config(preset, settings))
        self.local.undeploy()
        return str(raised.value)

    def log_of(self, worker_id: str) -> str:
        """The log file of a replica."""
        import ray

        tier, _, replica = worker_id.partition("-")
        context = ray.get_runtime_context()
        folder = Path(context.get_temp_dir(), context.get_session_name(), "logs", "serve")
        return (folder / f"replica_shoal_{tier.capitalize()}_{replica}.log").read_text()

    def stop(self) -> None:
        self.local.drain()
        self.local.stop()


@pytest.fixture(scope="session")
def ray_harness(checkpoint_dir: Callable[[str], Path]) -> Iterator[RayHarness]:
    """The one Ray of the session."""
    harness = RayHarness(checkpoint_dir)
    yield harness
    harness.stop()


@pytest.fixture
def server(ray_harness: RayHarness) -> Server:
    """The default application: two expert workers, a deployed router, deterministic."""
    return ray_harness.serve(deterministic=True)
