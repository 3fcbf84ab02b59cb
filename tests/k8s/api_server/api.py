"""What the server answers to a request: discovery, objects, logs, reviews and watches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.k8s.api_server import resources
from tests.k8s.api_server.access import Access, Action
from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.objects import Objects, Write
from tests.k8s.api_server.patches import APPLY
from tests.k8s.api_server.request import Deadline, Request, Target, parse
from tests.k8s.api_server.schemas import MINOR
from tests.k8s.api_server.selectors import Predicate
from tests.k8s.api_server.store import Store

DEFAULT_WATCH_S = 60.0
VERSION = {"major": "1", "minor": str(MINOR), "gitVersion": f"v1.{MINOR}.0+simulated"}


class Api:
    """Everything behind the HTTP handler; may be called from many threads."""

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
        if is_new and request.content_type == APPLY:
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
