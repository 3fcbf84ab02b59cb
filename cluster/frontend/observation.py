"""What observers hear of one request: that it was refused, or that it started and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

from attention.tracing import Tracer
from cluster.errors import InternalError, ShoalError
from cluster.frontend.observer import Origin, RequestObserver, RequestRecord, Timing
from cluster.frontend.request import GenerateRequest
from cluster.frontend.request_span import RequestSpan

Outcome = Literal["ok", "error", "cancelled"]


@dataclass(slots=True)
class Usage:
    """Tokens of a request so far. n choices of one prompt count it once."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Observation:
    """One request from its arrival to its end. As a context it spans the way in: an error that
    leaves it before `admit` refuses the request."""

    def __init__(
        self,
        origin: Origin,
        observers: Sequence[RequestObserver],
        clock: Callable[[], float],
        tracer: Tracer | None = None,
    ) -> None:
        self.origin = origin
        self.span = RequestSpan(tracer, origin.traceparent, origin.tracestate)
        self.started_s = clock()
        self.e2e_s = 0.0
        """Set by `last_token` or, without it, by `finish`."""
        self._observers = observers
        self._clock = clock
        self._request: GenerateRequest | None = None
        self._finished = False
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}  # by sequence

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._request is not None:
            return
        code = ""
        if isinstance(error, Exception):
            code = code_of(error)
            for observer in self._observers:
                observer.on_refused(self.origin.request_id, code)
        self.span.end(code)

    def kept(self) -> None:
        """An answer from before is given again; nothing runs for it."""
        for observer in self._observers:
            observer.on_kept(self.origin.request_id)

    def admit(self, request: GenerateRequest) -> None:
        """The request runs from now on; `finish` must follow."""
        self._request = request
        for observer in self._observers:
            observer.on_started(self.origin.request_id)

    def tokens(self, index: int, num_tokens: int, arrived_s: float) -> None:
        """A sequence got tokens, on the service's clock."""
        last_s = self._last_s.get(index)
        gap_s = None if last_s is None else arrived_s - last_s
        self._last_s[index] = arrived_s
        if self._first_s is None:
            self._first_s = arrived_s
        for observer in self._observers:
            observer.on_tokens(num_tokens, gap_s)

    def last_token(self) -> None:
        """All of the answer is there, and `finish` follows once it is told."""
        self.e2e_s = self._clock() - self.started_s

    def finish(
        self,
        outcome: Outcome,
        usage: Usage,
        timing: Timing,
        *,
        finish_reasons: Sequence[str] = (),
        token_s: Sequence[float] = (),
        num_replays: int = 0,
        code: str = "",
    ) -> None:
        """The end of an admitted request; only the first one counts."""
        request = self._request
        if request is None or self._finished:
            return
        self._finished = True
        self.e2e_s = self.e2e_s or self._clock() - self.started_s
        record = RequestRecord(
            request_id=self.origin.request_id,
            answer_id=request.request_id,
            protocol=self.origin.protocol,
            kind="chat" if request.is_chat else "completion",
            model=request.model,
            stream=request.stream,
            num_sequences=request.num_sequences,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            finish_reasons=tuple(finish_reasons),
            outcome=outcome,
            code=code,
            e2e_s=self.e2e_s,
            ttft_s=None if self._first_s is None else self._first_s - self.started_s,
            token_s=tuple(token_s),
            timing=timing,
            num_replays=num_replays,
            key_name=self.origin.key_name,
            trace_id=self.span.trace_id,
        )
        self.span.finish(record)
        for observer in self._observers:
            observer.on_finished(record)


def code_of(error: Exception) -> str:
    """Of one of our errors; any other is a fault of the server's."""
    return error.code if isinstance(error, ShoalError) else InternalError.default_code
