"""Who may do what, by API key: one authoriser behind HTTP and gRPC, default deny.

Over HTTP it decides by the path that routing will match, before routing: a path that is not in the
table exists for nobody. Without any configured key everything is open.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from starlette.types import Scope

from cluster.errors import NotFound, PermissionDenied, Unauthenticated, quote
from cluster.frontend.api_keys import ApiKey, KeyRing, KeyScope
from cluster.frontend.request_context import key_name

Access = Literal["open"] | KeyScope

HTTP_ACCESS: dict[str, Access] = {
    "/livez": "open",
    "/readyz": "open",
    "/health": "open",
    "/": "open",
    "/experts": "open",
    "/assets/{name:path}": "open",
    "/v1/chat/completions": "inference",
    "/v1/completions": "inference",
    "/tokenize": "inference",
    "/detokenize": "inference",
    "/v1/models": "inference",
    "/v1/models/{name:path}": "inference",
    "/v1/limits": "inference",
    "/version": "inference",
    "/openapi.json": "inference",
    "/status": "inference",
    "/v1/experts/load": "inference",
    "/v1/experts/load/stream": "inference",
    "/metrics": "metrics",
    "/v1/experts/drain": "admin",
    "/v1/experts/replicate": "admin",
    "/v1/experts/rebalance": "admin",
    "/v1/scale": "admin",
    "/v1/chaos": "admin",
}
"""Every route of the application, as it is declared there, whatever the method."""
_REST = "{name:path}"
_ACCESS_BY_PREFIX = {
    route.removesuffix(_REST): access
    for route, access in HTTP_ACCESS.items()
    if route.endswith(_REST)
}


class Authorizer:
    """Refuses what a client has no key for."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        """None: everything is open."""
        self._keys = keys

    @property
    def needs_keys(self) -> bool:
        """Whether anything is refused at all."""
        return self._keys is not None

    def check_http(self, scope: Scope) -> None:
        """Raises Unauthenticated, then NotFound, then PermissionDenied."""
        access = access_of(scope)
        if self._keys is None or access == "open":
            return
        key = _find(self._keys, _values(scope["headers"], b"authorization"))
        what = f"{scope['method']} {scope['path']}"
        if access is None:
            raise NotFound(f"Unknown request URL: {quote(what, 200)}. Routes: /openapi.json.")
        _check_scope(key, access, quote(what))

    def check_grpc(self, metadata: Iterable[Any] | None) -> None:
        """For the methods of shoal.v1.Inference. Raises Unauthenticated, PermissionDenied."""
        if self._keys is not None:
            key = _find(self._keys, _values(metadata or (), "authorization"))
            _check_scope(key, "inference", "shoal.v1.Inference")


def access_of(scope: Scope) -> Access | None:
    """What the path of a request needs; None: there is no such path."""
    path = _route_path(scope)
    for prefix, access in _ACCESS_BY_PREFIX.items():
        if path.startswith(prefix):
            return access
    return HTTP_ACCESS.get(path)


def _route_path(scope: Scope) -> str:
    """The path below the application's prefix. Not request.url, which the Host header is in."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root) if path.startswith(root + "/") else path


def _values(headers: Iterable[Any], name: str | bytes) -> list[str]:
    found = [value for key, value in headers if key == name]
    return [value.decode("latin-1") if isinstance(value, bytes) else str(value) for value in found]


def _find(keys: KeyRing, authorization: list[str]) -> ApiKey:
    """The key of the one `Bearer` value; its name is the `key_name` of the request from now on."""
    if not authorization:
        raise Unauthenticated("An API key is needed: send 'Authorization: Bearer KEY'.")
    scheme, _, text = authorization[0].strip().partition(" ")
    if len(authorization) > 1 or scheme.lower() != "bearer":
        raise Unauthenticated(
            "The API key is not readable: send one 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
        )
    key = keys.find(text.strip())
    if key is None:
        raise Unauthenticated("The API key is not valid here.", code="invalid_api_key")
    key_name.set(key.name)
    return key


def _check_scope(key: ApiKey, needed: KeyScope, what: str) -> None:
    if not key.allows(needed):
        raise PermissionDenied(
            f"The API key {key.name} is for {', '.join(key.scopes)}; {what} needs one for {needed}."
        )
