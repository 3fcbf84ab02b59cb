"""Who wants to know what becomes of requests: metrics, logs, traces.

Called on the event loop of the front end; an observer must be quick and must not raise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Front = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, seconds; of several sequences the longest, costs added up."""

    queue_s: float = 0.0
    """From its arrival at an attention worker to its first step."""
    prefill_s: float = 0.0
    """From its first step to its first token."""
    decode_s: float = 0.0
    """From its first token to its last."""
    hop_s: float = 0.0
    """Of the steps it took part in: time spent waiting for routed experts."""
    expert_ms: float = 0.0
    """Its cost: milliseconds that expert workers computed for it, by its share of each step."""
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that ended, without any of its text."""

    request_id: str
    protocol: Front
    kind: Literal["chat", "completion"]
    model: str
    stream: bool
    num_sequences: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reasons: tuple[str, ...]
    """One a sequence that finished."""
    outcome: Literal["ok", "error", "cancelled"]
    code: str
    """Of the error, "" without one: cluster/errors.py."""
    e2e_s: float
    ttft_s: float | None
    """To the first token, None if there was none."""
    timing: Timing
    num_replays: int
    key_name: str
    """Of the API key, "" without keys."""
    trace_id: str
    """32 hex digits, "" without traces."""


class RequestObserver(Protocol):
    """What the front end tells."""

    def on_started(self, request_id: str) -> None:
        """A request was admitted; its record follows, whatever happens."""

    def on_refused(self, request_id: str, code: str) -> None:
        """A request ended before it was admitted; code: of the error."""

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """One sequence got tokens, gap_s after its last ones; None: its first."""

    def on_finished(self, record: RequestRecord) -> None:
        """The end of an admitted request."""
