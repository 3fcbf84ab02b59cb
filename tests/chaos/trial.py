"""A trial: load, a disturbance, and what every trial demands whatever was disturbed.

Hard demands, checked when a trial ends: no stream failed, no token is lost, doubled or wrong, one
end each, the right usage; then the cluster heals to full strength, every KV block is free,
connections and processes are as before. Times are figures for the tests to judge.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.deployment import Deployment, until
from tests.chaos.load import running_load
from tests.chaos.records import (
    Expected,
    Stream,
    faults,
    gaps_within_s,
    largest_gaps_s,
    quantile,
    time_per_token_s,
    tokens_per_s,
)

NUM_STREAMS = 32
RAMP_S = 1.5
"""From the start of the load until all streams are under way; not measured."""
IMPACT_S = 2.0
"""A gap counts as caused by a disturbance if it reaches into so long a time after it. What comes
later is the start of the replacement, which takes the cores from everybody."""
MAX_FAULTS_SHOWN = 5
LEFTOVERS_TIMEOUT_S = 30.0


@dataclass
class Trial:
    """A load while it runs. Moments are of `time.monotonic()`."""

    name: str
    begin_s: float
    disturbances: list[tuple[float, float]] = field(default_factory=list)
    """Beginning and end of each."""
    calm_until_s: float = 0.0
    end_s: float = 0.0
    streams: list[Stream] = field(default_factory=list, repr=False)
    notes: dict[str, Any] = field(default_factory=dict)
    load_average: float = 0.0
    """Of the machine, when the load ended."""

    def disturbed(self, at_s: float, lasting_s: float = 0.0) -> None:
        """Something happened at that moment."""
        self.calm_until_s = self.calm_until_s or at_s
        self.disturbances.append((at_s, at_s + lasting_s + IMPACT_S))

    # ---- figures, once the load has ended

    @property
    def calm(self) -> tuple[float, float]:
        """The time before the first disturbance, all streams open."""
        return self.begin_s, self.calm_until_s or self.end_s

    @property
    def itl_s(self) -> float:
        """Time between tokens, undisturbed."""
        return time_per_token_s(self.streams, *self.calm)

    def gaps_s(self) -> list[float]:
        """The largest gap of each stream around the disturbances."""
        return sorted(
            gap for window in self.disturbances for gap in largest_gaps_s(self.streams, *window)
        )

    @property
    def calm_gap_max_s(self) -> float:
        """What the machine does to a stream by itself."""
        return quantile(gaps_within_s(self.streams, *self.calm), 1.0)

    @property
    def gap_p99_s(self) -> float:
        return quantile(self.gaps_s(), 0.99)

    @property
    def rate_kept(self) -> float:
        """Throughput from the first disturbance to the end of the load, relative to before."""
        before = tokens_per_s(self.streams, *self.calm)
        return tokens_per_s(self.streams, self.calm[1], self.end_s) / before

    def figures(self) -> dict[str, Any]:
        """What there is to quote."""
        found: dict[str, Any] = {
            "case": self.name,
            "load_average": self.load_average,
            "streams": len(self.streams),
            "tokens": sum(len(stream.ids) for stream in self.streams),
            "itl_ms": _ms(self.itl_s),
            "calm_gap_max_ms": _ms(self.calm_gap_max_s),
            "tokens_per_s": round(tokens_per_s(self.streams, *self.calm), 1),
        }
        if self.disturbances:
            gaps = self.gaps_s()
            found |= {
                "gap_p50_ms": _ms(quantile(gaps, 0.5)),
                "gap_p99_ms": _ms(quantile(gaps, 0.99)),
                "gap_later_ms": _ms(self._gap_later()[0]),
                "gap_later_ended_s": round(self._gap_later()[1] - self.calm[1], 1),
                "rate_kept": round(self.rate_kept, 2),
            }
        return found | self.notes

    def _gap_later(self) -> tuple[float, float]:
        """The largest gap since the first disturbance, whatever its cause, and its end."""
        return max(
            (b - a, b)
            for stream in self.streams
            for a, b in stream.gaps()
            if b > self.calm[1] and a < self.end_s
        )


def _ms(seconds: float) -> int | None:
    """Whole milliseconds, None for NaN, which JSON lacks."""
    return None if math.isnan(seconds) else round(seconds * 1e3)


class Chaos:
    """The deployment under test, the requests it is asked and what it must answer."""

    def __init__(
        self,
        deployment: Deployment,
        requests: Sequence[dict[str, Any]],
        expected: Sequence[Expected],
        *,
        long: bool,
        trials: list[Trial],
    ) -> None:
        self.deployment = deployment
        self.long = long
        self._requests, self._expected = requests, expected
        self._trials = trials
        with self.trial("calm"):
            self.settle()

    @property
    def before_s(self) -> float:
        """How long a trial is watched before its disturbance."""
        return 5.0 if self.long else 2.5

    @contextmanager
    def trial(self, name: str, num_streams: int = NUM_STREAMS) -> Iterator[Trial]:
        """32 open streams for the length of the block; then every demand is checked."""
        host, port = self.deployment.server.url.removeprefix("http://").split(":")
        plan = {
            "http_address": [host, int(port)],
            "grpc_address": self.deployment.server.grpc_address,
            "num_streams": num_streams,
            "requests": self._requests,
        }
        with running_load(plan) as load:
            time.sleep(RAMP_S)
            trial = Trial(name, time.monotonic())
            yield trial
            trial.end_s = time.monotonic()
            trial.load_average = round(os.getloadavg()[0], 1)
            trial.streams = load.finish()
        self._trials.append(trial)
        self._check_streams(trial)
        self._check_rest(trial)

    def settle(self) -> None:
        """Watch the undisturbed load for a while."""
        time.sleep(self.before_s)

    def _check_streams(self, trial: Trial) -> None:
        wrong = faults(trial.streams, self._expected)
        shown = "\n".join(wrong[:MAX_FAULTS_SHOWN])
        assert not wrong, f"{len(wrong)} of {len(trial.streams)} streams are at fault:\n{shown}"

    def _check_rest(self, trial: Trial) -> None:
        self.deployment.wait_idle()
        self.deployment.wait_whole()
        if trial.disturbances:
            healed_s = time.monotonic() - trial.disturbances[-1][0]
            trial.notes["whole_after_s"] = round(healed_s, 1)
        until(self._more_than_before, LEFTOVERS_TIMEOUT_S, "something is left behind")

    def _more_than_before(self) -> str:
        """What runs or is connected and should not be, in words."""
        wanted = {role.capitalize(): num for role, num in self.deployment.wanted.items()}
        replicas = self.deployment.replicas()
        if replicas != {**wanted, "Placement": 1}:
            return f"processes of replicas: {dict(replicas)}, members: {self.deployment.wanted}"
        now, most = self.deployment.connections(), self.deployment.most_connections
        return f"{now} connections, at most {most} are needed" if now > most else ""
