"""Which trace a request belongs to: W3C Trace Context, https://www.w3.org/TR/trace-context/."""

from __future__ import annotations

import re
from typing import NamedTuple, Self

MAX_STATE_CHARS = 512
_MAX_MEMBERS = 32
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13}"
_MEMBER = re.compile(rf"({_KEY})=[ -+\--<>-~]{{0,255}}[!-+\--<>-~]")


class TraceContext(NamedTuple):
    """A span as its children in other processes know it."""

    trace_id: int
    span_id: int
    is_sampled: bool
    tracestate: str = ""
    """What the tracing systems on the way here keep with the trace: handed on as it came."""

    @classmethod
    def parse(cls, traceparent: str, tracestate: str = "") -> Self | None:
        """The two headers. None for a malformed traceparent, which is then ignored; a malformed
        tracestate alone counts as none."""
        match = _TRACEPARENT.fullmatch(traceparent)
        if match is None:
            return None
        version, trace_id, span_id, flags, more = match.groups()
        if version == "ff" or (version == "00" and more is not None):
            return None
        if not int(trace_id, 16) or not int(span_id, 16):
            return None
        sampled = bool(int(flags, 16) & 1)
        return cls(int(trace_id, 16), int(span_id, 16), sampled, _sound(tracestate))

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{self.is_sampled:02x}"


def _sound(tracestate: str) -> str:
    """Without what is too long, members from the right; "" if anything is malformed."""
    members = [member.strip(" \t") for member in tracestate.split(",")]
    members = [member for member in members if member]
    keys = {member.partition("=")[0] for member in members}
    if len(keys) < len(members) or len(members) > _MAX_MEMBERS:
        return ""
    if not all(_MEMBER.fullmatch(member) for member in members):
        return ""
    while sum(len(member) + 1 for member in members) > MAX_STATE_CHARS + 1:
        members.pop()
    return ",".join(members)
