"""HTTP to a Kubernetes API server, with the credentials of a kubeconfig.

Of the `kubernetes` package only this much is used: its own discovery keeps a cache in a file under
/tmp whose name anybody can guess.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.deploy.api_errors import Unreachable, refusal

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 60.0
POD_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
Query = dict[str, str]


class Transport:
    """Requests of one user. All methods raise Unreachable and Refused."""

    def __init__(self, kubeconfig: Path | None, context: str | None) -> None:
        self._client = _client(kubeconfig, context)
        http, api = _library("urllib3.exceptions"), _library("kubernetes.client.exceptions")
        self._errors = (http.HTTPError, api.ApiException, OSError)

    @property
    def url(self) -> str:
        return str(self._client.configuration.host)

    def call(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """The JSON of one exchange."""
        request = self._request(method, path, query, body, content_type)
        with closing(self._send(request, READ_TIMEOUT_S)) as response:
            try:
                answer: dict[str, Any] = json.loads(response.data)
            except self._errors as error:
                raise self._unreachable(error) from None
            except ValueError:
                raise Unreachable(f"{self.url}{path}: the answer is not JSON") from None
        return answer

    def lines(self, path: str, query: Query, read_timeout_s: float | None) -> Iterator[str]:
        """Lines of a response as they come; None waits for them without an end."""
        with closing(self._send(self._request("GET", path, query), read_timeout_s)) as response:
            try:
                rest = b""
                for piece in response.stream(amt=None):
                    *lines, rest = (rest + piece).split(b"\n")
                    yield from (line.decode(errors="replace") for line in lines)
                if rest:
                    yield rest.decode(errors="replace")
            except self._errors as error:
                raise self._unreachable(error) from None

    def open_port(self, path: str, port: int) -> socket.socket:
        """A connection to a port of the pod with this portforward path."""
        _, url, headers, *_ = self._request("GET", path, {"ports": str(port)})
        headers["sec-websocket-protocol"] = "v4.channel.k8s.io"  # v5 has frames it does not know
        forward = _library("kubernetes.stream.ws_client").portforward_call
        try:
            stream = forward(self._client.configuration, "GET", url, headers=headers)
        except self._errors as error:
            raise self._unreachable(error) from None
        connection: socket.socket = stream.socket(port)
        return connection

    def _send(self, request: tuple[Any, ...], read_timeout_s: float | None) -> Any:
        """The open response, whose status is below 400."""
        timeout = (CONNECT_TIMEOUT_S, read_timeout_s)
        try:
            response = self._client.call_api(*request, _request_timeout=timeout).response
            if response.status < 400:
                return response
            with closing(response):
                raise refusal(response.status, response.data)
        except self._errors as error:
            raise self._unreachable(error) from None

    def _request(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> tuple[Any, ...]:
        request: tuple[Any, ...] = self._client.param_serialize(
            method,
            path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        return request

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(f"no answer from the API server {self.url}: {_reason(error)}")


def _client(kubeconfig: Path | None, context: str | None) -> Any:
    client, config = _library("kubernetes.client"), _library("kubernetes.config")
    configuration = client.Configuration()
    try:
        if kubeconfig is None and context is None and _is_pod():
            config.load_incluster_config(configuration)
        else:
            path = str(kubeconfig) if kubeconfig else None
            config.load_kube_config(path, context, configuration)
    except config.ConfigException as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{kubeconfig or 'kubeconfig'}: {reason}; check --kubeconfig and --context"
        ) from None
    configuration.retries = False  # who calls knows whether trying again makes sense
    return client.ApiClient(configuration)


def _is_pod() -> bool:
    """In a pod without a kubeconfig of its own, which speaks as its service account."""
    default = Path.home() / ".kube" / "config"
    return POD_TOKEN.exists() and "KUBECONFIG" not in os.environ and not default.exists()


def _library(name: str) -> Any:
    """A module of the optional extra; commands that need none must not import it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(
            "the Kubernetes client is not installed: pip install 'shoal-serve[k8s]'"
        ) from None


def _reason(error: Exception) -> str:
    """One line; urllib3's own text shows its objects with their addresses in memory."""
    cause = error.__cause__ or error.__context__
    text = getattr(cause, "strerror", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(text).split()) or type(error).__name__
