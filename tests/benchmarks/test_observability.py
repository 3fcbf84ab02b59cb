import pytest
from bench_observability import Round, summary


def test_cost_is_the_median_of_what_rounds_lost() -> None:
    rounds = [
        Round({"off": off, "on": on}, {"off": 2.0, "on": 2.0 + 0.02 * n})
        for n, (off, on) in enumerate([(100.0, 99.0), (200.0, 196.0), (50.0, 51.0)])
    ]
    told = summary(rounds, ["off", "on"])
    assert told["off"] == {"tokens_per_s": 100.0, "cpu_ms_per_token": 2.0}
    lost = told["on"]["throughput_lost_percent"]
    assert lost == pytest.approx({"median": 1.0, "low": -2.0, "high": 2.0})  # of 1, 2 and -2
    assert told["on"]["cpu_added_percent"]["median"] == pytest.approx(1.0)
