"""The span of a request at the front end, and the trace context that its workers get."""

from __future__ import annotations

from typing import Any

from attention.trace_context import TraceContext
from attention.tracing import Tracer
from cluster.frontend.observer import RequestRecord

_OPERATIONS = {"chat": "chat", "completion": "text_completion"}


class RequestSpan:
    """Belongs to the trace of the client, if it sent one. Without a tracer nothing is recorded and
    the client's own context goes to the workers."""

    def __init__(self, tracer: Tracer | None, traceparent: str, tracestate: str) -> None:
        """Both as they came; malformed ones count as none."""
        parent = TraceContext.parse(traceparent, tracestate)
        self._tracer = tracer
        self._span: Any = None if tracer is None else tracer.start_request(parent)
        self.context = parent if tracer is None else tracer.context_of(self._span)
        """For the workers; None without a trace."""

    @property
    def trace_id(self) -> str:
        """32 hex digits, "" without a trace."""
        return "" if self.context is None else f"{self.context.trace_id:032x}"

    def end(self, code: str = "") -> None:
        """Of a request that was never admitted; code: of the error that refused it."""
        if self._tracer is not None:
            if code:
                self._tracer.fail(self._span, code)
            self._span.end()

    def finish(self, record: RequestRecord) -> None:
        """Of one that was. Attributes as in OpenTelemetry's conventions for generative AI."""
        if self._tracer is None:
            return
        span, operation = self._span, _OPERATIONS[record.kind]
        span.update_name(f"{operation} {record.model}")
        span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "shoal",
                "gen_ai.request.model": record.model,
                "gen_ai.request.choice.count": record.num_sequences,
                "gen_ai.response.model": record.model,
                "gen_ai.response.id": record.answer_id,
                "gen_ai.response.finish_reasons": record.finish_reasons,
                "gen_ai.usage.input_tokens": record.prompt_tokens,
                "gen_ai.usage.output_tokens": record.completion_tokens,
                "shoal.request_id": record.request_id,
                "shoal.protocol": record.protocol,
                "shoal.outcome": record.outcome,
                "shoal.cached_tokens": record.cached_tokens,
                "shoal.replays": record.num_replays,
                "shoal.expert_ms": record.timing.expert_ms,
            }
        )
        if record.ttft_s is not None:
            span.set_attribute("shoal.ttft_ms", 1e3 * record.ttft_s)
        self.end(record.code)
