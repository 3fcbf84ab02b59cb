"""The objects, their versions, and the events that watches read."""

from __future__ import annotations

import copy
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tests.k8s.api_server.errors import Json, expired
from tests.k8s.api_server.resources import NAMESPACE, ResourceType
from tests.k8s.api_server.selectors import Predicate

FIRST_VERSION = 100
"""Of a new server: so that a watch from version 1 is too old, as on one with a history."""


class Key(NamedTuple):
    group: str
    plural: str
    namespace: str | None
    name: str


@dataclass(frozen=True)
class Event:
    version: int
    type: str
    group: str
    plural: str
    obj: Json


def key_of(resource: ResourceType, namespace: str | None, name: str) -> Key:
    return Key(resource.group, resource.plural, namespace if resource.namespaced else None, name)


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Store:
    """All access under `lock`, which is notified of each event. Objects in it are never changed."""

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())
        self.version = FIRST_VERSION
        self.is_closed = False
        self._objects: dict[Key, Json] = {}
        self._events: list[Event] = []
        self._oldest = FIRST_VERSION

    def get(self, key: Key) -> Json | None:
        return self._objects.get(key)

    def select(
        self, resource: ResourceType, namespace: str | None, matches: Predicate
    ) -> list[Json]:
        """Of one namespace, or of all if it is None."""
        wanted = (resource.group, resource.plural)
        return [
            obj
            for key, obj in self._objects.items()
            if key[:2] == wanted and namespace in (None, key.namespace) and matches(obj)
        ]

    def put(self, key: Key, obj: Json) -> Json:
        """Store `obj` as a new version; returns it as stored."""
        obj = copy.deepcopy(obj)
        obj["metadata"].setdefault("uid", str(uuid.uuid4()))
        obj["metadata"].setdefault("creationTimestamp", timestamp())
        event = "MODIFIED" if key in self._objects else "ADDED"
        self._objects[key] = self._record(key, event, obj)
        return self._objects[key]

    def delete(self, key: Key) -> Json:
        """Delete the object, or mark it if finalizers hold it; what it owns goes with it."""
        obj = copy.deepcopy(self._objects[key])
        if obj["metadata"].get("finalizers"):
            obj["metadata"].setdefault("deletionTimestamp", timestamp())
            return self.put(key, obj)
        del self._objects[key]
        gone = self._record(key, "DELETED", obj)
        for dependent in list(self._dependents(key, obj["metadata"]["uid"])):
            if dependent in self._objects:
                self.delete(dependent)
        return gone

    def events(
        self, resource: ResourceType, namespace: str | None, matches: Predicate, since: int
    ) -> list[Event]:
        """After version `since`.

        Raises:
            ApiError: 410, they are no longer kept.
        """
        if since < self._oldest:
            raise expired(since, self.version)
        wanted = (resource.group, resource.plural)
        return [
            event
            for event in self._events[bisect_right(self._events, since, key=_version) :]
            if (event.group, event.plural) == wanted
            and namespace in (None, event.obj["metadata"].get("namespace"))
            and matches(event.obj)
        ]

    def forget_events(self) -> None:
        """Cut off all watches; versions up to now become too old to watch from."""
        with self.lock:
            self.version += 1  # one that no client has seen
            self._events, self._oldest = [], self.version
            self.lock.notify_all()

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            self.lock.notify_all()

    def _record(self, key: Key, event: str, obj: Json) -> Json:
        self.version += 1
        obj["metadata"]["resourceVersion"] = str(self.version)
        self._events.append(Event(self.version, event, key.group, key.plural, obj))
        self.lock.notify_all()
        return obj

    def _dependents(self, key: Key, uid: str) -> Iterator[Key]:
        is_namespace = (key.group, key.plural) == (NAMESPACE.group, NAMESPACE.plural)
        for other, obj in self._objects.items():
            owners = obj["metadata"].get("ownerReferences") or []
            inside = is_namespace and other.namespace == key.name
            if inside or any(owner["uid"] == uid for owner in owners):
                yield other


def _version(event: Event) -> int:
    return event.version
