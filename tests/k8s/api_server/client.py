"""A client of few words for the tests' own needs: REST calls and watches that can be cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from tests.k8s.api_server.errors import ApiError, Json
from tests.k8s.api_server.patches import APPLY, MERGE
from tests.k8s.api_server.resources import BUILTIN, ResourceType

TIMEOUT_S = 60.0
RAY_SERVICE = ResourceType("ray.io", "v1", "RayService", "rayservices")
RAY_CLUSTER = ResourceType("ray.io", "v1", "RayCluster", "rayclusters")
KINDS = {resource.kind: resource for resource in (*BUILTIN, RAY_SERVICE, RAY_CLUSTER)}


class Client:
    """One user's view of the server; objects are plain dicts, refusals raise ApiError."""

    def __init__(self, kubeconfig: Path, manager: str) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster = config["clusters"][0]["cluster"]
        self._url = cluster["server"]
        self._manager = manager
        self._pool = urllib3.PoolManager(
            maxsize=8,
            ca_certs=cluster.get("certificate-authority"),
            headers={"Authorization": f"Bearer {config['users'][0]['user']['token']}"},
            timeout=TIMEOUT_S,
            retries=False,
        )

    def get(self, kind: str, name: str, namespace: str = "") -> Json:
        return self._call("GET", path_of(kind, namespace, name))

    def find(self, kind: str, name: str, namespace: str = "") -> Json | None:
        """None if there is none."""
        try:
            return self.get(kind, name, namespace)
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def select(self, kind: str, namespace: str = "", labels: str = "") -> list[Json]:
        items: list[Json] = self.listing(kind, namespace, labels)["items"]
        resource = KINDS[kind]  # items of a list say neither
        return [{"apiVersion": resource.api_version, "kind": kind, **item} for item in items]

    def listing(self, kind: str, namespace: str = "", labels: str = "") -> Json:
        query = {"labelSelector": labels} if labels else {}
        return self._call("GET", path_of(kind, namespace), query)

    def create(self, obj: Json, **query: str) -> Json:
        path = path_of(obj["kind"], obj["metadata"].get("namespace", ""))
        return self._call("POST", path, self._written(query), obj)

    def replace(self, obj: Json, **query: str) -> Json:
        return self._call("PUT", _path_to(obj), self._written(query), obj)

    def apply(
        self, obj: Json, manager: str | None = None, force: bool = False, **query: str
    ) -> Json:
        query = self._written({**query, **({"fieldManager": manager} if manager else {})})
        query |= {"force": "true"} if force else {}
        return self._call("PATCH", _path_to(obj), query, obj, APPLY)

    def patch(
        self,
        kind: str,
        name: str,
        namespace: str,
        body: Any,
        content_type: str = MERGE,
        subresource: str = "",
    ) -> Json:
        path = path_of(kind, namespace, name, subresource)
        return self._call("PATCH", path, self._written({}), body, content_type)

    def delete(self, kind: str, name: str, namespace: str = "", **query: str) -> Json:
        return self._call("DELETE", path_of(kind, namespace, name), query)

    def watch(self, kind: str, namespace: str, since: str, timeout_s: int = 300) -> Watch:
        """Events after version `since`."""
        query = {"watch": "true", "resourceVersion": since, "timeoutSeconds": str(timeout_s)}
        url = f"{self._url}{path_of(kind, namespace)}?{urlencode(query)}"
        response = self._pool.request("GET", url, preload_content=False, timeout=timeout_s + 10)
        if response.status != 200:
            raise _refusal(response.status, response.data)
        return Watch(response)

    def text(self, path: str) -> str:
        """What a GET answers that is no object."""
        return self._bytes("GET", path).decode()

    def raw(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> Json:
        answer: Json = json.loads(self._bytes(method, path, body, content_type))
        return answer

    def _bytes(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> bytes:
        headers = {**self._pool.headers, "Content-Type": content_type or "application/json"}
        response = self._pool.request(method, self._url + path, body=body, headers=headers)
        if response.status >= 300:
            raise _refusal(response.status, response.data)
        return bytes(response.data)

    def close(self) -> None:
        self._pool.clear()

    def _written(self, query: dict[str, str]) -> dict[str, str]:
        return {"fieldManager": self._manager, **query}

    def _call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Json:
        url = f"{path}?{urlencode(query)}" if query else path
        data = b"" if body is None else json.dumps(body).encode()
        return self.raw(method, url, data, content_type)


class Watch:
    """An open stream of events; `cut` ends it from another thread."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __iter__(self) -> Iterator[Json]:
        """Ends when the server ends the stream or it is cut.

        Raises:
            ApiError: what the server put into the stream, as 410.
        """
        buffer = b""
        try:
            for chunk in self._response.stream(amt=None):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    yield _event(json.loads(line))
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            return  # cut
        finally:
            self._response.release_conn()
            self._response.close()

    def cut(self) -> None:
        with suppress(RuntimeError, OSError):  # it has ended by itself
            self._response.shutdown()


def path_of(kind: str, namespace: str = "", name: str = "", subresource: str = "") -> str:
    resource = KINDS[kind]
    path = resource.path
    if namespace and resource.namespaced:
        path += f"/namespaces/{namespace}"
    return "/".join(part for part in (path, resource.plural, name, subresource) if part)


def _path_to(obj: Json) -> str:
    metadata = obj["metadata"]
    return path_of(obj["kind"], metadata.get("namespace", ""), metadata["name"])


def _event(event: Json) -> Json:
    if event["type"] == "ERROR":
        raise _refusal(event["object"]["code"], json.dumps(event["object"]).encode())
    return event


def _refusal(code: int, data: bytes) -> ApiError:
    try:
        body = json.loads(data)
    except ValueError:
        return ApiError(code, "", data.decode(errors="replace"))
    details = body.get("details") or {}
    return ApiError(code, body.get("reason", ""), body.get("message", ""), **details)
