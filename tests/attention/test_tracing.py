"""Trace contexts as the W3C has them, and the spans of sequences, kept in memory."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from attention.messages import SamplingParams
from attention.tracing import MAX_HOP_SPANS, TraceContext, Tracer
from tests.attention.harness import Answers, Rig, submit

RigOf = Callable[[str], Rig]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
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


@pytest.mark.parametrize(
    ("traceparent", "is_sampled"),
    [
        (PARENT, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01", True),  # a version to come
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_contexts_that_are_honoured(traceparent: str, is_sampled: bool) -> None:
    context = TraceContext.parse(traceparent)
    assert context == (int(TRACE, 16), int(SPAN, 16), is_sampled)
    assert context is not None
    assert TraceContext.parse(context.traceparent) == context


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01-",
        f"ff-{TRACE}-{SPAN}-01",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f" {PARENT}",
        f"{PARENT}\n",
        f"0٠-{TRACE}-{SPAN}-01",
    ],
)
def test_contexts_that_are_ignored(traceparent: str) -> None:
    assert TraceContext.parse(traceparent) is None


def traced(rig: Rig, tracer: Tracer, *submits: Any, **settings: Any) -> Answers:
    engine = rig.engine(**settings)
    engine._meter._tracer = tracer
    return Answers(engine, submits).run()


def test_the_spans_of_a_sequence(rig: RigOf, written: Written) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    asked = submit("r-0", [20, 21, 22], params, traceparent=PARENT)
    traced(rig("v2lite"), written.tracer, asked)
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
    layers = rig("v2lite").config.moe_layers
    hops = [span for span in spans if span.name.startswith("hop")]
    parents = Counter(span.parent.span_id for span in hops)
    assert parents == {
        by_name["prefill"].context.span_id: len(layers),
        by_name["decode"].context.span_id: 2 * len(layers),
    }
    assert {span.attributes["shoal.layer"] for span in hops} == set(layers)
    for hop in hops:
        told = [hop.attributes[f"shoal.hop.{part}_ms"] for part in ("queue", "compute", "wire")]
        assert min(told) >= 0 and 0 < sum(told) <= (hop.end_time - hop.start_time) / 1e6
        assert hop.attributes["shoal.worker_id"] == "w0"


def test_hops_of_a_sequence_are_bounded(rig: RigOf, written: Written) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    traced(rig("v2lite"), written.tracer, submit("r-0", [20], params, traceparent=PARENT))
    num_hops = sum(span.name.startswith("hop") for span in written.spans())
    num_layers = len(rig("v2lite").config.moe_layers)
    assert MAX_HOP_SPANS <= num_hops < MAX_HOP_SPANS + num_layers < 100 * num_layers


def test_only_sampled_traces_are_written(rig: RigOf, written: Written) -> None:
    asked = [submit("a", [20], traceparent=f"00-{TRACE}-{SPAN}-00"), submit("b", [21])]
    answers = traced(rig("v2lite"), written.tracer, *asked)
    assert written.spans() == []
    plain = Answers(rig("v2lite").engine(), asked).run()
    assert answers.all_tokens() == plain.all_tokens()


def test_traces_change_no_token(rig: RigOf, written: Written) -> None:
    asked = [submit("a", [20], traceparent=PARENT), submit("b", [21], traceparent=PARENT)]
    answers = traced(rig("v2lite"), written.tracer, *asked)
    assert answers.all_tokens() == Answers(rig("v2lite").engine(), asked).run().all_tokens()
    assert sum(span.name == "sequence" for span in written.spans()) == 2


def test_a_sequence_that_never_ran_has_waited(rig: RigOf, written: Written) -> None:
    engine = rig("v2lite").engine()
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
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout == "[]\n"
