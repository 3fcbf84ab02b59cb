"""Ports of a deployment on this machine's loopback, through the API server.

Each local connection picks a pod of its own, so that a pod that goes takes only its connections
along: the next ones reach another pod.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError
from cluster.deploy.pod_causes import is_ready

CHUNK_BYTES = 1 << 16
ATTEMPTS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class Port:
    """One local port. `role`: of the pods, serve or head."""

    name: str
    local: int
    remote: int
    role: str


class Forwarder:
    """Listens on loopback and connects to pods. `find_pods` is asked at each new connection."""

    def __init__(
        self,
        find_pods: Callable[[str], list[Ref]],
        connect: Callable[[Ref, int], socket.socket],
        say: Say,
    ) -> None:
        self._find_pods = find_pods
        self._connect = connect
        self._say = say

    @contextmanager
    def listening(self, ports: list[Port]) -> Iterator[list[int]]:
        """Forward until the end of the block; gives the local ports. Raises ConfigError for a port
        that is taken."""
        listeners: list[socket.socket] = []
        threads: list[threading.Thread] = []
        try:
            for port in ports:
                listeners.append(_listen(port.local))
            for port, listener in zip(ports, listeners, strict=True):
                threads.append(_start(self._accept, port, listener))
            yield [listener.getsockname()[1] for listener in listeners]
        finally:
            for listener in listeners:
                _shut(listener)
            for thread in threads:
                thread.join()

    def _accept(self, port: Port, listener: socket.socket) -> None:
        with closing(listener):
            while True:
                try:
                    local, _ = listener.accept()
                except OSError:  # closed
                    return
                _start(self._serve, port, local)

    def _serve(self, port: Port, local: socket.socket) -> None:
        with closing(local):
            try:
                remote = self._reach(port)
            except ClusterError as error:
                self._say(f"{port.name}: {error}")
                return
            with closing(remote):
                back = _start(_copy, remote, local)
                _copy(local, remote)
                back.join()

    def _reach(self, port: Port) -> socket.socket:
        """A connection to any pod of the role; the first may be going away just now."""
        error = ClusterError("no pod is ready; see `shoal k8s status`")
        for pod in self._find_pods(port.role)[:ATTEMPTS]:
            try:
                return self._connect(pod, port.remote)
            except ClusterError as failed:
                error = failed
        raise error


def shown_cluster(service: dict[str, Any]) -> str:
    """Name of the RayCluster that serves, else of the one that is being built: its dashboard says
    how far it is."""
    status = service.get("status") or {}
    found = [status.get(f"{which}ServiceStatus") or {} for which in ("active", "pending")]
    return next((each["rayClusterName"] for each in found if each.get("rayClusterName")), "")


def ready_pods(cluster: Cluster, namespace: str, name: str, role: str) -> list[Ref]:
    """Pods of a RayCluster that answer: the head, or those with a Serve proxy."""
    label = "ray.io/node-type=head" if role == "head" else "ray.io/serve=true"
    pods = cluster.select("v1", "Pod", namespace, label)
    return [_ref(pod) for pod in pods if _is_usable(pod, name)]


def _ref(pod: dict[str, Any]) -> Ref:
    return Ref("v1", "Pod", pod["metadata"]["name"], pod["metadata"]["namespace"])


def _is_usable(pod: dict[str, Any], name: str) -> bool:
    metadata = pod["metadata"]
    is_ours = metadata["labels"].get("ray.io/cluster") == name
    return is_ours and is_ready(pod) and "deletionTimestamp" not in metadata


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise ConfigError(
            f"port {port} of this machine: {error.strerror}; choose another"
        ) from None


def _start(target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Until the source ends or either breaks; then the sink is told that nothing follows."""
    try:
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    except OSError:
        _shut(source)
    _shut(sink, socket.SHUT_WR)


def _shut(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(how)
