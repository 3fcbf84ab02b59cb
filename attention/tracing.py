"""Traces: the spans of a request and of its sequences.

OpenTelemetry is imported when a tracer is opened and nowhere else. While a request runs only
numbers are collected; its spans are made at its end, in a thread of their own.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from attention.trace_context import TraceContext
from router.times import LayerHop

logger = logging.getLogger(__name__)

MAX_DECODE_STEPS = 3
MAX_HOPS = 64
"""Of one sequence: its first step and its first decode steps are traced layer by layer, to the end
of the step that reaches so many hops. A hop is 10 us of spans, a step and any other part 0.1 ms."""
MAX_WAITING = 1024
"""Sequences that have ended and have no spans yet; what ends meanwhile gets none."""
_CLOSE_TIMEOUT_S = 5.0
"""For the spans of sequences that wait for theirs."""
_EXPORT_TIMEOUT_S = 3.0
"""For a collector to take the last ones: one that is away holds no worker's stop up for long."""


class TracedStep(NamedTuple):
    """A step of the engine; several sequences may share it. Times on time.monotonic()."""

    begun_s: float
    ended_s: float
    hops: list[LayerHop]

    @property
    def attributes(self) -> dict[str, str]:
        """What became of each layer's hop, in microseconds: one attribute a layer."""
        return {f"shoal.hop.{hop.layer:03}": self._tell(hop) for hop in self.hops}

    def _tell(self, hop: LayerHop) -> str:
        times = f"at {_us(hop.begun_s - self.begun_s)} took {_us(hop.ended_s - hop.begun_s)} us"
        wait = hop.longest
        if wait is None:
            return times
        return (
            f"{times}: queue {_us(wait.queue_s)} compute {_us(wait.compute_s)}"
            f" wire {_us(wait.wire_s)} of {wait.worker_id}"
        )


@dataclass(slots=True, eq=False)
class SequenceTrace:
    """What becomes the spans of a sequence at one worker. Times are on time.monotonic()."""

    parent: TraceContext
    arrived_s: float
    steps: list[TracedStep] = field(default_factory=list)
    first_step_s: float | None = None
    first_token_s: float | None = None
    ended_s: float = 0.0
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def wants_hops(self, is_decoding: bool) -> bool:
        """Whether its next step is to be traced: one of its prefill, and some behind it."""
        if len(self.steps) > (MAX_DECODE_STEPS if is_decoding else 0):
            return False
        return sum(len(step.hops) for step in self.steps) < MAX_HOPS


class TracesUnavailable(RuntimeError):
    """Traces are asked for and OpenTelemetry is not installed; str() is one line."""


def open_tracer(role: str, worker_id: str) -> Tracer:
    """Spans go where the variables OTEL_* say, by OTLP over HTTP. Raises TracesUnavailable."""
    try:
        sdk = importlib.import_module("opentelemetry.sdk.trace")
        export = importlib.import_module("opentelemetry.sdk.trace.export")
        otlp = importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError as error:
        raise TracesUnavailable(
            f"traces need OpenTelemetry ({error.name}): pip install 'shoal-serve[otel]'"
        ) from error
    provider = sdk.TracerProvider(resource=_resource(role, worker_id))
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return Tracer(provider)


def _resource(role: str, worker_id: str) -> Any:
    """Who says it; the variables have the last word on the service's name."""
    resources = importlib.import_module("opentelemetry.sdk.resources")
    given = {"service.namespace": "shoal", "service.instance.id": worker_id}
    resource = resources.Resource.create(given)
    if resource.attributes["service.name"].startswith("unknown_service"):
        resource = resource.merge(resources.Resource({"service.name": f"shoal-{role}"}))
    return resource


