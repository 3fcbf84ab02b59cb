"""A real Ray of this machine behind the KubeRay stand-in: a node for each tier, and Serve's REST
API, to which KubeRay too hands `serveConfigV2`.

What a pod has for itself is shared here, so two things differ: Serve's HTTP and gRPC listen on free
ports of loopback instead of those of the configuration, which is otherwise handed on as it is, and
the head is the node of tier `ingress`.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cluster import serve_proxy
from cluster.config import SECRET_VARIABLE
from cluster.launcher import free_port

HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]
TIER_LABEL = "shoal.io/tier"
TIERS = ("ingress", "attention", "experts")
"""Of the nodes; the first is the head's."""
OBJECT_STORE_BYTES = 100_000_000
START_TIMEOUT_S = 300.0
POLL_S = 0.2
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 120.0
LOG_TAIL = 3000
"""Characters of a log in an error."""
PORT_OPTIONS = (
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--node-manager-port",
    "--object-manager-port",
)


class LocalRay:
    """From `start` to `stop`; called with a Serve configuration, it is a `ServeBackend`."""

    def __init__(self) -> None:
        self.statuses: Mapping[str, Any] = {}
        """Of the applications, as last asked for."""
        self._ports = _different_ports()
        self.http_port, self.grpc_port = next(self._ports), next(self._ports)
        self._gcs_port, self._dashboard_port = next(self._ports), next(self._ports)
        self._secret = secrets.token_hex(32)
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._sent: Mapping[str, Any] | None = None

    def start(self) -> None:
        """Raises RuntimeError with the log if the head does not come up."""
        self._start_node(
            TIERS[0],
            "--head",
            f"--port={self._gcs_port}",
            f"--dashboard-host={HOST}",
            f"--dashboard-port={self._dashboard_port}",
            f"--ray-client-server-port={next(self._ports)}",
        )
        self._wait_for_dashboard()
        for tier in TIERS[1:]:
            self._start_node(tier, f"--address={HOST}:{self._gcs_port}")

    def stop(self) -> None:
        """End every process that `start` brought about."""
        nodes = [psutil.Process(node.pid) for node in self._nodes if node.poll() is None]
        family = nodes + [child for node in nodes for child in node.children(recursive=True)]
        for process in family:  # asked politely, `ray start` takes half a minute
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
        for node in self._nodes:
            node.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __call__(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Make it so, and say how the applications do, as KubeRay copies it into the status."""
        self._check_nodes()
        if config != self._sent:
            self._call("PUT", self._for_this_machine(config))
            self._sent = copy.deepcopy(config)
        applications = self._call("GET").get("applications", {})
        self.statuses = {name: _status(each) for name, each in applications.items()}
        return self.statuses

    def _check_nodes(self) -> None:
        """Raises RuntimeError: without one of them the application would never start."""
        for tier, node in zip(TIERS, self._nodes, strict=True):
            if node.poll() is not None:
                log = self._log(tier).read_text()[-LOG_TAIL:]
                raise RuntimeError(f"the node of tier {tier} ended: {log}")

    def _for_this_machine(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        http = {**config["http_options"], "host": HOST, "port": self.http_port}
        grpc = {**config["grpc_options"], "port": self.grpc_port}
        return {**config, "http_options": http, "grpc_options": grpc}

    def _start_node(self, tier: str, *options: str) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            f"--node-ip-address={HOST}",
            f"--labels={TIER_LABEL}={tier}",
            f"--temp-dir={self._temp_dir(tier)}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--num-cpus=0",
            "--include-log-monitor=false",
            *(f"{option}={next(self._ports)}" for option in PORT_OPTIONS),
            *options,
        ]
        with self._log(tier).open("wb") as log:
            node = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,  # its reaper ends the group, which must not be ours
            )
        self._nodes.append(node)

    def _environment(self) -> dict[str, str]:
        """Of the pods, as the manifests have it."""
        inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        return {
            **inherited,
            **serve_proxy.environment(HOST),
            SECRET_VARIABLE: self._secret,
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": str(ROOT),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def _wait_for_dashboard(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(f"{self._dashboard}/api/version", timeout=30):
                    return
            except OSError as error:
                if time.monotonic() > deadline or self._nodes[0].poll() is not None:
                    text = self._log(TIERS[0]).read_text()[-LOG_TAIL:]
                    raise RuntimeError(f"Ray did not start: {text}") from error
            time.sleep(POLL_S)

    @property
    def _dashboard(self) -> str:
        return f"http://{HOST}:{self._dashboard_port}"

    def _temp_dir(self, tier: str) -> Path:
        """Of its own: nodes that start at once would choose the same names for their sockets."""
        return self._folder / tier[0]  # paths of sockets must stay below 108 bytes

    def _log(self, tier: str) -> Path:
        return self._folder / f"{tier}.log"

    def _call(self, method: str, body: Mapping[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self._dashboard}/api/serve/applications/",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            with error:
                raise RuntimeError(f"Serve refused the configuration: {error.read()!r}") from None


def _different_ports() -> Iterator[int]:
    """Free ones, none twice: a node binds its own only some seconds later."""
    taken: set[int] = set()
    while True:
        if (port := free_port()) not in taken:
            taken.add(port)
            yield port


def _status(application: Mapping[str, Any]) -> Mapping[str, Any]:
    deployments = application.get("deployments", {})
    return {
        "status": application["status"],
        "message": application.get("message", ""),
        "serveDeploymentStatuses": {
            name: {"status": deployment["status"], "message": deployment.get("message", "")}
            for name, deployment in deployments.items()
        },
    }
