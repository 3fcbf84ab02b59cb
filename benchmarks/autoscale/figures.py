"""From samples and records to the figures that are compared. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serving.summary import RequestRecord, percentile

from autoscale.watch import Sample

TTFT_SLACK = 2.0
TPOT_SLACK = 1.5
"""The service level: what 95 % of the requests of the static peak see, times this. More for the
first token, as a prompt alone on few devices takes longer than on many, however idle they are."""


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request; times are seconds since the trace began."""

    due_s: float
    ttft_s: float
    """To the first token from when the request was due; infinite if it failed."""
    tpot_s: float
    """Time for each further token; infinite if it failed."""
    num_tokens: int
    end_s: float

    @property
    def failed(self) -> bool:
        return math.isinf(self.ttft_s)

    @staticmethod
    def of(record: RequestRecord, begin_s: float) -> Answer:
        """A failed request is as late as can be."""
        due_s, times_s = record.due_s - begin_s, record.token_times_s
        if record.error is not None or not times_s:
            end_s = times_s[-1] - begin_s if times_s else due_s
            return Answer(due_s, math.inf, math.inf, len(times_s), end_s)
        tpot_s = (times_s[-1] - times_s[0]) / max(1, len(times_s) - 1)
        return Answer(due_s, record.ttft_s, tpot_s, len(times_s), times_s[-1] - begin_s)


@dataclass(frozen=True)
class Bounds:
    """What counts as served in time."""

    ttft_s: float
    tpot_s: float

    @staticmethod
    def of(static: Sequence[Answer]) -> Bounds:
        """From the run with the static peak."""
        served = [answer for answer in static if not answer.failed]
        ttft_s = percentile([answer.ttft_s for answer in served], 95)
        tpot_s = percentile([answer.tpot_s for answer in served], 95)
        return Bounds(TTFT_SLACK * ttft_s, TPOT_SLACK * tpot_s)

    def met_by(self, answer: Answer) -> bool:
        return answer.ttft_s <= self.ttft_s and answer.tpot_s <= self.tpot_s


def summarise(
    answers: Sequence[Answer],
    samples: Sequence[Sample],
    devices_per_worker: int,
    day_s: float,
    bounds: Bounds,
) -> dict[str, Any]:
    """The figures of one run."""
    served = [answer for answer in answers if not answer.failed]
    ttfts, tpots = [a.ttft_s * 1e3 for a in served], [a.tpot_s * 1e3 for a in served]
    devices = [(s.time_s, s.allocated * devices_per_worker) for s in samples]
    during = [s for s in samples if s.time_s <= day_s]
    return {
        "device_seconds": device_seconds(devices, day_s),
        "serving_device_seconds": device_seconds(
            [(s.time_s, s.serving * devices_per_worker) for s in samples], day_s
        ),
        "most_devices": max(number for time_s, number in devices if time_s <= day_s),
        "attainment": sum(map(bounds.met_by, answers)) / len(answers),
        "ttft_attainment": sum(a.ttft_s <= bounds.ttft_s for a in answers) / len(answers),
        "tpot_attainment": sum(a.tpot_s <= bounds.tpot_s for a in answers) / len(answers),
        "num_requests": len(answers),
        "num_failed": sum(a.failed for a in answers),
        "output_tokens_per_s": sum(a.num_tokens for a in answers) / day_s,
        "ttft_ms": {f"p{percent}": percentile(ttfts, percent) for percent in (50, 95, 99)},
        "tpot_ms": {f"p{percent}": percentile(tpots, percent) for percent in (50, 95, 99)},
        "cpu_mean": sum(s.cpu for s in during) / len(during),
        "cpu_p95": percentile([s.cpu for s in during], 95),
        "pressure_mean": sum(s.pressure for s in during) / len(during),
    }


def device_seconds(devices: Sequence[tuple[float, int]], end_s: float) -> float:
    """Integral from 0 to `end_s` of (time, number); a number holds until the next one."""
    total, last_s, last = 0.0, 0.0, devices[0][1]
    for time_s, number in devices:
        now_s = min(max(time_s, 0.0), end_s)
        total += (now_s - last_s) * last
        last_s, last = now_s, number
    return total + (end_s - last_s) * last


def windows(
    points: Sequence[tuple[float, float]], width_s: float, end_s: float
) -> list[list[float]]:
    """Values by window of time, from (time, value)."""
    found: list[list[float]] = [[] for _ in range(math.ceil(end_s / width_s))]
    for time_s, value in points:
        if 0 <= time_s < end_s:
            found[int(time_s / width_s)].append(value)
    return found
