"""A day of requests, compressed: the load follows the hours, at lunch the domains change. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

HOURS = 24.0
Points = Sequence[tuple[float, float]]

LOAD: Points = (
    (0.0, 0.15),
    (2.0, 0.10),
    (5.0, 0.10),
    (8.0, 0.45),
    (10.0, 0.90),
    (11.0, 1.00),
    (12.5, 0.65),
    (14.0, 0.95),
    (16.0, 1.00),
    (18.0, 0.60),
    (20.0, 0.45),
    (22.0, 0.25),
    (24.0, 0.15),
)
"""(hour, part of the peak): night, morning ramp, lunch dip, afternoon peak, evening."""

MORNING = {"arithmetic": 0.4, "code": 0.4, "facts": 0.2}
AFTERNOON = {"french": 0.4, "chat": 0.3, "stories": 0.3}
SHIFT: Points = ((13.0, 0.0), (14.0, 1.0))
"""(hour, part of the tokens that is of the afternoon's domains)."""


@dataclass(frozen=True)
class Item:
    """A prompt and how many tokens its answer shall have."""

    domain: str
    prompt_ids: tuple[int, ...]
    new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that pass the experts: the last one of an answer does not."""
        return len(self.prompt_ids) + self.new_tokens - 1


@dataclass(frozen=True)
class Request:
    """An item and when it is sent, from the beginning of the trace on."""

    due_s: float
    item: Item


Draw = Callable[[Random], Item]


@dataclass(frozen=True)
class Day:
    """`peak_tokens_per_s` and `day_s`, which stands for 24 hours, decide all the rest."""

    peak_tokens_per_s: float
    day_s: float

    def hour(self, time_s: float) -> float:
        """Of the day that the trace stands for."""
        return time_s / self.day_s * HOURS

    def tokens_per_s(self, time_s: float) -> float:
        """What is asked of the experts on average."""
        return self.peak_tokens_per_s * between(LOAD, self.hour(time_s))

    def mix(self, time_s: float) -> dict[str, float]:
        """Part of the tokens that each domain has."""
        late = between(SHIFT, self.hour(time_s))
        early = {domain: part * (1 - late) for domain, part in MORNING.items()}
        return early | {domain: part * late for domain, part in AFTERNOON.items()}


def between(points: Points, at: float) -> float:
    """Linear between the points, level outside of them."""
    index = bisect_right([x for x, _ in points], at)
    if index == 0:
        return points[0][1]
    if index == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def make_trace(day: Day, draws: Mapping[str, Draw], seed: int) -> list[Request]:
    """Poisson arrivals: the same requests at the same times for the same seed.

    A domain's requests arrive as often as its part of the tokens needs, so that long answers do
    not make more load than short ones.
    """
    means = {domain: _mean_tokens(draw, seed, domain) for domain, draw in draws.items()}
    requests: list[Request] = []
    for domain, draw in draws.items():
        rng = Random(f"{seed} {domain}")  # noqa: S311 - a workload, not a secret
        peak_per_s = day.peak_tokens_per_s / means[domain]

        def part(time_s: float, domain: str = domain) -> float:
            return between(LOAD, day.hour(time_s)) * day.mix(time_s).get(domain, 0.0)

        times = _arrivals(rng, peak_per_s, day.day_s, part)
        requests += [Request(time_s, draw(rng)) for time_s in times]
    return sorted(requests, key=lambda request: (request.due_s, request.item.domain))


def _arrivals(
    rng: Random, peak_per_s: float, end_s: float, part: Callable[[float], float]
) -> Iterator[float]:
    """Poisson arrivals at the rate peak_per_s * part(time), by thinning."""
    time_s = rng.expovariate(peak_per_s)
    while time_s < end_s:
        if rng.random() < part(time_s):
            yield time_s
        time_s += rng.expovariate(peak_per_s)


def _mean_tokens(draw: Draw, seed: int, domain: str, number: int = 300) -> float:
    rng = Random(f"{seed} {domain} mean")  # noqa: S311
    return sum(draw(rng).num_tokens for _ in range(number)) / number


def busiest_tokens_per_s(trace: Iterable[Request], day: Day, hours: float = 2.0) -> float:
    """The most that any two hours of the trace ask for: what the peak is sized by."""
    width_s = day.day_s * hours / HOURS
    events = [(request.due_s, request.item.num_tokens) for request in trace]
    most, total, first = 0, 0, 0
    for due_s, tokens in events:
        total += tokens
        while events[first][0] <= due_s - width_s:
            total -= events[first][1]
            first += 1
        most = max(most, total)
    return most / width_s
