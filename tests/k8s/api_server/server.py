"""An API server in memory, over HTTP: paths and queries to `Objects`, and watches."""

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

from tests.k8s.api_server import resources
from tests.k8s.api_server.access import Access, Action
from tests.k8s.api_server.errors import ApiError, Json, bad_request
from tests.k8s.api_server.kubeconfig import write_kubeconfig
from tests.k8s.api_server.objects import Objects, Write
from tests.k8s.api_server.request import Deadline, Request, Target, parse
from tests.k8s.api_server.schemas import MINOR
from tests.k8s.api_server.selectors import Predicate
from tests.k8s.api_server.store import Store

DEFAULT_WATCH_S = 60.0
VERSION = {"major": "1", "minor": str(MINOR), "gitVersion": f"v1.{MINOR}.0+simulated"}


class Api:
    """Everything behind the HTTP handler."""

    def __init__(self) -> None:
        self.store = Store()
        self.objects = Objects(self.store)
        self.access = Access(self.store)
        self.logs: dict[tuple[str, str], str] = {}
        """By namespace and pod."""

    def answer(self, request: Request) -> tuple[int, Any]:
        """Code and body; text for logs, an iterator of events for a watch."""
        if request.path == "/version":
            return 200, VERSION
        user = self.access.user(request.headers.get("Authorization"))
        with self.store.lock:
            target = parse(request.path, self.objects.types)
            if isinstance(target, dict):
                return 200, target
            return self._act(user, request, target)

    def _act(self, user: str, request: Request, target: Target) -> tuple[int, Any]:
        verb = request.verb(target)
        action = Action(
            verb, target.resource, target.subresource, target.namespace, target.name or ""
        )
        self.access.require(user, action)
        if target.resource == resources.ACCESS_REVIEW:
            return 201, self._review(user, request.json())
        if target.subresource == "log":
            return 200, self._log(request, target)
        if verb == "watch":
            return 200, self._watch(request, target)
        if verb in ("get", "list"):
            return 200, self._read(request, target)
        return self._write(user, verb, request, target)

    def _read(self, request: Request, target: Target) -> Json:
        resource = target.resource
        if target.name:
            return self.objects.get(resource, target.namespace, target.name)
        return {
            "kind": f"{resource.kind}List",
            "apiVersion": resource.api_version,
            "metadata": {"resourceVersion": str(self.store.version)},
            "items": self.store.select(resource, target.namespace, request.matcher()),
        }

    def _write(self, user: str, verb: str, request: Request, target: Target) -> tuple[int, Json]:
        resource, namespace, name = target.resource, target.namespace, target.name or ""
        write = Write(request.manager, request.is_dry_run, request.is_forced, target.subresource)
        if verb == "create":
            return 201, self.objects.create(resource, namespace, request.json(), write)
        if verb == "update":
            return 200, self.objects.replace(resource, namespace, name, request.json(), write)
        if verb == "delete":
            return 200, self.objects.delete(resource, namespace, name, write.is_dry_run)
        is_new = self.store.get(target.key) is None
        if is_new and request.content_type == "application/apply-patch+yaml":
            self.access.require(user, Action("create", resource, "", namespace, name))
        patch = request.json()
        obj = self.objects.patch(resource, namespace, name, patch, request.content_type, write)
        return (201 if is_new else 200), obj

    def _log(self, request: Request, target: Target) -> str:
        self.objects.get(resources.POD, target.namespace, target.name or "")
        text = self.logs.get((target.namespace or "", target.name or ""), "")
        if tail := request.query.get("tailLines"):
            text = "".join(text.splitlines(keepends=True)[-int(tail) :])
        return text

    def _review(self, user: str, body: Json) -> Json:
        asked = body["spec"]["resourceAttributes"]
        types = self.objects.types
        found = [
            t for t in types if (t.group, t.plural) == (asked.get("group", ""), asked["resource"])
        ]
        if not found:
            return {**body, "status": {"allowed": False, "reason": "unknown resource"}}
        action = Action(
            asked["verb"],
            found[0],
            asked.get("subresource", ""),
            asked.get("namespace"),
            asked.get("name", ""),
        )
        return {**body, "status": {"allowed": self.access.allows(user, action)}}

    def _watch(self, request: Request, target: Target) -> Iterator[Json]:
        """Events from the version asked for, or what there is and then its changes."""
        since = int(request.query.get("resourceVersion") or 0)
        first: list[Json] = []
        if since == 0:
            matching = self.store.select(target.resource, target.namespace, request.matcher())
            first = [{"type": "ADDED", "object": obj} for obj in matching]
            since = self.store.version
        return self._stream(request, target, first, since)

    def _stream(
        self, request: Request, target: Target, first: list[Json], since: int
    ) -> Iterator[Json]:
        yield from first
        deadline = request.deadline(DEFAULT_WATCH_S)
        while events := self._next_events(target, request.matcher(), since, deadline):
            yield from events
            if events[-1]["type"] == "ERROR":
                return
            since = int(events[-1]["object"]["metadata"]["resourceVersion"])

    def _next_events(
        self, target: Target, matches: Predicate, since: int, deadline: Deadline
    ) -> list[Json]:
        """Waits for them; none when the time is up or the server closes."""
        with self.store.lock:
            while True:
                try:
                    events = self.store.events(target.resource, target.namespace, matches, since)
                except ApiError as error:
                    return [{"type": "ERROR", "object": error.body}]
                if events:
                    return [{"type": event.type, "object": event.obj} for event in events]
                if self.store.is_closed or not self.store.lock.wait(deadline.left_s):
                    return []


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
