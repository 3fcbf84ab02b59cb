"""The two headers of a trace: honoured if sound, else ignored."""

from __future__ import annotations

import pytest
from opentelemetry.trace import TraceState

from attention.trace_context import MAX_STATE_CHARS, TraceContext

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


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
    assert context == (int(TRACE, 16), int(SPAN, 16), is_sampled, "")
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


def state_of(tracestate: str) -> str:
    context = TraceContext.parse(PARENT, tracestate)
    assert context is not None and context.traceparent == PARENT
    return context.tracestate


@pytest.mark.parametrize(
    ("came", "goes"),
    [
        ("", ""),
        ("a=1", "a=1"),
        ("congo=t61rcWkgMzE,rojo=00f067aa0ba902b7", "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"),
        (" b=2 ,\ta=1,, ", "b=2,a=1"),
        ("1t@sys=v w!", "1t@sys=v w!"),
        ("a_b-c*d/e=-<>~+", "a_b-c*d/e=-<>~+"),
    ],
)
def test_what_is_sound_goes_on(came: str, goes: str) -> None:
    assert state_of(came) == goes
    assert TraceState.from_header([came]).to_header() == goes


@pytest.mark.parametrize(
    "came", ["a", "a=", "A=1", "1=1", "a=1=2", "a=1,a=2", "a=é", "a=1\nb", "a=1,b", "@a=1", "a b=1"]
)
def test_what_is_malformed_goes_nowhere(came: str) -> None:
    assert state_of(came) == TraceState.from_header([came]).to_header() == ""


def test_it_is_bounded() -> None:
    members = [f"k{number}={'v' * 20}" for number in range(33)]
    assert state_of(",".join(members)) == ""
    kept = state_of(",".join(members[:32])).split(",")
    assert kept == members[: len(kept)] and len(kept) == 20
    assert len(",".join(kept)) <= MAX_STATE_CHARS < len(",".join(members[:21]))
    assert state_of("k=" + "v" * 256 + ",j=" + "v" * 251) == "k=" + "v" * 256 + ",j=" + "v" * 251
    assert state_of("k=" + "v" * 256 + ",j=" + "v" * 252) == "k=" + "v" * 256
    assert state_of("k=" + "v" * 257) == ""


def test_without_a_trace_there_is_no_state() -> None:
    assert TraceContext.parse("", "a=1") is None
