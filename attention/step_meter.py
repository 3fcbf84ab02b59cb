"""What a step takes is booked on its requests; hops are noted for those that are traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from attention.metrics import STEP_BOUNDS_S
from attention.request import Request
from attention.scheduler import Schedule
from attention.trace_context import TraceContext
from attention.tracing import SequenceTrace, TracedStep, Tracer
from experts.metrics import Histogram
from router.times import HopTimes, LayerHop


class HopSource(Protocol):
    """What the meter reads of a MoE client. See router.client.MoeClient."""

    @property
    def hop_times(self) -> HopTimes: ...

    def log_hops(self, log: list[LayerHop] | None) -> None: ...


class StepMeter:
    """Belongs to the engine's thread."""

    def __init__(self, moe: HopSource, clock: Callable[[], float], tracer: Tracer | None) -> None:
        """moe: the client that the steps use. tracer: None without traces."""
        self.step_times = Histogram(STEP_BOUNDS_S)
        self.now_s = 0.0
        """When the last step had been computed."""
        self._moe = moe
        self._clock = clock
        self._tracer = tracer
        self._num_traced = 0  # open requests with a trace
        self._times = moe.hop_times  # as the last step ended: nobody else uses the client
        self._traces: list[SequenceTrace] = []  # that want the hops of this step
        self._log: list[LayerHop] = []

    def arrived(self, request: Request) -> None:
        """A request that can run; `left` follows."""
        submit = request.submit
        if self._tracer is not None and submit.traceparent:
            parent = TraceContext.parse(submit.traceparent, submit.tracestate)
            request.trace = self._tracer.start_sequence(parent, request.arrived_s)
            self._num_traced += request.trace is not None

    def begin_step(self, schedule: Schedule) -> None:
        """`end_step` follows, whether the step succeeds or fails."""
        self._traces = self._wanting_hops(schedule) if self._num_traced else []
        if self._traces:
            self._log = []
            self._moe.log_hops(self._log)

    def end_step(self, schedule: Schedule, start_s: float) -> None:
        """Book what it took."""
        self.now_s = self._clock()
        self.step_times.observe(self.now_s - start_s)
        self._book(schedule, start_s)
        if self._traces:
            self._moe.log_hops(None)
            step = TracedStep(start_s, self.now_s, self._log)
            for trace in self._traces:
                trace.steps.append(step)

    def _wanting_hops(self, schedule: Schedule) -> list[SequenceTrace]:
        return [
            request.trace
            for request in (item.request for item in schedule.items)
            if request.trace is not None
            and request.trace.wants_hops(is_decoding=request.first_token_s is not None)
        ]

    def _book(self, schedule: Schedule, start_s: float) -> None:
        """Every request waited for the whole step and its hops, and pays for its own tokens."""
        before, after = self._times, self._moe.hop_times
        self._times = after
        step_s = self.now_s - start_s
        hop_s = after.hop_s - before.hop_s
        expert_s = (after.expert_s - before.expert_s) / schedule.num_tokens
        for item in schedule.items:
            request = item.request
            if request.first_step_s is None:
                request.first_step_s = start_s
            request.step_s += step_s
            request.hop_s += hop_s
            request.expert_s += expert_s * item.num_tokens

    def left(self, request: Request) -> None:
        """A request has ended, in whatever way."""
        trace, request.trace = request.trace, None
        if trace is None or self._tracer is None:
            return
        self._num_traced -= 1
        trace.first_step_s, trace.first_token_s = request.first_step_s, request.first_token_s
        trace.ended_s = self._clock()
        trace.attributes = {
            "shoal.sequence_id": request.request_id,
            "shoal.prompt_tokens": request.num_prompt_tokens,
            "shoal.cached_tokens": request.num_cached_tokens,
            "shoal.output_tokens": request.num_output_tokens,
            "shoal.replayed_tokens": len(request.submit.emitted_ids),
            "shoal.preemptions": request.num_preemptions,
            "shoal.step_ms": 1e3 * request.step_s,
            "shoal.hop_ms": 1e3 * request.hop_s,
            "shoal.expert_ms": 1e3 * request.expert_s,
        }
        self._tracer.end_sequence(trace)
