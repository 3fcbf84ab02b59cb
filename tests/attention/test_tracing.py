"""Trace contexts as the W3C has them, and the spans of sequences, kept in memory."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from attention.messages import SamplingParams
from attention.tracing import (
    MAX_DECODE_STEPS,
    MAX_HOPS,
    MAX_WAITING,
    SequenceTrace,
    TraceContext,
    TracedStep,
    Tracer,
)
from router.times import LayerHop
from tests.attention.harness import Answers, Rig, submit

RigOf = Callable[[str], Rig]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HOP = re.compile(r"at (\d+) took (\d+) us: queue (\d+) compute (\d+) wire (\d+) of w0")
PARENT = f"00-{TRACE}-{SPAN}-01"


class Written:
    """A tracer whose spans stay here."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = Tracer(provider)

    def spans(self) -> list[Any]:
        """All there are; no more will come."""
        self.tracer.close()
        return list(self.exporter.get_finished_spans())


@pytest.fixture
def written() -> Iterator[Written]:
    made = Written()
    yield made
    made.tracer.close()


def traced(rig: Rig, tracer: Tracer, *submits: Any, **settings: Any) -> Answers:
    engine = rig.engine(**settings)
    engine._meter._tracer = tracer
    return Answers(engine, submits).run()


def test_the_spans_of_a_sequence(rig: RigOf, written: Written) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    asked = submit("r-0", [20, 21, 22], params, traceparent=PARENT)
    traced(rig("v2-lite"), written.tracer, asked)
    spans = written.spans()
    by_name = {span.name: span for span in spans}
    whole = by_name["sequence"]
    assert whole.context.trace_id == int(TRACE, 16)
    assert whole.parent.span_id == int(SPAN, 16) and whole.parent.is_remote
    assert whole.attributes["shoal.sequence_id"] == "r-0"
    assert whole.attributes["shoal.output_tokens"] == 3
    parts = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert [part.parent.span_id for part in parts] == [whole.context.span_id] * 3
    edges = [whole.start_time, *(part.end_time for part in parts)]
    assert edges == sorted(edges) and edges[-1] == whole.end_time
    assert [part.start_time for part in parts] == edges[:3], "one after the other, without gaps"
    steps = [span for span in spans if span.name == "step"]
    parents = [span.parent.span_id for span in steps]
    assert parents == [by_name[name].context.span_id for name in ("prefill", "decode", "decode")]
    for step in steps:
        check_hops(step, rig("v2-lite").config.moe_layers)


def check_hops(step: Any, layers: Any) -> None:
    """A step tells of each layer when its hop began and where its time went."""
    assert list(step.attributes) == [f"shoal.hop.{layer:03}" for layer in layers]
    ended_us = 0
    for text in step.attributes.values():
        found = HOP.fullmatch(text)
        assert found is not None, text
        at_us, took_us, *parts_us = map(int, found.groups())
        assert at_us >= ended_us, "one after the other"
        assert 0 < sum(parts_us) <= took_us + 2, "each is rounded"
        ended_us = at_us + took_us - 1
    assert ended_us <= (step.end_time - step.start_time) / 1e3


def test_one_prefill_and_some_decode_steps_are_traced(rig: RigOf, written: Written) -> None:
    """A prompt of 12 tokens in chunks of 4, then 9 decode steps."""
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    asked = submit("r-0", list(range(20, 32)), params, traceparent=PARENT)
    traced(rig("v2-lite"), written.tracer, asked, max_num_batched_tokens=4, max_num_seqs=2)
    by_parent = Counter(span.parent.span_id for span in written.spans() if span.name == "step")
    assert sorted(by_parent.values()) == [1, MAX_DECODE_STEPS]


def test_hops_are_logged_for_the_steps_that_are_traced_and_no_other(
    rig: RigOf, written: Written
) -> None:
    """Of 10 steps one prefill and MAX_DECODE_STEPS, each layer of which is a LayerHop."""
    moe = rig("v2-lite").pool.router()
    logged: list[Any] = []
    log_hops = moe.log_hops

    def count(log: Any) -> None:
        logged.append(log)
        log_hops(log)

    moe.log_hops = count  # type: ignore[method-assign]
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    traced(rig("v2-lite"), written.tracer, submit("r-0", [20], params, traceparent=PARENT), moe=moe)
    logs = [log for log in logged if log is not None]
    assert len(logs) == logged.count(None) == 1 + MAX_DECODE_STEPS
    assert {len(log) for log in logs} == {len(rig("v2-lite").config.moe_layers)}


def test_hops_of_a_sequence_are_bounded() -> None:
    """Of DeepSeek-V3, which has 58 MoE layers, a prefill step and a decode step."""
    context = TraceContext.parse(PARENT)
    assert context is not None
    trace = SequenceTrace(context, 0.0)
    hop = LayerHop(3, 0.0, 0.1, None)
    wanted = []
    for is_decoding in (False, True, True):
        wanted.append(trace.wants_hops(is_decoding))
        trace.steps.append(TracedStep(0.0, 1.0, [hop] * 58))
    assert wanted == [True, True, False]
    assert 58 < MAX_HOPS < 116


