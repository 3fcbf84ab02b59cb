"""Chosen tokens against exact enumeration; every parameter; independence of the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.messages import SamplingParams
from attention.sampler import (
    NOT_FINITE,
    SampleRow,
    TokenCounts,
    adjusted,
    distribution,
    draw,
    largest,
    sample,
    token_logprob,
    uniform,
)

LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.5], np.float32)


def row(
    position: int = 0,
    counts: TokenCounts | None = None,
    end_ids: tuple[int, ...] = (),
    **params: Any,
) -> SampleRow:
    return SampleRow(SamplingParams(**params), position, counts, end_ids)


def choose(logits: Any = LOGITS, **arguments: Any) -> int:
    return sample(np.asarray(logits, np.float32)[None], [row(**arguments)])[0].token_id


def shares(**params: Any) -> dict[int, float]:
    """The exact distribution after all filters."""
    ids, weights = distribution(LOGITS.astype(np.float64), SamplingParams(**params))
    places = range(len(weights)) if ids is None else ids.tolist()
    found = dict(zip(places, (weights / weights.sum()).tolist(), strict=True))
    return {token: share for token, share in found.items() if share}


def softmax(x: Any) -> np.ndarray:
    e = np.exp(np.asarray(x, np.float64) - np.max(x))
    return e / e.sum()


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    assert choose(temperature=0) == 1


def test_temperature_alone_is_the_softmax() -> None:
    expected = softmax(LOGITS / 0.5)
    assert shares(temperature=0.5) == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-9, 1e9])
def test_extreme_temperatures(temperature: float) -> None:
    found = shares(temperature=temperature)
    if temperature < 1:
        assert found == {1: 0.5, 3: 0.5}
    else:
        assert found == pytest.approx(dict.fromkeys(range(6), 1 / 6), rel=1e-6)


def test_top_k_keeps_the_lowest_ids_of_equals() -> None:
    assert shares(top_k=1) == {1: 1.0}
    assert set(shares(top_k=2)) == {1, 3}
    assert set(shares(top_k=3)) == {1, 2, 3}
    assert set(shares(top_k=0)) == set(shares(top_k=-1)) == set(shares(top_k=99)) == set(range(6))


def test_top_p_keeps_the_shortest_run_that_reaches_it() -> None:
    p = softmax(LOGITS)  # 0.397 (twice), 0.146, 0.054, 0.033, 0.007
    assert set(shares(top_p=p[1] * 0.99)) == {1}
    assert set(shares(top_p=p[1] * 1.01)) == {1, 3}
    assert set(shares(top_p=p[1] * 2 + p[2] * 0.9)) == {1, 2, 3}
    assert set(shares(top_p=0.9999999)) == set(range(6))


def test_top_p_looks_at_what_top_k_and_min_p_leave() -> None:
    third = math.exp(-1) / (2 + math.exp(-1))  # share of id 2 among the first three
    assert set(shares(top_k=3, top_p=1 - third * 1.01)) == {1, 3}
    assert set(shares(top_k=3, top_p=1 - third * 0.99)) == {1, 2, 3}
    assert set(shares(min_p=0.3)) == {1, 2, 3}
    assert set(shares(min_p=1.0)) == {1, 3}


def test_a_large_nucleus_is_found_too() -> None:
    logits = np.zeros(5000)
    ids, _ = distribution(logits, SamplingParams(top_p=0.5))
    assert ids is not None
    assert ids.tolist() == list(range(2500))


def test_a_number_that_rounds_to_the_sum_takes_the_last_weight_above_zero() -> None:
    weights = np.array([0.5, 0.25, 0.0, 0.0])
    assert draw(None, weights, 1.0) == 1


def test_inverse_cdf_cuts_the_unit_interval_in_order_of_id() -> None:
    ids, weights = np.array([2, 5, 9]), np.array([1.0, 2.0, 1.0])
    cuts = [(0.0, 2), (0.2499, 2), (0.25, 5), (0.7499, 5), (0.75, 9), (1 - 2**-53, 9)]
    assert [draw(ids, weights, u) for u, _ in cuts] == [token for _, token in cuts]


def test_drawn_tokens_follow_the_distribution() -> None:
    params = {"temperature": 0.8, "top_k": 4, "seed": 11}
    count = 4000
    drawn = [choose(position=i, **params) for i in range(count)]
    expected = {token: share for token, share in shares(temperature=0.8, top_k=4).items()}
    assert set(drawn) <= set(expected)
    # Pearson's statistic with 3 degrees of freedom: 16.3 is passed once in a thousand seeds
    statistic = sum(
        (drawn.count(token) - count * share) ** 2 / (count * share)
        for token, share in expected.items()
    )
    assert statistic < 16.3


def test_uniform_numbers_are_philox_by_seed_and_position() -> None:
    words = np.random.Philox(key=7, counter=16).random_raw(64)
    assert uniform(7, 64 + 5) == (int(words[5]) >> 11) * 2.0**-53
    numbers = [uniform(seed, position) for seed in (-1, 0, 2**63) for position in range(200)]
    assert len(set(numbers)) == 600
    assert 0 <= min(numbers) < 0.02 < 0.98 < max(numbers) < 1


def test_presence_and_frequency_count_the_output_only() -> None:
    counts = TokenCounts([1, 2], [3, 3, 0])
    x = adjusted(LOGITS, row(counts=counts, presence_penalty=1.0, frequency_penalty=0.5))
    assert x.tolist() == [1.0 - 1.5, 3.0, 2.0, 3.0 - 2.0, -1.0, 0.5]


def test_repetition_counts_prompt_and_output() -> None:
    counts = TokenCounts([1, 4], [0])
    x = adjusted(LOGITS, row(counts=counts, repetition_penalty=2.0))
    assert x.tolist() == [0.5, 1.5, 2.0, 3.0, -2.0, 0.5]


def test_counts_are_kept_only_for_penalties() -> None:
    assert not TokenCounts.needed(SamplingParams(temperature=0.3, top_p=0.5))
    for name, value in (("presence", 0.1), ("frequency", -0.1), ("repetition", 1.1)):
        assert TokenCounts.needed(SamplingParams(**{f"{name}_penalty": value}))


def test_bias_and_allowed_ids() -> None:
    assert choose(temperature=0, logit_bias={4: 100.0}) == 4
    assert choose(temperature=0, logit_bias={1: -100.0}) == 3
    assert choose(temperature=0, allowed_token_ids=(0, 5)) == 0
    assert choose(temperature=0, allowed_token_ids=(0, 5), logit_bias={4: 100.0}) == 0
    assert {choose(allowed_token_ids=(0, 5), seed=s) for s in range(50)} == {0, 5}


def test_min_tokens_masks_the_ends_until_then() -> None:
    ends = {"end_ids": (1, 3), "min_tokens": 2, "temperature": 0}
    assert [choose(position=p, **ends) for p in (0, 1)] == [2, 2]
    assert choose(position=2, min_tokens=2, temperature=0) == 1
    assert {choose(position=0, end_ids=(1, 3), min_tokens=1, seed=s) for s in range(50)} <= {
        0,
        2,
        4,
        5,
    }


def test_min_tokens_gives_way_when_nothing_but_an_end_is_allowed() -> None:
    assert choose(temperature=0, end_ids=(3,), min_tokens=5, allowed_token_ids=(3,)) == 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    params = {"temperature": 0.1, "top_k": 1, "logit_bias": {5: 50.0}, "logprobs": 3}
    chosen = sample(LOGITS[None], [row(**params)])[0]
    raw = np.log(softmax(LOGITS))
    assert chosen.token_id == 5
    assert chosen.logprob is not None
    assert chosen.logprob.logprob == pytest.approx(raw[5])
    assert chosen.logprob.top == [
        (1, pytest.approx(raw[1])),
        (3, pytest.approx(raw[3])),
        (2, pytest.approx(raw[2])),
    ]


def test_logprobs_zero_gives_the_chosen_one_only() -> None:
    found = token_logprob(LOGITS, 4, 0)
    assert (found.token_id, found.top) == (4, [])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_are_told_apart(bad: float) -> None:
    logits = np.stack([LOGITS, np.where(np.arange(6) == 2, bad, LOGITS)]).astype(np.float32)
    rows = [row(temperature=0), row(temperature=1.0, seed=1)]
    assert [s.token_id for s in sample(logits, rows)] == [1, NOT_FINITE]


def test_minus_infinity_is_only_impossible() -> None:
    assert choose([-np.inf, 1.0, -np.inf], seed=3) == 1


@settings(deadline=None)  # machines are shared
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.5, -2.0]), min_size=1, max_size=30), st.integers(1, 30)
)
def test_largest_is_a_stable_sort(values: list[float], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert largest(np.array(values), count).tolist() == expected


@settings(deadline=None)  # machines are shared
@given(st.data())
def test_a_row_does_not_depend_on_its_batch(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    logits = rng.normal(size=(5, 300)).astype(np.float32)
    rows = [
        row(
            position=data.draw(st.integers(0, 99)),
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0])),
            top_p=data.draw(st.sampled_from([0.5, 1.0])),
            top_k=data.draw(st.sampled_from([-1, 10])),
            seed=index,
        )
        for index in range(5)
    ]
    together = sample(logits, rows)
    assert together == [sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(5)]
