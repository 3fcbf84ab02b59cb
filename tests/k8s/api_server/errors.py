"""What the API server refuses, as the `Status` bodies that clients parse."""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]


class ApiError(Exception):
    """An answer other than 2xx: an HTTP code and a Status object."""

    def __init__(self, code: int, reason: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.details = details

    @property
    def body(self) -> Json:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.code,
        }


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource")


def not_found(resource: str, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{resource} "{name}" not found', name=name, kind=resource)


def already_exists(resource: str, name: str) -> ApiError:
    message = f'{resource} "{name}" already exists'
    return ApiError(409, "AlreadyExists", message, name=name, kind=resource)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def unsupported(content_type: str) -> ApiError:
    message = f"the body of the request was in an unknown format: {content_type!r}"
    return ApiError(415, "UnsupportedMediaType", message)


def modified(resource: str, name: str) -> ApiError:
    message = (
        f'Operation cannot be fulfilled on {resource} "{name}": the object has been modified; '
        "please apply your changes to the latest version and try again"
    )
    return ApiError(409, "Conflict", message, name=name, kind=resource)


def invalid(kind: str, name: str, causes: list[tuple[str, str]]) -> ApiError:
    """`causes`: path of a field and what is wrong with it."""
    text = ", ".join(f"{field}: {message}" for field, message in causes)
    if len(causes) > 1:
        text = f"[{text}]"
    listed = [{"reason": "FieldValueInvalid", "message": m, "field": f} for f, m in causes]
    message = f'{kind} "{name}" is invalid: {text}'
    return ApiError(422, "Invalid", message, name=name, kind=kind, causes=listed)


def untyped(message: str) -> ApiError:
    """Server-side apply of what the schema does not know; not a 4xx on real servers either."""
    return ApiError(500, "", f"failed to create typed patch object: {message}")


def expired(asked: int, current: int) -> ApiError:
    return ApiError(410, "Expired", f"too old resource version: {asked} ({current})")
