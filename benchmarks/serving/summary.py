"""From the time of every token to the figures of a scenario. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class RequestRecord:
    """One request: when it was due (open loop) or sent (closed loop), when each token came.

    Times are of one monotonic clock, in seconds. Tokens that came together have the same time.
    """

    due_s: float
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in pairwise(self.token_times_s)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks; `values` is not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(
    records: Sequence[RequestRecord], prompt_tokens: int, new_tokens: int
) -> dict[str, float]:
    """The figures of a scenario.

    Raises ValueError when a request failed or has too few tokens: half an answer is no result.
    """
    for record in records:
        if record.error is not None or len(record.token_times_s) != new_tokens:
            found = record.error or f"{len(record.token_times_s)} of {new_tokens} tokens"
            raise ValueError(f"a request was not answered: {found}")
    start = min(record.due_s for record in records)
    first_token = max(record.token_times_s[0] for record in records)
    last_token = max(record.token_times_s[-1] for record in records)
    num_requests = len(records)
    ttfts = [record.ttft_s * 1e3 for record in records]
    figures = {
        "output_tokens_per_s": num_requests * new_tokens / (last_token - start),
        "ttft_p50_ms": percentile(ttfts, 50),
        "ttft_p99_ms": percentile(ttfts, 99),
    }
    if new_tokens == 1:
        figures["prefill_tokens_per_s"] = num_requests * prompt_tokens / (first_token - start)
        return figures
    gaps = [gap * 1e3 for record in records for gap in record.gaps_s]
    streams = [
        (new_tokens - 1) / (record.token_times_s[-1] - record.token_times_s[0])
        for record in records
    ]
    return figures | {
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
        "stream_tokens_per_s": percentile(streams, 50),
    }
