"""What is measured: scenarios of seeded prompts. Standard library only."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

FIRST_BYTE_ID, LAST_BYTE_ID = 17, 272
"""Ids of the seeded checkpoints' tokenizer that stand for a byte each: valid in every system."""
DECODE_PROMPT_TOKENS = 16
PREFILL_PROMPT_TOKENS = 512
MIN_CLOSED_REQUESTS = 4
"""Fewer concurrent clients than this repeat, or a percentile would rest on a single request."""
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Scenario:
    """Requests of one kind. Greedy, the end token ignored, always `new_tokens` new tokens.

    Closed loop: `concurrency` clients, each sends its next request when the last one is answered.
    Open loop (`rate_per_s`): Poisson arrivals, whatever the system makes of them.
    """

    name: str
    prompt_tokens: int
    new_tokens: int
    num_requests: int
    concurrency: int = 1
    rate_per_s: float | None = None

    def prompts(self, seed: int) -> list[list[int]]:
        """[num_requests][prompt_tokens] ids; no two scenarios share a prefix beyond chance."""
        rng = random.Random(f"{seed} {self.name}")  # noqa: S311 - a workload, not a secret
        ids = range(FIRST_BYTE_ID, LAST_BYTE_ID + 1)
        return [rng.choices(ids, k=self.prompt_tokens) for _ in range(self.num_requests)]

    def arrivals_s(self, seed: int) -> list[float]:
        """Arrival times of an open loop, from 0 on."""
        if self.rate_per_s is None:
            raise ValueError(f"{self.name} is a closed loop: it has no arrival times")
        rng = random.Random(f"{seed} {self.name} arrivals")  # noqa: S311
        times = [0.0]
        while len(times) < self.num_requests:
            times.append(times[-1] + rng.expovariate(self.rate_per_s))
        return times

    def warm_up(self) -> Scenario:
        """The same shapes, few tokens, other prompts: no cache shall know the real ones."""
        return replace(
            self,
            name=f"warm-up {self.name}",
            new_tokens=min(self.new_tokens, WARM_UP_TOKENS),
            num_requests=min(self.num_requests, self.concurrency),
            rate_per_s=None,
        )


FIRST_ANSWER = Scenario("first answer", DECODE_PROMPT_TOKENS, 1, 1)


def closed(concurrency: int, new_tokens: int) -> Scenario:
    """Short prompts: decoding."""
    return Scenario(
        f"closed-{concurrency}",
        DECODE_PROMPT_TOKENS,
        new_tokens,
        max(MIN_CLOSED_REQUESTS, concurrency),
        concurrency,
    )


def prefill(concurrency: int) -> Scenario:
    """Long prompts, one new token."""
    return Scenario(
        f"prefill-{concurrency}", PREFILL_PROMPT_TOKENS, 1, MIN_CLOSED_REQUESTS, concurrency
    )


def open_loop(rate_per_s: float, num_requests: int, new_tokens: int) -> Scenario:
    """Requests that arrive on their own."""
    return Scenario(
        f"open-{rate_per_s:g}",
        DECODE_PROMPT_TOKENS,
        new_tokens,
        num_requests,
        rate_per_s=rate_per_s,
    )
