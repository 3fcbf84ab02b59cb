"""Put load on a system that streams and note when each token comes. Standard library only."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from serving.plan import Scenario
from serving.summary import RequestRecord

REQUEST_TIMEOUT_S = 900.0

OnTokens = Callable[[int, bool, str | None], None]
"""(number of new tokens, whether the request is over, one line if it failed); any thread."""


class Target(Protocol):
    """A system that answers many requests at a time."""

    def submit(self, prompt_ids: list[int], new_tokens: int, on_tokens: OnTokens) -> None:
        """Start a request and return at once; never called from within `on_tokens`."""


class _Load:
    """Requests under way; each puts itself into `finished`."""

    def __init__(self, target: Target, new_tokens: int) -> None:
        self._target = target
        self._new_tokens = new_tokens
        self._finished: queue.SimpleQueue[RequestRecord] = queue.SimpleQueue()
        self.records: list[RequestRecord] = []

    def start(self, prompt_ids: list[int], due_s: float | None = None) -> None:
        """Send a request that was due at `due_s`, or is due now."""
        record = RequestRecord(time.perf_counter() if due_s is None else due_s)
        self.records.append(record)

        def on_tokens(count: int, is_last: bool, error: str | None) -> None:
            record.token_times_s.extend([time.perf_counter()] * count)
            if is_last:
                record.error = error
                self._finished.put(record)

        self._target.submit(prompt_ids, self._new_tokens, on_tokens)

    def wait_one(self) -> None:
        """Until some request is over. Raises RuntimeError if it failed, queue.Empty if none is."""
        record = self._finished.get(timeout=REQUEST_TIMEOUT_S)
        if record.error is not None:
            raise RuntimeError(f"a request failed: {record.error}")


def run(target: Target, scenario: Scenario, seed: int) -> list[RequestRecord]:
    """All requests of a scenario, in the order in which they were sent."""
    prompts = scenario.prompts(seed)
    if scenario.rate_per_s is None:
        return _run_closed(_Load(target, scenario.new_tokens), prompts, scenario.concurrency)
    arrivals_s = scenario.arrivals_s(seed)
    return _run_open(_Load(target, scenario.new_tokens), prompts, arrivals_s)


def _run_closed(load: _Load, prompts: Sequence[list[int]], concurrency: int) -> list[RequestRecord]:
    waiting: Iterator[list[int]] = iter(prompts)
    for _, prompt_ids in zip(range(concurrency), waiting, strict=False):
        load.start(prompt_ids)
    for _ in prompts:
        load.wait_one()
        prompt_ids = next(waiting, None)
        if prompt_ids is not None:
            load.start(prompt_ids)
    return load.records


def _run_open(
    load: _Load, prompts: Sequence[list[int]], arrivals_s: Sequence[float]
) -> list[RequestRecord]:
    """A request that is sent late still counts from its arrival: waiting is part of the answer."""
    begin = time.perf_counter()
    for prompt_ids, arrival_s in zip(prompts, arrivals_s, strict=True):
        time.sleep(max(0.0, begin + arrival_s - time.perf_counter()))
        load.start(prompt_ids, begin + arrival_s)
    for _ in prompts:
        load.wait_one()
    return load.records
