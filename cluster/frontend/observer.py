"""Who wants to know what becomes of requests: metrics, logs, traces.

Called on the event loop of the front end; an observer must be quick and must not raise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

Front = Literal["http", "grpc"]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a front knows of a request before it reads its body."""

    request_id: str
    """The client's X-Request-Id, or a fresh one."""
    protocol: Front
    key_name: str = ""
    """Of the API key, "" without keys."""
    traceparent: str = ""
    tracestate: str = ""
    """Both as the client sent them: perhaps malformed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, seconds.

    Queue, prefill and decode add up to the time from its submission to its last token; of several
    sequences they are those of the last to end. Costs are added up.
    """

    queue_s: float = 0.0
    """Until its first step, on the way to a worker too; with replays all time that gave no token
    and was no prefill."""
    prefill_s: float = 0.0
    """From its first step to its first token."""
    decode_s: float = 0.0
    """From its first token to its last."""
    step_s: float = 0.0
    """What the steps it took part in took, on the worker's clock: of prefill and decode the rest is
    between its steps and on the wire."""
    hop_s: float = 0.0
    """Of these: time spent on the way to the routed experts and back."""
    expert_ms: float = 0.0
    """Its cost: milliseconds that expert workers computed for it, by its share of each step."""
    num_preemptions: int = 0

    def __add__(self, other: Timing) -> Timing:
        """One after the other."""
        return Timing(
            self.queue_s + other.queue_s,
            self.prefill_s + other.prefill_s,
            self.decode_s + other.decode_s,
            self.step_s + other.step_s,
            self.hop_s + other.hop_s,
            self.expert_ms + other.expert_ms,
            self.num_preemptions + other.num_preemptions,
        )

    def beside(self, earlier: Timing) -> Timing:
        """Of two sequences of a request, this one the later to end."""
        return replace(
            self,
            expert_ms=self.expert_ms + earlier.expert_ms,
            num_preemptions=self.num_preemptions + earlier.num_preemptions,
        )


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request that ended, without any of its text."""

    request_id: str
    """Of its Origin."""
    answer_id: str
    """"id" of the answer; those of its sequences at the workers are `{answer_id}-{index}`."""
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
    token_s: tuple[float, ...]
    """Mean time of a token after the first, of each sequence that has more than one."""
    timing: Timing
    num_replays: int
    key_name: str
    """Of the API key, "" without keys."""
    trace_id: str
    """Of the trace that it belongs to, 32 hex digits; "" if to none."""


class RequestObserver(Protocol):
    """What the front end tells; request ids are those of Origin."""

    def on_started(self, request_id: str) -> None:
        """A request was admitted; its record follows, whatever happens."""

    def on_refused(self, request_id: str, code: str) -> None:
        """A request ended before it was admitted; code: of the error."""

    def on_kept(self, request_id: str) -> None:
        """A request got the answer kept under its idempotency key; nothing else follows."""

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        """One sequence got tokens, gap_s after its last ones; None: its first."""

    def on_finished(self, record: RequestRecord) -> None:
        """The end of an admitted request."""
