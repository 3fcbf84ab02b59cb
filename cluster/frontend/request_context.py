"""Which request the current task works for, and whose it is: for log lines and records.

Set where a request comes in (http_guard.py, grpc_server.py); what the task starts inherits it.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""As the client knows it, X-Request-Id; "" outside of requests."""
key_name: ContextVar[str] = ContextVar("key_name", default="")
"""Of the API key, set by the authoriser; "" without keys. Never the key itself."""

_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9_.:-]")


def begin_request(given: str, max_chars: int) -> str:
    """The client's id without odd characters, or a fresh one; from here on it is `request_id`."""
    chosen = _NOT_IN_REQUEST_ID.sub("", given)[:max_chars] or uuid.uuid4().hex
    request_id.set(chosen)
    key_name.set("")
    return chosen
