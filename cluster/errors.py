"""Every error a client can see: what happened, where in the request, and its status on each front.

The class of an error decides its HTTP status, its gRPC code and its OpenAI type through `TABLE`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

MAX_MESSAGE_CHARS = 500
"""4 bytes each at most: with `param` and the frame around them a body stays under 4 KiB."""
MAX_PARAM_CHARS = 200
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


class ShoalError(Exception):
    """Base of what is reported to clients; raise a subclass.

    `message`: one line for a person. `param`: path of the field at fault ("messages[0].content").
    `code`: a stable string for programs. `retry_after_s`: when to come back, in whole seconds.
    """

    default_code: ClassVar[str] = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = one_line(message)
        self.param = None if param is None else one_line(param, MAX_PARAM_CHARS)
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s


class InvalidRequest(ShoalError):
    """The request cannot be served as it is; sending it again will not help."""

    default_code = "invalid_value"


class Unauthenticated(ShoalError):
    """No API key came with the request, or one that is not valid."""

    default_code = "missing_api_key"


class PermissionDenied(ShoalError):
    """The field or route is not for this client."""

    default_code = "insufficient_scope"


class NotFound(ShoalError):
    """No such path, model or worker."""

    default_code = "unknown_url"


class MethodNotAllowed(ShoalError):
    """The path exists, the HTTP method on it does not."""

    default_code = "method_not_allowed"

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTimeout(ShoalError):
    """The client sent its body too slowly."""

    default_code = "request_timeout"


class IdempotencyConflict(ShoalError):
    """The idempotency key belongs to another request."""

    default_code = "idempotency_key_reused"


class RequestTooLarge(ShoalError):
    """More bytes than the limit; nothing of it was parsed."""

    default_code = "request_too_large"


class UnsupportedMediaType(ShoalError):
    """A Content-Type or Content-Encoding that is not read."""

    default_code = "unsupported_media_type"


class HeadersTooLarge(ShoalError):
    """Too many header fields, or too many bytes in them."""

    default_code = "headers_too_large"


class DeadlineExceeded(ShoalError):
    """The request's own time limit passed."""

    default_code = "deadline_exceeded"


class ServerOverloaded(ShoalError):
    """Too many requests are open; this one was refused before any work."""

    default_code = "server_overloaded"


class Unavailable(ShoalError):
    """The model is still loading, draining, or has no worker at the moment."""

    default_code = "model_loading"


class EngineFailed(ShoalError):
    """The engine gave up on the request, through no fault of the client."""

    default_code = "engine_error"


class InternalError(ShoalError):
    """A fault of the server that nobody foresaw; details are in its log only."""


@dataclass(frozen=True)
class ErrorKind:
    """How one class of errors looks from outside."""

    http_status: int
    grpc_code: str
    """Name of a grpc.StatusCode; grpc itself is imported by the front end only."""
    openai_type: str


TABLE: dict[type[ShoalError], ErrorKind] = {
    InvalidRequest: ErrorKind(400, "INVALID_ARGUMENT", "invalid_request_error"),
    Unauthenticated: ErrorKind(401, "UNAUTHENTICATED", "authentication_error"),
    PermissionDenied: ErrorKind(403, "PERMISSION_DENIED", "invalid_request_error"),
    NotFound: ErrorKind(404, "NOT_FOUND", "invalid_request_error"),
    MethodNotAllowed: ErrorKind(405, "UNIMPLEMENTED", "invalid_request_error"),
    BodyTimeout: ErrorKind(408, "DEADLINE_EXCEEDED", "invalid_request_error"),
    IdempotencyConflict: ErrorKind(409, "ALREADY_EXISTS", "invalid_request_error"),
    RequestTooLarge: ErrorKind(413, "RESOURCE_EXHAUSTED", "invalid_request_error"),
    UnsupportedMediaType: ErrorKind(415, "INVALID_ARGUMENT", "invalid_request_error"),
    HeadersTooLarge: ErrorKind(431, "RESOURCE_EXHAUSTED", "invalid_request_error"),
    DeadlineExceeded: ErrorKind(504, "DEADLINE_EXCEEDED", "server_error"),
    ServerOverloaded: ErrorKind(503, "RESOURCE_EXHAUSTED", "server_error"),
    Unavailable: ErrorKind(503, "UNAVAILABLE", "server_error"),
    EngineFailed: ErrorKind(500, "INTERNAL", "server_error"),
    InternalError: ErrorKind(500, "INTERNAL", "server_error"),
}


def kind_of(error: ShoalError) -> ErrorKind:
    """The row of `TABLE` for an error."""
    return TABLE[type(error)]


def error_body(error: ShoalError) -> dict[str, Any]:
    """The OpenAI error object: {"error": {"message", "type", "param", "code"}}, under 4 KiB."""
    return {
        "error": {
            "message": error.message,
            "type": kind_of(error).openai_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: ShoalError) -> dict[str, str]:
    """HTTP headers that go with the error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if isinstance(error, BodyTimeout):
        headers["Connection"] = "close"
    return headers


def one_line(text: str, max_chars: int = MAX_MESSAGE_CHARS) -> str:
    """`text` without control characters, surrogates, line breaks and memory addresses, cut."""
    text = _ADDRESS.sub("0x..", _UNPRINTABLE.sub(" ", text[: 2 * max_chars])).strip()
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def quote(value: object, max_chars: int = 60) -> str:
    """A client's own value for use inside a message: short, one line."""
    return one_line(repr(value)[: 2 * max_chars], max_chars)
