import math
from random import Random

import pytest
from autoscale.figures import Answer, Bounds, device_seconds, summarise, windows
from autoscale.provisioning import ALL, COPY, Fleet
from autoscale.replay import NOT_ANSWERED, replay
from autoscale.trace import (
    AFTERNOON,
    LOAD,
    MORNING,
    Day,
    Draw,
    Item,
    Request,
    between,
    busiest_tokens_per_s,
    make_trace,
)
from autoscale.watch import Sample
from serving.drive import OnTokens
from serving.summary import RequestRecord

from cluster.config import parse_config

LONG_DAY = Day(peak_tokens_per_s=1000.0, day_s=2400.0)
FLEET = Fleet("model", 96, 8, num_devices=12, pairs_per_s=100.0, target_busy=0.35)


def draw_from(domain: str) -> Draw:
    def draw(rng: Random) -> Item:
        return Item(domain, (1,) * rng.randint(5, 15), new_tokens=11)

    return draw


DRAWS = {domain: draw_from(domain) for domain in (*MORNING, *AFTERNOON)}
TRACE = make_trace(LONG_DAY, DRAWS, seed=3)


def tokens_per_s(first_hour: float, last_hour: float, domains: object = None) -> float:
    scale = LONG_DAY.day_s / 24
    due = [
        request.item.num_tokens
        for request in TRACE
        if first_hour <= LONG_DAY.hour(request.due_s) < last_hour
        and (domains is None or request.item.domain in domains)  # type: ignore[operator]
    ]
    return sum(due) / ((last_hour - first_hour) * scale)


def test_values_between_points_are_linear_and_level_outside() -> None:
    points = ((1.0, 10.0), (3.0, 20.0))
    assert [between(points, at) for at in (0.0, 1.0, 2.0, 3.0, 9.0)] == [10, 10, 15, 20, 20]


def test_the_day_begins_as_it_ends() -> None:
    assert (LOAD[0][0], LOAD[-1][0]) == (0.0, 24.0)
    assert LOAD[0][1] == LOAD[-1][1]
    assert max(level for _, level in LOAD) == 1.0


@pytest.mark.parametrize(("first", "last", "level"), [(2, 5, 0.1), (10, 11, 0.95), (14, 16, 0.975)])
def test_the_trace_asks_for_the_tokens_of_the_hour(first: float, last: float, level: float) -> None:
    assert tokens_per_s(first, last) == pytest.approx(1000 * level, rel=0.07)


def test_the_domains_change_at_lunch() -> None:
    assert tokens_per_s(0, 13, AFTERNOON) == 0
    assert tokens_per_s(14, 24, MORNING) == 0
    assert tokens_per_s(10, 11, {"facts"}) == pytest.approx(0.2 * 950, rel=0.15)


def test_a_trace_depends_on_its_seed_only() -> None:
    day = Day(100.0, 60.0)
    assert make_trace(day, DRAWS, 1) == make_trace(day, DRAWS, 1)
    assert make_trace(day, DRAWS, 1) != make_trace(day, DRAWS, 2)
    times = [request.due_s for request in make_trace(day, DRAWS, 1)]
    assert times == sorted(times)


def test_the_peak_is_the_busiest_stretch() -> None:
    day = Day(peak_tokens_per_s=1.0, day_s=24.0)  # an hour a second
    due = [(1.0, 4), (9.0, 10), (10.5, 20), (11.5, 4)]
    trace = [Request(due_s, Item("facts", (1,), tokens)) for due_s, tokens in due]
    assert busiest_tokens_per_s(trace, day, hours=2.0) == 30 / 2  # of 9.0 and 10.5


def test_devices_hold_until_the_next_sample() -> None:
    devices = [(-0.5, 1), (0.5, 2), (2.0, 4), (9.0, 8)]
    assert device_seconds(devices, end_s=5.0) == 0.5 * 1 + 1.5 * 2 + 3.0 * 4


def test_windows_keep_what_is_due_within_the_day() -> None:
    assert windows([(0.0, 1.0), (1.9, 2.0), (2.0, 3.0), (5.0, 4.0)], 2.0, 5.0) == [[1, 2], [3], []]


def test_an_answer_is_timed_from_when_it_was_due() -> None:
    answer = Answer.of(RequestRecord(12.0, [12.5, 12.7, 13.1]), begin_s=10.0)
    assert answer == Answer(2.0, 0.5, pytest.approx(0.3), 3, pytest.approx(3.1))
    failed = Answer.of(RequestRecord(12.0, [12.5], error="lost"), begin_s=10.0)
    assert failed.failed
    assert not Bounds(9.0, 9.0).met_by(failed)


def test_figures_of_a_run() -> None:
    bounds = Bounds(ttft_s=0.5, tpot_s=0.1)
    answers = [
        Answer(0.0, 0.4, 0.05, 10, 1.0),
        Answer(1.0, 0.6, 0.05, 10, 2.0),
        Answer(1.0, math.inf, math.inf, 3, 1.5),
        Answer(2.0, 0.1, 0.01, 17, 3.0),
    ]
    samples = [
        Sample(1.0, 2, 1, 0.5, 0.1),
        Sample(3.0, 3, 2, 0.7, 0.3),
        Sample(99.0, 9, 9, 1.0, 1.0),
    ]
    found = summarise(answers, samples, devices_per_worker=4, day_s=4.0, bounds=bounds)
    assert found["device_seconds"] == 4 * (3.0 * 2 + 1.0 * 3)
    assert found["most_devices"] == 12
    assert (found["attainment"], found["ttft_attainment"], found["tpot_attainment"]) == (
        0.5,
        0.5,
        0.75,
    )
    assert (found["num_requests"], found["num_failed"]) == (4, 1)
    assert found["output_tokens_per_s"] == 10.0
    assert found["ttft_ms"]["p50"] == pytest.approx(400.0)
    assert found["cpu_mean"] == pytest.approx(0.6)


def test_all_ways_have_the_same_devices_and_are_valid_settings() -> None:
    static, copies, shoal = (ALL[name](FLEET) for name in ("static", "copies", "shoal"))
    for way in (static, copies, shoal):
        experts = parse_config(way.settings).experts
        assert experts.emulated_pairs_per_s == 100.0 * way.devices_per_worker
        assert experts.slots_per_worker == 96 / COPY * way.devices_per_worker
        most = experts.scaling.max_workers if experts.scaling else experts.num_workers
        assert most * way.devices_per_worker == 12
    assert (
        static.settings["attention"] == copies.settings["attention"] == shoal.settings["attention"]
    )


class Scripted:
    """Answers a request with so many tokens as asked, but the first with one less."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def submit(self, prompt_ids: list[int], new_tokens: int, on_tokens: OnTokens) -> None:
        self.sent.append(prompt_ids)
        on_tokens(new_tokens - (len(self.sent) == 1), False, None)
        on_tokens(0, True, None)


def test_half_an_answer_is_a_failure() -> None:
    target = Scripted()
    trace = [Request(0.0, Item("facts", (number,), 2)) for number in (5, 6)]
    records = replay(target, trace, begin_s=0.0)
    assert target.sent == [[5], [6]]
    assert [record.error for record in records] == [NOT_ANSWERED, None]
    assert [len(record.token_times_s) for record in records] == [1, 2]
