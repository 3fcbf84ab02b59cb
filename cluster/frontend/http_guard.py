"""The outermost layer of the HTTP app: request ids, header bounds, API keys, unforeseen errors.

It leaves in the scope's `state` what it knows of a request: `request_id` and `key_name`.

Pure ASGI. (Starlette's BaseHTTPMiddleware would hide a client's disconnect from the app.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import (
    HeadersTooLarge,
    InternalError,
    ShoalError,
    error_body,
    error_headers,
    kind_of,
)
from cluster.frontend.auth import Authorizer
from cluster.frontend.generation import ClientGone
from cluster.frontend.request_context import begin_request, key_name
from cluster.frontend.streaming import to_json
from cluster.limits import Limits

logger = logging.getLogger(__name__)
_CLIENT_GONE = 499
"""Nobody reads it; proxies and logs know it as "client closed request"."""


def json_response(
    data: Any, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`data` as compact UTF-8."""
    return Response(to_json(data), status_code, headers, "application/json")


def error_response(error: ShoalError) -> Response:
    """The OpenAI error object with its status and headers."""
    return json_response(error_body(error), kind_of(error).http_status, error_headers(error))


class HttpGuard:
    """Wraps an ASGI app."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Callable[[], Limits],
        authorizer: Authorizer,
        echo_request_id: bool,
        on_refused: Callable[[str, str], None] = lambda request_id, code: None,
    ) -> None:
        """`echo_request_id`: put X-Request-Id into answers; off behind a proxy that does it.
        `on_refused`: told the id and the error's code of what is refused here, which nobody else
        sees."""
        self._app = app
        self._limits = limits
        self._authorizer = authorizer
        self._echo_request_id = echo_request_id
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing else is served, so nothing else can forget its keys
            raise ValueError(f"no {scope['type']} here")
        request_id = begin_request(_given_id(scope), self._limits().max_request_id_chars)
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if self._echo_request_id:
                    message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            self._admit(scope, request_id)
            await self._app(scope, receive, send_with_id)
        except ShoalError as error:
            await error_response(error)(scope, receive, send_with_id)
        except ClientGone:
            await Response(status_code=_CLIENT_GONE)(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if not started:
                unforeseen = InternalError("The server failed; its log has the details.")
                await error_response(unforeseen)(scope, receive, send_with_id)

    def _admit(self, scope: Scope, request_id: str) -> None:
        try:
            self._check_headers(scope)
            self._authorizer.check_http(scope)
        except ShoalError as error:
            self._on_refused(request_id, error.code)
            raise
        scope.setdefault("state", {}).update(request_id=request_id, key_name=key_name.get())

    def _check_headers(self, scope: Scope) -> None:
        limits = self._limits()
        headers = scope["headers"]
        num_bytes = sum(len(name) + len(value) for name, value in headers)
        if len(headers) > limits.max_headers or num_bytes > limits.max_header_bytes:
            raise HeadersTooLarge(
                f"At most {limits.max_headers} headers and {limits.max_header_bytes} bytes of them"
                " are read."
            )


def _given_id(scope: Scope) -> str:
    """The client's X-Request-Id."""
    given = (value for name, value in scope["headers"] if name == b"x-request-id")
    return next(given, b"").decode("latin-1")
