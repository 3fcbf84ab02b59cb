"""What a load generator saw: streams as they arrived, and the figures and faults in them. Pure.

All times are of `time.monotonic()`, which the processes of one machine share.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GOOD_ENDS = ["length", "done"]
"""How a good stream ends: its finish reason, then [DONE] (HTTP) or status OK (gRPC)."""


@dataclass
class Stream:
    """One request and all that came back."""

    request: int
    """Index in the pool of requests."""
    protocol: str
    """"sse" or "grpc"."""
    started_s: float
    arrivals: list[tuple[float, list[int]]] = field(default_factory=list)
    """Moments at which tokens came, and their ids."""
    ends: list[str] = field(default_factory=list)
    """Everything that says the stream is over, in the order it came."""
    usage: tuple[int, int] | None = None
    """Prompt and completion tokens, as the server counts them."""
    error: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token for _, ids in self.arrivals for token in ids]

    def gaps(self) -> Iterable[tuple[float, float]]:
        """Beginning and end of each wait between two arrivals."""
        times = [when for when, _ in self.arrivals]
        return zip(times, times[1:], strict=False)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stream:
        arrivals = [(when, ids) for when, ids in data["arrivals"]]
        usage = tuple(data["usage"]) if data["usage"] else None
        return cls(**{**data, "arrivals": arrivals, "usage": usage})


@dataclass(frozen=True)
class Expected:
    """What a request of the pool must give."""

    num_prompt_tokens: int
    ids: list[int]


def fault_of(stream: Stream, expected: Expected) -> str | None:
    """What is wrong with a finished stream, in a few words; None: nothing."""
    if stream.error is not None:
        return f"failed: {stream.error}"
    if stream.ends != GOOD_ENDS:
        return f"ended by {stream.ends}, not {GOOD_ENDS}"
    got, want = stream.ids, expected.ids
    if got != want:
        same = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        where = f"token {same} differs" if same is not None else "the ids are right otherwise"
        return f"{len(got)} tokens of {len(want)}: {where}"
    if stream.usage != (expected.num_prompt_tokens, len(want)):
        return f"usage {stream.usage}, not {(expected.num_prompt_tokens, len(want))}"
    return None


def faults(streams: Iterable[Stream], expected: Sequence[Expected]) -> list[str]:
    """One line a faulty stream."""
    found = ((stream, fault_of(stream, expected[stream.request])) for stream in streams)
    return [f"{s.protocol} stream of request {s.request}: {fault}" for s, fault in found if fault]


def tokens_per_s(streams: Iterable[Stream], begin_s: float, end_s: float) -> float:
    """Tokens that came in [begin_s, end_s), all streams together."""
    count = sum(
        len(ids) for stream in streams for when, ids in stream.arrivals if begin_s <= when < end_s
    )
    return count / (end_s - begin_s)


def gaps_within_s(streams: Iterable[Stream], begin_s: float, end_s: float) -> list[float]:
    """All waits between two arrivals of a stream that lie within [begin_s, end_s], sorted."""
    return sorted(
        later - earlier
        for stream in streams
        for earlier, later in stream.gaps()
        if begin_s <= earlier and later <= end_s
    )


def time_per_token_s(streams: Iterable[Stream], begin_s: float, end_s: float) -> float:
    """Median over the streams of the mean time between tokens within [begin_s, end_s]; NaN of none.

    Not the median of all gaps: a loaded proxy hands on two tokens at once, and half of the gaps are
    nothing then.
    """
    found = []
    for stream in streams:
        inside = [(when, len(ids)) for when, ids in stream.arrivals if begin_s <= when <= end_s]
        if len(inside) > 1:
            later_tokens = sum(count for _, count in inside[1:])
            found.append((inside[-1][0] - inside[0][0]) / later_tokens)
    return quantile(sorted(found), 0.5)


def largest_gaps_s(streams: Iterable[Stream], begin_s: float, end_s: float) -> list[float]:
    """Of each stream the longest wait between two arrivals that overlaps [begin_s, end_s], sorted.

    A stream that got nothing before `begin_s` or nothing after it had no gap there and is left out.
    """
    return sorted(
        max(gaps)
        for stream in streams
        if (gaps := [b - a for a, b in stream.gaps() if a < end_s and b > begin_s])
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of the sorted `values` do not exceed; NaN of none."""
    if not values:
        return math.nan
    return values[min(len(values) - 1, int(share * len(values)))]
