"""A Kubernetes cluster as the deploy commands see it: objects are dicts, an absent one is None."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.deploy.api_errors import NotFound, refusal
from cluster.deploy.manifest import Manifest
from cluster.deploy.transport import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, Transport

FIELD_MANAGER = "shoal"
PAGE_SIZE = "500"


@dataclass(frozen=True)
class Kind:
    """A kind as the server knows it: `path` is /api/v1 or /apis/GROUP/VERSION."""

    path: str
    plural: str
    is_namespaced: bool


@dataclass(frozen=True)
class Ref:
    """Names one object."""

    api_version: str
    kind: str
    name: str
    namespace: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Ref:
        metadata = manifest["metadata"]
        return cls(
            manifest["apiVersion"], manifest["kind"], metadata["name"], metadata.get("namespace")
        )

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


class Cluster:
    """One API server, as one user. All methods raise Unreachable, Refused and its subclasses."""

    def __init__(self, kubeconfig: Path | None = None, context: str | None = None) -> None:
        self._http = Transport(kubeconfig, context)
        self._kinds: dict[str, dict[str, Kind]] = {}

    def kind(self, api_version: str, kind: str) -> Kind | None:
        """None: the cluster lacks it."""
        if api_version not in self._kinds:
            self._kinds[api_version] = self._discover(api_version)
        return self._kinds[api_version].get(kind)

    def get(self, ref: Ref) -> Manifest | None:
        """The object as it is; None if it, its namespace or its kind is absent."""
        try:
            return self._http.call("GET", self._path(ref))
        except NotFound:
            return None

    def select(
        self,
        api_version: str,
        kind: str,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
    ) -> list[Manifest]:
        """All objects of a kind, of one namespace or of all; empty if the kind is absent."""
        return self.listing(api_version, kind, namespace, labels, fields)[0]

    def listing(
        self,
        api_version: str,
        kind: str,
        namespace: str | None = None,
        labels: str = "",
        fields: str = "",
    ) -> tuple[list[Manifest], str]:
        """As `select`, with the version of the list, for `events`."""
        found = self.kind(api_version, kind)
        if found is None:
            return [], ""
        query = {"limit": PAGE_SIZE, "labelSelector": labels, "fieldSelector": fields}
        items: list[Manifest] = []
        while True:
            page = self._http.call("GET", _collection(found, namespace), query)
            # items of a list come without their kind
            items += ({"apiVersion": api_version, "kind": kind, **item} for item in page["items"])
            if not page["metadata"].get("continue"):
                return items, page["metadata"].get("resourceVersion", "")
            query["continue"] = page["metadata"]["continue"]

    def create(self, manifest: Manifest) -> Manifest:
        """Make an object that is not there yet: 409 if it is."""
        ref = Ref.of(manifest)
        path = _collection(self._found(ref), ref.namespace)
        return self._http.call("POST", path, {"fieldManager": FIELD_MANAGER}, manifest)

    def apply(self, manifest: Manifest, *, dry_run: bool = False, force: bool = False) -> Manifest:
        """Server-side apply: the object as it is afterwards. Fields of other managers are a
        Refused with `conflicts`, unless they are taken by force."""
        query = {"fieldManager": FIELD_MANAGER, "force": str(force).lower()}
        if dry_run:
            query["dryRun"] = "All"
        path = self._path(Ref.of(manifest))
        return self._http.call("PATCH", path, query, manifest, "application/apply-patch+yaml")

    def json_patch(self, ref: Ref, operations: list[dict[str, Any]], manager: str) -> Manifest:
        """Change single fields. A `test` operation that fails is a Refused with status 422."""
        query = {"fieldManager": manager}
        content_type = "application/json-patch+json"
        return self._http.call("PATCH", self._path(ref), query, operations, content_type)

    def delete(self, ref: Ref) -> bool:
        """Ask for its deletion, what it owns goes afterwards; False if it was absent."""
        try:
            self._http.call("DELETE", self._path(ref), {"propagationPolicy": "Background"})
        except NotFound:
            return False
        return True

    def watch(self, ref: Ref, timeout_s: float) -> Generator[Manifest, None, None]:
        """The object as it is, and again after each change until the time is up. Raises Gone."""
        path = _collection(self._found(ref), ref.namespace)
        query = {"fieldSelector": f"metadata.name={ref.name}"}
        for _, obj in self._events(path, query, timeout_s):
            yield obj

    def events(
        self,
        api_version: str,
        kind: str,
        namespace: str,
        version: str,
        labels: str,
        timeout_s: float,
    ) -> Generator[tuple[str, Manifest], None, None]:
        """ADDED, MODIFIED or DELETED, and the object, after the version of a `listing` and until
        the time is up. Raises Gone if the server has forgotten it."""
        found = self._found(Ref(api_version, kind, "", namespace))
        query = {"resourceVersion": version, "labelSelector": labels}
        yield from self._events(_collection(found, namespace), query, timeout_s)

    def _events(
        self, path: str, query: dict[str, str], timeout_s: float
    ) -> Generator[tuple[str, Manifest], None, None]:
        query = {**query, "watch": "true", "timeoutSeconds": str(max(1, round(timeout_s)))}
        for line in self._http.lines(path, query, timeout_s + CONNECT_TIMEOUT_S):
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise refusal(event["object"].get("code", 500), json.dumps(event["object"]))
            yield event["type"], event["object"]

    def log(
        self,
        pod: Ref,
        container: str,
        *,
        follow: bool = False,
        tail_lines: int | None = None,
    ) -> Iterator[str]:
        """Lines of a container's log."""
        query = {"container": container, "follow": str(follow).lower()}
        if tail_lines is not None:
            query["tailLines"] = str(tail_lines)
        timeout_s = None if follow else READ_TIMEOUT_S
        return self._http.lines(f"{self._path(pod)}/log", query, timeout_s)

    def port_forward(self, pod: Ref, port: int) -> socket.socket:
        """A connection to a port of a pod, through the API server."""
        return self._http.open_port(f"{self._path(pod)}/portforward", port)

    def _discover(self, api_version: str) -> dict[str, Kind]:
        path = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
        try:
            resources = self._http.call("GET", path)["resources"]
        except NotFound:
            return {}
        return {
            entry["kind"]: Kind(path, entry["name"], entry["namespaced"])
            for entry in resources
            if "/" not in entry["name"]
        }

    def _found(self, ref: Ref) -> Kind:
        kind = self.kind(ref.api_version, ref.kind)
        if kind is None:
            raise NotFound(404, f"this cluster has no {ref.kind} of {ref.api_version}")
        return kind

    def _path(self, ref: Ref) -> str:
        return f"{_collection(self._found(ref), ref.namespace)}/{ref.name}"


def _collection(kind: Kind, namespace: str | None) -> str:
    if kind.is_namespaced and namespace:
        return f"{kind.path}/namespaces/{namespace}/{kind.plural}"
    return f"{kind.path}/{kind.plural}"