class Tracer:
    """Makes spans with one provider of OpenTelemetry's SDK."""

    def __init__(self, provider: Any) -> None:
        self._api = importlib.import_module("opentelemetry.trace")
        self._no_context = importlib.import_module("opentelemetry.context").Context()
        self._provider = provider
        self._tracer = provider.get_tracer("shoal")
        self.num_dropped = 0
        """Sequences that have no spans, as too many ended at once."""
        self._epoch_ns = 0
        """Of time.monotonic(), as a sequence's spans are made: the wall clock may be set between
        two sequences, the spans of one never run backwards."""
        self._ended: queue.Queue[SequenceTrace | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._write, name="traces", daemon=True)
        self._thread.start()

    def start_request(self, parent: TraceContext | None) -> Any:
        """The span of a request from now on, for its owner to name and end."""
        return self._tracer.start_span(
            "request", context=self._remote(parent), kind=self._api.SpanKind.SERVER
        )

    def context_of(self, span: Any) -> TraceContext | None:
        """None when the SDK is disabled."""
        context = span.get_span_context()
        if not context.is_valid:
            return None
        return TraceContext(
            context.trace_id,
            context.span_id,
            bool(context.trace_flags.sampled),
            context.trace_state.to_header(),
        )

    def fail(self, span: Any, code: str) -> None:
        """A span ends in an error."""
        span.set_attribute("error.type", code)
        span.set_status(self._api.StatusCode.ERROR, code)

    def start_sequence(self, parent: TraceContext | None, arrived_s: float) -> SequenceTrace | None:
        """None for a trace that is not sampled."""
        if parent is None or not parent.is_sampled:
            return None
        return SequenceTrace(parent, arrived_s)

    def end_sequence(self, trace: SequenceTrace) -> None:
        """Have its spans made, or drop it. Returns at once."""
        try:
            self._ended.put_nowait(trace)
        except queue.Full:
            if not self.num_dropped:
                logger.warning("more sequences end than spans can be made of: some are dropped")
            self.num_dropped += 1

    def close(self) -> None:
        """Make and export what is left, of which a collector that is away gets nothing."""
        with contextlib.suppress(queue.Full):
            self._ended.put(None, timeout=_CLOSE_TIMEOUT_S)
            self._thread.join(_CLOSE_TIMEOUT_S)
        if self.num_dropped:
            logger.warning("%d sequences were dropped without spans", self.num_dropped)
        export = threading.Thread(target=self._provider.shutdown, name="last-traces", daemon=True)
        export.start()
        export.join(_EXPORT_TIMEOUT_S)
        if export.is_alive():
            logger.warning("the collector did not take the last spans in %g s", _EXPORT_TIMEOUT_S)

    # --- the thread ---

    def _write(self) -> None:
        while (trace := self._ended.get()) is not None:
            try:
                self._write_sequence(trace)
            except Exception:  # a request must never hear of it
                logger.exception("spans of a sequence were not made")

    def _write_sequence(self, trace: SequenceTrace) -> None:
        self._epoch_ns = time.time_ns() - time.monotonic_ns()
        first_step_s = _or(trace.first_step_s, trace.ended_s)
        first_token_s = _or(trace.first_token_s, trace.ended_s)
        parent = self._remote(trace.parent)
        whole = self._start("sequence", parent, trace.arrived_s, trace.attributes)
        within = self._api.set_span_in_context(whole, self._no_context)
        self._span("queue", within, trace.arrived_s, first_step_s)
        prefill = decode = within
        if trace.first_step_s is not None:
            prefill = self._span("prefill", within, first_step_s, first_token_s)
        if trace.first_token_s is not None:
            decode = self._span("decode", within, first_token_s, trace.ended_s)
        for step in trace.steps:
            parent = prefill if step.begun_s < first_token_s else decode
            self._span("step", parent, step.begun_s, step.ended_s, step.attributes)
        whole.end(self._wall_ns(trace.ended_s))

    def _span(
        self,
        name: str,
        parent: Any,
        begun_s: float,
        ended_s: float,
        attributes: Mapping[str, Any] | None = None,
    ) -> Any:
        """The context for its children."""
        span = self._start(name, parent, begun_s, attributes)
        span.end(self._wall_ns(ended_s))
        return self._api.set_span_in_context(span, self._no_context)

    def _start(
        self, name: str, parent: Any, begun_s: float, attributes: Mapping[str, Any] | None
    ) -> Any:
        begun_ns = self._wall_ns(begun_s)
        return self._tracer.start_span(name, parent, attributes=attributes, start_time=begun_ns)

    def _wall_ns(self, monotonic_s: float) -> int:
        return self._epoch_ns + int(monotonic_s * 1e9)

    def _remote(self, parent: TraceContext | None) -> Any:
        """The context for children of a span in another process; of no parent an empty one, for a
        new trace: never what happens to be current."""
        if parent is None:
            return self._no_context
        remote = self._api.SpanContext(
            parent.trace_id,
            parent.span_id,
            is_remote=True,
            trace_flags=self._api.TraceFlags(int(parent.is_sampled)),
            trace_state=self._api.TraceState.from_header([parent.tracestate]),
        )
        return self._api.set_span_in_context(self._api.NonRecordingSpan(remote), self._no_context)


def _us(time_s: float) -> int:
    return round(time_s * 1e6)


def _or(time_s: float | None, otherwise_s: float) -> float:
    return otherwise_s if time_s is None else time_s
