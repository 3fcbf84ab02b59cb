"""An API server in memory, over HTTP, and the fixture around it."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from tests.k8s.api_server.api import Api
from tests.k8s.api_server.errors import ApiError, Json, bad_request
from tests.k8s.api_server.kubeconfig import write_kubeconfig
from tests.k8s.api_server.request import Request
from tests.k8s.api_server.schemas import MINOR


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer in two segments waits 40 ms for an ACK
    wbufsize = -1
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read answers, not logs."""

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        try:
            code, answer = self.server.api.answer(
                Request.of(self.command, self.path, self.headers, body)
            )
        except ApiError as error:
            code, answer = error.code, error.body
        except (ValueError, yaml.YAMLError) as error:
            refusal = bad_request(f"cannot read the body: {error}")
            code, answer = refusal.code, refusal.body
        with suppress(BrokenPipeError, ConnectionResetError):  # the client went away
            self._send(code, answer)
            self.wfile.flush()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _send(self, code: int, answer: Any) -> None:
        self.send_response(code)
        if isinstance(answer, Iterator):
            self._send_events(answer)
            return
        text = isinstance(answer, str)
        data = (answer if text else json.dumps(answer)).encode()
        self.send_header("Content-Type", "text/plain" if text else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send_events(self, events: Iterator[Json]) -> None:
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for event in events:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, api: Api) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api = api

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that cuts its connection is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class SimEnv:
    """The server in this process, as a context; the same interface as `real_api.RealEnv`."""

    is_simulated = True
    minor = MINOR

    def __init__(self) -> None:
        self.api = Api()
        self._server = Server(self.api)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-kube-")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def cluster(self, user: str = "admin") -> Path:
        """The kubeconfig of `admin`, `operator` or `deployer`."""
        return write_kubeconfig(Path(self._folder.name), self.url, user)

    def write_log(self, namespace: str, pod: str, text: str) -> None:
        """What `logs` of the pod says from now on."""
        self.api.logs[namespace, pod] = text

    def forget_events(self) -> None:
        """Every watch, open or from a version known so far, gets 410."""
        self.api.store.forget_events()

    def __enter__(self) -> SimEnv:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.api.store.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()
