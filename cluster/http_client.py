"""A small client of Shoal's own HTTP API for the command line; standard library only."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import SplitResult, urlsplit

from cluster.config import ConfigError

HOW_TO_GIVE_A_KEY = "Set SHOAL_API_KEY or give --api-key."


_CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}


class ApiError(Exception):
    """The server could not be reached or refused; str() is one line."""


class RequestRefused(ApiError):
    """The server understood the request and does not carry it out: status 4xx. `code`: the
    error's, as in the API."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class ApiClient:
    """One server, one connection a call, with an API key if there is one.

    `url`: http or https (certificates are checked), with the path in front of Shoal's if a proxy
    adds one. Raises ConfigError for a URL or a key that cannot be.
    """

    def __init__(self, url: str, timeout_s: float = 600.0, api_key: str | None = None) -> None:
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError("the API key has characters that no key has: is it complete?")
        parts = _checked_url(url)
        self.url = parts.geturl()
        self._prefix = parts.path
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connection_type = _CONNECTIONS[parts.scheme]
        self._address = (parts.hostname, parts.port)
        self._timeout_s = timeout_s

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON body (None if it is none). Raises ApiError."""
        status, data = self._fetch("GET", path)
        return status, _json(data)

    def read(self, path: str) -> Any:
        """The JSON body of a GET that succeeds. Raises ApiError, RequestRefused."""
        return _checked(*self.get(path))

    def read_text(self, path: str) -> str:
        """The body of a GET that succeeds, as text. Raises ApiError, RequestRefused."""
        status, data = self._fetch("GET", path)
        if status != 200:
            _checked(status, _json(data))
        return data.decode(errors="replace")

    def post(self, path: str, body: Any) -> Any:
        """The JSON body of the answer. Raises ApiError, RequestRefused."""
        status, data = self._fetch("POST", path, body)
        return _checked(status, _json(data))

    def chat(self, messages: list[dict[str, str]], **params: Any) -> Iterator[str]:
        """Pieces of the answer's text as they come. Raises ApiError."""
        body = {"messages": messages, "stream": True, **params}
        with self._answer("POST", "/v1/chat/completions", body) as response:
            if response.status != 200:
                raise ApiError(_message(_json(response.read()), response.status))
            for line in response:
                if line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    yield from _text_of(_json(line[6:]))
        raise ApiError("the answer broke off")

    def _fetch(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        with self._answer(method, path, body) as response:
            return response.status, response.read()

    @contextmanager
    def _answer(self, method: str, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """The beginning of an answer; what breaks then or while it is read becomes an ApiError."""
        connection = self._connection_type(*self._address, timeout=self._timeout_s)
        headers, data = self._headers, None
        if body is not None:
            headers, data = headers | {"Content-Type": "application/json"}, json.dumps(body)
        fault, advice = f"no Shoal at {self.url}", "; start it with `shoal serve`"
        try:
            connection.request(method, self._prefix + path, data, headers)
            response = connection.getresponse()
            fault, advice = f"the answer of {self.url} broke off", ""
            yield response
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ApiError(f"{fault}: {reason}{advice}") from None
        finally:
            connection.close()


def _checked_url(url: str) -> SplitResult:
    """Scheme, host, port and the path without its last slash."""
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        valid = parts.scheme in _CONNECTIONS and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half a bracket
        valid = False
    if not valid:
        raise ConfigError(f"{url}: expected http://HOST:PORT or https://HOST")
    return parts._replace(path=parts.path.rstrip("/"), query="", fragment="")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


def _checked(status: int, body: Any) -> Any:
    if status == 200 and body is not None:
        return body
    text = _message(body, status)
    if 400 <= status < 500:
        raise RequestRefused(text, str(body["error"]["code"]) if _is_error(body) else "")
    raise ApiError(text)


def _is_error(body: Any) -> bool:
    return isinstance(body, dict) and isinstance(body.get("error"), dict)


def _message(body: Any, status: int) -> str:
    text = str(body["error"]["message"]) if _is_error(body) else f"HTTP status {status}"
    return f"{text} {HOW_TO_GIVE_A_KEY}" if status == 401 else text


def _text_of(chunk: Any) -> Iterator[str]:
    if "error" in chunk:
        raise ApiError(_message(chunk, 200))
    for choice in chunk["choices"]:
        if choice["delta"].get("content"):
            yield choice["delta"]["content"]
