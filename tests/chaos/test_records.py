"""Figures and faults of hand-made streams."""

from __future__ import annotations

import math

import pytest

from tests.chaos.records import (
    Expected,
    Stream,
    fault_of,
    faults,
    gaps_within_s,
    largest_gaps_s,
    quantile,
    time_per_token_s,
    tokens_per_s,
)

WANT = Expected(num_prompt_tokens=5, ids=[7, 8, 9])


def stream(*times_s: float, ids: list[int] | None = None, **more: object) -> Stream:
    """One token at each moment, by default those that are wanted, with a good end."""
    tokens = ids if ids is not None else [7, 8, 9][: len(times_s)]
    settings: dict[str, object] = {"ends": ["length", "done"], "usage": (5, 3), **more}
    arrivals = [(when, [token]) for when, token in zip(times_s, tokens, strict=True)]
    return Stream(0, "sse", 0.0, arrivals, **settings)  # type: ignore[arg-type]


def test_a_good_stream_has_no_fault() -> None:
    assert fault_of(stream(1, 2, 3), WANT) is None


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (stream(1, 2), "2 tokens of 3"),  # lost
        (stream(1, 2, 3, 4, ids=[7, 8, 8, 9]), "token 2 differs"),  # doubled
        (stream(1, 2, 3, ids=[7, 6, 9]), "token 1 differs"),
        (stream(1, 2, 3, ends=["length"]), "ended by"),
        (stream(1, 2, 3, ends=["length", "length", "done"]), "ended by"),
        (stream(1, 2, 3, ends=["length", "done", "error"]), "ended by"),
        (stream(1, 2, 3, usage=(5, 4)), "usage"),
        (stream(1, 2, 3, usage=None), "usage"),
        (stream(1, 2, 3, error="refused"), "refused"),
    ],
)
def test_every_fault_is_seen(faulty: Stream, words: str) -> None:
    assert words in (fault_of(faulty, WANT) or "")
    assert len(faults([stream(1, 2, 3), faulty], [WANT])) == 1


def test_records_survive_json() -> None:
    one = stream(1, 2, 3)
    assert Stream.from_json(one.as_json()) == one


def test_throughput_counts_tokens_of_the_window() -> None:
    assert tokens_per_s([stream(0, 1, 2), stream(1, 2, 3)], 1, 3) == 4 / 2


def test_gaps_within_a_window_reach_nowhere_else() -> None:
    assert gaps_within_s([stream(0, 1, 3), stream(2, 3, 9)], 0, 5) == [1, 1, 2]
    assert gaps_within_s([stream(0, 9)], 0, 5) == []


def test_time_per_token_is_of_the_median_stream() -> None:
    # Within 0..5 s: 3 s for 2 tokens, 1 s for 1; of the third stream only one arrival counts.
    streams = [stream(0, 1, 3), stream(2, 3, 9), stream(4, 6, 7)]
    assert time_per_token_s(streams, 0, 5) == 1.5
    assert math.isnan(time_per_token_s([stream(0, 9)], 0, 5))


def test_the_gap_is_the_longest_that_overlaps_the_window() -> None:
    before, across, around = stream(0, 1, 2), stream(0, 4.5, 5), stream(1, 20)
    assert largest_gaps_s([before, across, around], 4, 6) == [4.5, 19]


def test_quantile() -> None:
    assert quantile([1, 2, 3, 4], 0.5) == 3 and quantile([1, 2, 3, 4], 0.99) == 4
    assert math.isnan(quantile([], 0.5))
