"""`shoal k8s forward`: local connections to pods, through fakes and through a websocket."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import ClusterError, Unreachable
from cluster.deploy.forward import Forwarder, Port, ready_pods, shown_cluster
from tests.k8s.api_server.kubeconfig import write_kubeconfig

TIMEOUT_S = 60
PODS = [Ref("v1", "Pod", "a", "here"), Ref("v1", "Pod", "b", "here")]
HTTP = Port("http", 0, 8000, "serve")


def echo(ref: Ref, port: int) -> socket.socket:
    """A pod that answers what it is told, with its name and port before."""
    near, far = socket.socketpair()

    def answer() -> None:
        with closing(far):
            far.sendall(f"{ref.name}:{port} ".encode())
            while data := far.recv(1000):
                far.sendall(data)

    threading.Thread(target=answer, daemon=True).start()
    return near


def exchange(port: int, text: bytes) -> bytes:
    """All that comes back for a text, the end of which is told."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while data := connection.recv(1000):
            received += data
        return received


def forwarder(
    connect: Callable[[Ref, int], socket.socket] = echo, pods: list[Ref] = PODS
) -> tuple[Forwarder, list[str]]:
    said: list[str] = []
    return Forwarder(lambda role: list(pods), connect, said.append), said


class TestForwarder:
    def test_bytes_go_there_and_back(self) -> None:
        forward, _ = forwarder()
        with forward.listening([HTTP]) as (port,):
            assert exchange(port, b"hello") == b"a:8000 hello"
            long = bytes(range(256)) * 4096
            assert exchange(port, long) == b"a:8000 " + long

    def test_each_port_has_its_role(self) -> None:
        asked: list[str] = []

        def find(role: str) -> list[Ref]:
            asked.append(role)
            return PODS

        forward = Forwarder(find, echo, lambda text: None)
        dashboard = Port("dashboard", 0, 8265, "head")
        with forward.listening([HTTP, dashboard]) as (http, head):
            assert exchange(head, b"") == b"a:8265 "
            assert exchange(http, b"") == b"a:8000 "
        assert asked == ["head", "serve"]

    def test_a_pod_that_went_is_passed_over(self) -> None:
        def connect(ref: Ref, port: int) -> socket.socket:
            if ref.name == "a":
                raise Unreachable("pod is gone")
            return echo(ref, port)

        forward, said = forwarder(connect)
        with forward.listening([HTTP]) as (port,):
            assert exchange(port, b"x") == b"b:8000 x"
        assert said == []

    def test_new_connections_find_the_new_pod(self) -> None:
        pods = PODS[:1]
        forward = Forwarder(lambda role: list(pods), echo, lambda text: None)
        with forward.listening([HTTP]) as (port,):
            assert exchange(port, b"").startswith(b"a")
            pods[:] = PODS[1:]
            assert exchange(port, b"").startswith(b"b")

    def test_without_a_pod_the_connection_ends_and_the_reason_is_said(self) -> None:
        forward, said = forwarder(pods=[])
        with forward.listening([HTTP]) as (port,):
            assert exchange(port, b"") == b""
        assert said == ["http: no pod is ready; see `shoal k8s status`"]

    def test_a_port_that_is_taken(self) -> None:
        forward, _ = forwarder()
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            port = Port("http", taken, 8000, "serve")
            expected = pytest.raises(ConfigError, match=f"port {taken} of this machine: .*another")
            with expected, forward.listening([port]):
                pass

    def test_nothing_listens_afterwards(self) -> None:
        forward, _ = forwarder()
        with forward.listening([HTTP]) as (port,):
            pass
        with pytest.raises(ConnectionRefusedError):
            exchange(port, b"")


def pod(name: str, ready: bool = True, of: str = "shoal-a", **more: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "here", "labels": {"ray.io/cluster": of}, **more}
    condition = {"type": "Ready", "status": str(ready)}
    return {"metadata": metadata, "status": {"conditions": [condition]}}


class FakeCluster:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def select(self, api: str, kind: str, namespace: str, labels: str) -> list[dict[str, Any]]:
        self.asked.append(labels)
        going = pod("d", deletionTimestamp="2026-11-22T12:00:00Z")
        return [pod("a"), pod("b", ready=False), pod("c", of="x"), going]


def test_the_cluster_that_serves_else_the_one_that_is_built() -> None:
    active, pending = {"rayClusterName": "a"}, {"rayClusterName": "b"}
    both = {"activeServiceStatus": active, "pendingServiceStatus": pending}
    assert shown_cluster({"status": both}) == "a"
    assert (
        shown_cluster({"status": {"activeServiceStatus": {}, "pendingServiceStatus": pending}})
        == "b"
    )
    assert shown_cluster({}) == ""


def test_only_pods_that_answer_are_connected_to() -> None:
    fake: Any = FakeCluster()
    assert ready_pods(fake, "here", "shoal-a", "serve") == PODS[:1]
    ready_pods(fake, "here", "shoal-a", "head")
    assert fake.asked == ["ray.io/serve=true", "ray.io/node-type=head"]


# ---- the API server's side of port forwarding


def frame(data: bytes) -> bytes:
    """A short binary websocket frame of a server."""
    return bytes([0x82, len(data)]) + data


def read_frame(stream: Any) -> bytes:
    """The data of a short frame of a client, which is masked; empty at the end."""
    head = stream.read(2)
    if len(head) < 2 or head[0] & 0xF == 8:
        return b""
    mask = stream.read(4)
    data = stream.read(head[1] & 0x7F)
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


class ApiServer:
    """Knows pods, and forwards to one that answers in capitals."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(TIMEOUT_S)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                lines = iter(lambda: stream.readline().decode().strip(), "")
                request = list(lines)
                headers = {k.lower(): v for k, _, v in (each.partition(": ") for each in request)}
                self.requests.append(f"{request[0]} {headers.get('authorization')}")
                if "sec-websocket-key" in headers:
                    self._forward(connection, stream, headers["sec-websocket-key"])
                else:
                    self._discover(connection)

    def _discover(self, connection: socket.socket) -> None:
        pods = {"name": "pods", "kind": "Pod", "namespaced": True}
        body = json.dumps({"resources": [pods]})
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection.sendall((head + body).encode())

    def _forward(self, connection: socket.socket, stream: Any, key: str) -> None:
        magic = key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(magic.encode()).digest()).decode()  # noqa: S324
        connection.sendall(
            f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        for channel in (0, 1):  # data and errors of the first port; each names its port first
            connection.sendall(frame(bytes([channel]) + struct.pack("<H", 8000)))
        while data := read_frame(stream):
            connection.sendall(frame(b"\0" + data[1:].upper()))


@pytest.fixture
def api_server() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


def test_a_port_of_a_pod_through_the_api_server(api_server: ApiServer, tmp_path: Path) -> None:
    cluster = Cluster(write_kubeconfig(tmp_path, api_server.url, "admin"))
    with closing(cluster.port_forward(PODS[0], 8000)) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.sendall(b"hello")
        assert connection.recv(100) == b"HELLO"
    path = "/api/v1/namespaces/here/pods/a/portforward?ports=8000"
    assert api_server.requests[-1] == f"GET {path} HTTP/1.1 Bearer admin-token"


def test_an_api_server_that_went_away(tmp_path: Path) -> None:
    server = ApiServer()
    cluster = Cluster(write_kubeconfig(tmp_path, server.url, "admin"))
    assert cluster.kind("v1", "Pod")
    server.close()
    with pytest.raises(ClusterError, match="no answer from the API server"):
        cluster.port_forward(PODS[0], 8000)
