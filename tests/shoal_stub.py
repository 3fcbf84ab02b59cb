"""A server that answers with what a test says: for commands that read one."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cluster.top.reading import Load


def make_load(
    recent_rows: list[list[int]],
    holders: list[list[list[int]]] | None = None,
    workers: int = 2,
    first_layer: int = 0,
) -> Load:
    """Of the last 5 of 60 s; without `holders` worker e % workers holds expert e."""
    num_layers, num_experts = len(recent_rows), len(recent_rows[0])
    alternating = [[[expert % workers] for expert in range(num_experts)]] * num_layers
    return Load(
        layers=list(range(first_layer, first_layer + num_layers)),
        workers=[f"experts-{i}" for i in range(workers)],
        window_s=60.0,
        rows=[[12 * rows for rows in layer] for layer in recent_rows],
        recent_s=5.0,
        recent_rows=recent_rows,
        holders=holders or alternating,
        balancedness=[0.5] * num_layers,
    )


def load_body(load: Load) -> dict[str, Any]:
    """As GET /v1/experts/load?compact=true answers."""
    return {"model": "tiny", "epoch": 7, "expert_balancedness": load.balancedness, **vars(load)}


def make_worker(worker_id: str, **more: Any) -> dict[str, Any]:
    """Its role is what its id begins with."""
    unknown = {"busy": None, "queue": None, "rows_per_s": None, "drained": False}
    return {"worker_id": worker_id, "role": worker_id.partition("-")[0], **unknown, **more}


def make_status(*workers: str | dict[str, Any], **more: Any) -> dict[str, Any]:
    """The body of /status of a server that has just started."""
    return {
        "model": "tiny",
        "ready": True,
        "stage": "ready",
        "epoch": 7,
        "workers": [make_worker(w) if isinstance(w, str) else w for w in workers],
        **more,
    }


class ShoalStub:
    """Bodies by path (without the query): text as it is, anything else as JSON; others are 404."""

    def __init__(self, bodies: dict[str, Any], key: str | None = None) -> None:
        """key: which every request has to give."""
        self.bodies = bodies
        self._authorization = key and f"Bearer {key}"
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = self.bodies.get(request.path.partition("?")[0])
        data = body if isinstance(body, str) else json.dumps(body)
        status = 404 if body is None else 200
        if request.headers["Authorization"] != self._authorization:
            data, status = json.dumps({"error": {"message": "no key", "code": ""}}), 401
        request.send_response(status)
        request.send_header("Content-Length", str(len(data.encode())))
        request.end_headers()
        request.wfile.write(data.encode())

    def __enter__(self) -> ShoalStub:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
