"""Counters become rates, and settings refuse what would make the pool flap."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from pydantic import ValidationError

from attention.messages import Stats
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.autoscaling.stats import (
    MAX_KEYS,
    AttentionMeter,
    AttentionStats,
    ExpertMeter,
    ExpertStats,
    quantile_us,
    read_stats,
)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Counters:
    busy_s: float = 0.0
    pairs: int = 0
    queue_us_buckets: list[int] = field(default_factory=lambda: [0] * 33)


def engine(**changes: Any) -> Stats:
    """100 blocks of 16 tokens, 30 of them free."""
    values = dict(num_running=3, num_waiting=2, num_waiting_tokens=50, kv_blocks_total=100)
    values |= dict(kv_blocks_free=30, kv_blocks_cached=10, block_size=16, max_model_len=64)
    return Stats(**{**values, **changes})


def test_rates_are_those_since_the_last_reading() -> None:
    clock, counters = Clock(), Counters(busy_s=7.0, pairs=900)
    meter = ExpertMeter(counters, num_slots=8, num_experts=16, clock=clock)
    counters.busy_s, counters.pairs = 7.5, 1400
    counters.queue_us_buckets[11] = 10
    clock.now_s += 2
    first = meter.read(num_held=6)
    assert (first.busy_fraction, first.rows_per_s) == (0.25, 250)
    assert first.queue_p95_ms == pytest.approx(1.9968)  # 1024 us x 1.95
    assert (first.num_held, first.num_slots, first.num_experts) == (6, 8, 16)
    clock.now_s += 1
    idle = meter.read(num_held=6)
    assert (idle.busy_fraction, idle.rows_per_s, idle.queue_p95_ms) == (0, 0, 0)


def test_a_drained_worker_has_no_slots() -> None:
    clock = Clock()
    meter = ExpertMeter(Counters(), num_slots=8, num_experts=16, clock=clock)
    clock.now_s += 1
    assert meter.read(num_held=3, is_drained=True).is_drained
    clock.now_s += 1
    again = meter.read(num_held=3)
    assert (again.num_slots, again.is_drained) == (8, False)


def test_a_batch_longer_than_the_interval_is_no_more_than_busy() -> None:
    clock, counters = Clock(), Counters()
    meter = ExpertMeter(counters, 8, 16, clock)
    counters.busy_s = 3.0
    clock.now_s += 1
    assert meter.read(8).busy_fraction == 1


def test_two_readings_at_once_are_the_same() -> None:
    clock, counters = Clock(), Counters()
    meter = ExpertMeter(counters, 8, 16, clock)
    clock.now_s += 1
    counters.rows = 500
    assert meter.read(8) == meter.read(8)


def test_attention_rates() -> None:
    clock = Clock()
    meter = AttentionMeter(clock)
    clock.now_s += 2
    stats = meter.read(engine(prompt_tokens=60, generated_tokens=40))
    assert stats.kv_use_fraction == 0.7
    assert (stats.kv_capacity_tokens, stats.waiting_tokens, stats.tokens_per_s) == (1600, 50, 50)
    assert (stats.running_requests, stats.waiting_requests) == (3, 2)
    clock.now_s += 1
    assert meter.read(engine(prompt_tokens=60, generated_tokens=70)).tokens_per_s == 30


@pytest.mark.parametrize(
    ("buckets", "expected_us"),
    [
        ({}, 0),
        ({0: 5}, 0),
        ({0: 90, 11: 10}, 1536),  # the 95th of 100 is the middle one of those in [1024, 2048)
        ({4: 20}, 8 * 1.95),
        ({0: 1, 32: 99}, 2**31 * (1 + 94 / 99)),
    ],
)
def test_quantile_of_counts_by_bit_length(buckets: dict[int, int], expected_us: float) -> None:
    assert quantile_us([buckets.get(b, 0) for b in range(33)], 0.95) == pytest.approx(expected_us)


@pytest.mark.parametrize("kind", [ExpertStats, AttentionStats])
def test_serve_gets_few_builtin_floats(kind: type[ExpertStats] | type[AttentionStats]) -> None:
    stats = kind.model_validate(dict.fromkeys(kind.model_fields, 1))
    metrics = stats.as_metrics()
    assert len(metrics) <= MAX_KEYS
    assert {type(value) for value in metrics.values()} == {float}
    assert read_stats(kind, {**metrics, "ray_adds_this": 3.0}) == stats


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (ExpertScaling, {"min_workers": 4, "max_workers": 2}, "max_workers = 2 is less than"),
        (ExpertScaling, {"downscale_busy": 0.7}, "downscale_busy = 0.7 is not below target_busy"),
        (AttentionScaling, {"target_kv_use": 0.4}, "lower downscale_kv_use"),
        (ExpertScaling, {"window_s": 1}, "window_s = 1.0 does not exceed report_every_s = 1.0"),
        (ExpertScaling, {"max_age_s": 1}, "raise max_age_s"),
        (ExpertScaling, {"target_busy": 1.5}, "less than or equal to 1"),
        (ExpertScaling, {"upscale_delay_s": float("nan")}, "finite"),
        (ExpertScaling, {"target_bussy": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    kind: type[Scaling], values: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        kind.model_validate(values)
