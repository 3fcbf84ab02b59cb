"""An HTTP request as the API understands it: a kind, a name, a verb, options."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.k8s.api_server import resources, selectors
from tests.k8s.api_server.errors import Json, no_such_path
from tests.k8s.api_server.resources import ResourceType
from tests.k8s.api_server.store import Key, key_of

VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class Target:
    """What a path names: a collection, an object, or a subresource of it."""

    resource: ResourceType
    namespace: str | None
    name: str | None
    subresource: str

    @property
    def key(self) -> Key:
        return key_of(self.resource, self.namespace, self.name or "")


@dataclass(frozen=True)
class Deadline:
    at: float

    @property
    def left_s(self) -> float:
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, method: str, url: str, headers: Any, body: bytes) -> Request:
        parts = urlsplit(url)
        return cls(method, parts.path, dict(parse_qsl(parts.query)), headers, body)

    @property
    def content_type(self) -> str:
        return (self.headers.get("Content-Type") or "").partition(";")[0]

    @property
    def manager(self) -> str:
        """The field manager: by name, or else the client program."""
        agent = (self.headers.get("User-Agent") or "unknown").partition("/")[0]
        return self.query.get("fieldManager") or agent

    @property
    def is_dry_run(self) -> bool:
        return self.query.get("dryRun") == "All"

    @property
    def is_forced(self) -> bool:
        return self.query.get("force", "").lower() == "true"

    def json(self) -> Any:
        """The body, in YAML if it is no JSON."""
        if self.body[:1] in (b"{", b"["):
            return json.loads(self.body)
        return yaml.safe_load(self.body)

    def verb(self, target: Target) -> str:
        if self.query.get("watch", "").lower() in ("true", "1"):
            return "watch"
        return VERBS.get(self.method) or ("get" if target.name else "list")

    def matcher(self) -> selectors.Predicate:
        labels = self.query.get("labelSelector", "")
        return selectors.matcher(labels, self.query.get("fieldSelector", ""))

    def deadline(self, default_s: float) -> Deadline:
        return Deadline(time.monotonic() + float(self.query.get("timeoutSeconds") or default_s))


def parse(path: str, types: list[ResourceType]) -> Target | Json:
    """What `path` names, or the discovery document that it is.

    Raises:
        ApiError: 404.
    """
    match [part for part in path.split("/") if part]:
        case ["api"]:
            return {"kind": "APIVersions", "versions": ["v1"]}
        case ["apis"]:
            return resources.group_list(types)
        case ["api", version, *rest]:
            return _within("", version, rest, types)
        case ["apis", group, version, *rest]:
            return _within(group, version, rest, types)
    raise no_such_path()


def _within(group: str, version: str, rest: list[str], types: list[ResourceType]) -> Target | Json:
    known = [t for t in types if (t.group, t.version) == (group, version)]
    if not known:
        raise no_such_path()
    if not rest:
        return resources.resource_list(types, group, version)
    namespace = None
    if rest[0] == "namespaces" and len(rest) > 2 and rest[2] != "status":
        namespace, rest = rest[1], rest[2:]
    resource = next((t for t in known if t.plural == rest[0]), None)
    if resource is None or len(rest) > 3:
        raise no_such_path()
    name = rest[1] if len(rest) > 1 else None
    return Target(resource, namespace, name, rest[2] if len(rest) > 2 else "")
