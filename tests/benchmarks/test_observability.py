import inspect
from collections.abc import Iterator

import pytest
from bench_observability import Block, summary
from observing.arms import ARMS, enter, function_named
from observing.statistics import added_percent, interval

from attention.engine import _output
from attention.messages import SamplingParams, Submit
from attention.request import Request


@pytest.fixture
def _as_it_ships() -> Iterator[None]:
    yield
    enter("traces")


def test_the_estimate_is_the_median_of_all_means_of_two() -> None:
    found = interval([1.0, 2.0, 9.0])  # means: 1, 1.5, 2, 5, 5.5, 9
    assert found["estimate"] == 3.5
    assert found["mean"] == 4.0


def test_a_spoilt_round_in_ten_does_not_move_the_estimate_far() -> None:
    found = interval([1.0, 1.1, 0.9] * 9 + [80.0] * 3)
    assert found["low"] <= 1.0 <= found["high"] < 1.2
    assert found["mean"] > 8


def test_more_rounds_make_the_interval_narrower() -> None:
    few, many = interval([0.0, 2.0] * 10), interval([0.0, 2.0] * 100)
    assert many["mean_high"] - many["mean_low"] < (few["mean_high"] - few["mean_low"]) / 3


def test_cost_is_what_an_arm_has_more_than_the_baseline_of_its_round() -> None:
    assert added_percent([102.0, 198.0], [100.0, 200.0]) == pytest.approx([2.0, -1.0])
    rounds: list[dict[str, Block]] = [
        {"without": {"wall": 2.0 * n}, "observed": {"wall": 2.1 * n}} for n in (1, 2, 3)
    ]
    told = summary(rounds)
    assert told["without"] == {"wall_ms": 4.0}
    assert told["observed"]["added_percent"]["wall"]["estimate"] == pytest.approx(5.0)


@pytest.mark.filterwarnings("ignore")  # of Ray, which is imported
@pytest.mark.parametrize("arm", ARMS)
def test_every_line_that_an_arm_replaces_is_in_the_product(arm: str, _as_it_ships: None) -> None:
    for name in ARMS["without"]:
        function_named(name)  # imports it
    assert enter(arm) == len(ARMS["without"])


def test_the_baseline_tells_no_times_and_afterwards_all_is_as_it_was(_as_it_ships: None) -> None:
    submit = Submit(request_id="r", prompt_ids=[1], params=SamplingParams())
    request = Request.create(submit, max_model_len=8)
    request.step_s = 0.5
    before = inspect.getsource(_output)
    enter("without")
    assert _output(request).step_us == 0
    enter("traces")
    assert _output(request).step_us == 500_000
    assert inspect.getsource(_output) == before