def test_a_layer_in_pieces_is_one_hop(rig: RigOf, written: Written) -> None:
    """Seven rows that go to the experts two at a time."""
    moe = rig("v2-lite").pool.router(max_batch_rows=2)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    asked = submit("r-0", list(range(20, 27)), params, traceparent=PARENT)
    traced(rig("v2-lite"), written.tracer, asked, moe=moe)
    (step,) = (span for span in written.spans() if span.name == "step")
    check_hops(step, rig("v2-lite").config.moe_layers)


def test_a_hop_that_nobody_answered() -> None:
    step = TracedStep(1.0, 2.0, [LayerHop(3, 1.25, 1.5, None)])
    assert step.attributes == {"shoal.hop.003": "at 250000 took 250000 us"}


def test_what_ends_too_fast_is_dropped_and_told_once(
    written: Written, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread is held up by one sequence while many more end than may wait."""
    tracer, goes_on, began = written.tracer, threading.Event(), threading.Event()
    write = tracer._write_sequence

    def slow(trace: SequenceTrace) -> None:
        began.set()
        assert goes_on.wait(60)
        write(trace)

    monkeypatch.setattr(tracer, "_write_sequence", slow)
    for i in range(1 + MAX_WAITING + 7):
        trace = tracer.start_sequence(TraceContext.parse(PARENT), 0.0)
        assert trace is not None
        tracer.end_sequence(trace)
        if i == 0:
            assert began.wait(60)
    assert tracer.num_dropped == 7
    assert len(caplog.messages) == 1
    goes_on.set()
    num_spans = len(written.spans())
    assert num_spans == 2 * (1 + MAX_WAITING), "a sequence and its queue"
    assert caplog.messages[-1] == "7 sequences were dropped without spans"


def test_a_collector_that_is_away_does_not_hold_up_a_stop(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Away(SpanProcessor):
        has_answered = threading.Event()
        is_waiting = False

        def shutdown(self) -> None:
            self.is_waiting = True
            self.is_waiting = self.has_answered.wait(60)

    monkeypatch.setattr("attention.tracing._EXPORT_TIMEOUT_S", 0.05)
    provider, away = TracerProvider(shutdown_on_exit=False), Away()
    provider.add_span_processor(away)
    Tracer(provider).close()
    assert away.is_waiting
    assert caplog.messages == ["the collector did not take the last spans in 0.05 s"]
    away.has_answered.set()


def test_spans_follow_a_wall_clock_that_was_set(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an hour, while the server ran: a sequence's spans are to lie within its request's, which
    has the clock of now."""
    hour_ns = 3600 * 10**9

    def time_ns() -> int:
        return time.time_ns() + hour_ns

    clock = SimpleNamespace(time_ns=time_ns, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr("attention.tracing.time", clock)
    begun_ns = time_ns()
    trace = written.tracer.start_sequence(TraceContext.parse(PARENT), time.monotonic())
    assert trace is not None
    trace.ended_s = time.monotonic()
    written.tracer.end_sequence(trace)
    queue, sequence = written.spans()
    slack_ns = 60 * 10**9  # two clocks are read one after the other
    assert begun_ns - slack_ns <= sequence.start_time <= queue.end_time <= time_ns() + slack_ns


def test_only_sampled_traces_are_written(rig: RigOf, written: Written) -> None:
    asked = [submit("a", [20], traceparent=f"00-{TRACE}-{SPAN}-00"), submit("b", [21])]
    answers = traced(rig("v2-lite"), written.tracer, *asked)
    assert written.spans() == []
    plain = Answers(rig("v2-lite").engine(), asked).run()
    assert answers.all_tokens() == plain.all_tokens()


def test_traces_change_no_token(rig: RigOf, written: Written) -> None:
    asked = [submit("a", [20], traceparent=PARENT), submit("b", [21], traceparent=PARENT)]
    answers = traced(rig("v2-lite"), written.tracer, *asked)
    assert answers.all_tokens() == Answers(rig("v2-lite").engine(), asked).run().all_tokens()
    assert sum(span.name == "sequence" for span in written.spans()) == 2


def test_a_sequence_that_never_ran_has_waited(rig: RigOf, written: Written) -> None:
    engine = rig("v2-lite").engine()
    engine._meter._tracer = written.tracer
    engine.add(submit("a", [20], traceparent=PARENT))
    engine.abort("a")
    assert [span.name for span in written.spans()] == ["queue", "sequence"]


def test_nothing_is_imported_while_traces_are_off() -> None:
    code = (
        "import sys, attention.worker, cluster.frontend.service\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert found.stdout == "[]\n"
