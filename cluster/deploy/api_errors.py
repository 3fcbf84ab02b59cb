"""What an API server may answer instead of an object; str() of each is one line."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from cluster.http_client import ApiError

MAX_MESSAGE_CHARS = 2000


class ClusterError(ApiError):
    """The API server cannot be reached, or it refuses."""


class Unreachable(ClusterError):
    """No connection, or one that broke; the same request may succeed later."""


@dataclass(frozen=True)
class Conflict:
    """A field that somebody else decides."""

    owner: str
    field: str


class Refused(ClusterError):
    """A status of 400 and more. `conflicts`: fields of other managers, of a server-side apply."""

    def __init__(self, status: int, message: str, conflicts: tuple[Conflict, ...] = ()) -> None:
        super().__init__(message)
        self.status = status
        self.conflicts = conflicts


class Forbidden(Refused):
    """403: the user lacks a right."""


class NotFound(Refused):
    """404: no such object, namespace or kind."""


class Gone(Refused):
    """410: the watch starts from a version that the server has forgotten; list anew."""


TRANSIENT = (429, 502, 503, 504)
"""Overloaded, or being restarted behind its load balancer: the same request may succeed later."""
CLASSES: dict[int, type[Refused]] = {403: Forbidden, 404: NotFound, 410: Gone}


def refusal(status: int, body: bytes | str) -> ClusterError:
    """The error for an HTTP status and a body, which is mostly an object of kind Status."""
    answer = _parsed(body)
    causes = (answer.get("details") or {}).get("causes") or []
    conflicts = tuple(
        Conflict(_owner(cause.get("message", "")), cause.get("field", ""))
        for cause in causes
        if cause.get("reason") == "FieldManagerConflict"
    )
    text = answer.get("message") or (
        body.decode(errors="replace") if isinstance(body, bytes) else body
    )
    message = " ".join(text.split())[:MAX_MESSAGE_CHARS] or "no explanation"
    if status == 401:
        message += "; log in to the cluster anew"
    if status in TRANSIENT:
        return Unreachable(f"HTTP {status}: {message}")
    return CLASSES.get(status, Refused)(status, f"HTTP {status}: {message}", conflicts)


def _parsed(body: bytes | str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _owner(message: str) -> str:
    """The manager in `conflict with "gitops" using v1`."""
    quoted = re.search(r'"([^"]+)"', message)
    return quoted[1] if quoted else message
