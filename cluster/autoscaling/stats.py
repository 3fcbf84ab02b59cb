"""What a worker reports to Ray Serve's autoscaler each second: a few plain floats.

A meter turns a worker's counters, which only grow, into rates since its last reading; so a meter
has one reader. Serve averages each value over a window and hands the averages to policy.py, which
reads them back with `read_stats`. More than 16 keys would cost Serve's controller milliseconds a
tick; the load of each expert goes to Placement instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attention.messages import Stats

MAX_KEYS = 16
UNKNOWN = -1.0
MIN_INTERVAL_S = 1e-3
"""Readings closer together give the earlier one again: rates over no time are noise."""

Fraction = Annotated[float, Field(ge=0, le=1.001)]  # an average of ones may exceed 1 by rounding
Amount = Annotated[float, Field(ge=0, le=1e12)]
Number = Annotated[float, Field(ge=1, le=1e9)]


class WorkerStats(BaseModel):
    """Keys and bounds of a report. Serve adds keys of its own, which are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    def as_metrics(self) -> dict[str, float]:
        """For `record_autoscaling_stats`. Builtin floats: a numpy integer would turn the replica's
        statistics off for good."""
        return {name: float(getattr(self, name)) for name in type(self).model_fields}

    commanded_workers: Annotated[float, Field(ge=UNKNOWN, le=1e6)] = UNKNOWN
    """The tier's size that the worker was last told is wanted by command; 0: none is."""


class ExpertStats(WorkerStats):
    """Report of an expert worker."""

    busy_fraction: Fraction
    """Part of the time spent computing."""
    queue_p95_ms: Amount
    """95th percentile of how long the batches waited for their turn; 0 without batches."""
    rows_per_s: Amount
    """(token, expert) pairs computed: unlike tokens, as many however many workers share them."""
    num_held: Amount
    """(layer, expert) pairs that it can compute now."""
    num_slots: Amount
    """Pairs it can hold; whole groups only, where the model is group-limited. 0: it is drained."""
    num_experts: Number
    """Pairs of the whole model: what the pool must hold together."""

    @property
    def is_drained(self) -> bool:
        """It takes no part and is no capacity."""
        return self.num_slots < 0.5


class AttentionStats(WorkerStats):
    """Report of an attention worker."""

    kv_use_fraction: Fraction
    """Part of the cache blocks that requests hold; blocks kept for their prefix are free."""
    kv_capacity_tokens: Number
    """Tokens that the cache holds."""
    waiting_tokens: Amount
    """Prompt tokens of the requests that wait."""
    waiting_requests: Amount
    running_requests: Amount
    tokens_per_s: Amount
    """Tokens prefilled and generated."""


AnyStats = TypeVar("AnyStats", bound=WorkerStats)


def read_stats(kind: type[AnyStats], values: Mapping[str, Any]) -> AnyStats | None:
    """The report of a worker; None when a value is missing, not a number or out of its bounds."""
    try:
        return kind.model_validate(values)
    except ValidationError:
        return None


class ExpertCounters(Protocol):
    """What an ExpertMeter reads of a worker's counters; all of them only grow."""

    @property
    def busy_s(self) -> float: ...
    @property
    def pairs(self) -> int: ...
    @property
    def queue_us_buckets(self) -> Sequence[int]:
        """Batches by `queue_us.bit_length()`: bucket b counts waits of [2^(b-1), 2^b) us."""
        ...


class ExpertMeter:
    """Rates of one expert worker."""

    def __init__(
        self,
        counters: ExpertCounters,
        num_slots: int,
        num_experts: int,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._counters = counters
        self._num_slots = num_slots
        self._num_experts = num_experts
        self._clock = clock
        self._last: ExpertStats | None = None
        self._remember(clock())

    def read(
        self, num_held: int, commanded_workers: float = UNKNOWN, *, is_drained: bool = False
    ) -> ExpertStats:
        """The report since the last reading."""
        now_s = self._clock()
        elapsed_s = now_s - self._read_s
        if self._last is not None and elapsed_s < MIN_INTERVAL_S:
            return self._last
        elapsed_s = max(elapsed_s, MIN_INTERVAL_S)
        counters = self._counters
        waits = [new - old for new, old in zip(counters.queue_us_buckets, self._waits, strict=True)]
        self._last = ExpertStats(
            # A batch counts when it ends, so a long one may fill more than its interval.
            busy_fraction=min(1.0, max(0.0, counters.busy_s - self._busy_s) / elapsed_s),
            queue_p95_ms=quantile_us(waits, 0.95) / 1e3,
            rows_per_s=max(0, counters.pairs - self._pairs) / elapsed_s,
            num_held=num_held,
            num_slots=0 if is_drained else self._num_slots,
            num_experts=self._num_experts,
            commanded_workers=commanded_workers,
        )
        self._remember(now_s)
        return self._last

    def _remember(self, now_s: float) -> None:
        self._read_s = now_s
        self._busy_s = self._counters.busy_s
        self._pairs = self._counters.pairs
        self._waits = list(self._counters.queue_us_buckets)


class AttentionMeter:
    """Rates of one attention worker."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._read_s = clock()
        self._num_tokens = 0
        self._last: AttentionStats | None = None

    def read(self, stats: Stats, commanded_workers: float = UNKNOWN) -> AttentionStats:
        """The report since the last reading."""
        now_s = self._clock()
        elapsed_s = now_s - self._read_s
        if self._last is not None and elapsed_s < MIN_INTERVAL_S:
            return self._last
        num_tokens = stats.prompt_tokens + stats.generated_tokens
        in_use = stats.kv_blocks_total - stats.kv_blocks_free
        self._last = AttentionStats(
            kv_use_fraction=in_use / max(1, stats.kv_blocks_total),
            kv_capacity_tokens=max(1, stats.kv_blocks_total * stats.block_size),
            waiting_tokens=stats.num_waiting_tokens,
            waiting_requests=stats.num_waiting,
            running_requests=stats.num_running,
            tokens_per_s=max(0, num_tokens - self._num_tokens) / max(elapsed_s, MIN_INTERVAL_S),
            commanded_workers=commanded_workers,
        )
        self._read_s, self._num_tokens = now_s, num_tokens
        return self._last


def quantile_us(buckets: Sequence[int], quantile: float) -> float:
    """Of values counted by bit length, evenly spread within a bucket; 0 without values."""
    rank = quantile * sum(buckets)
    if rank <= 0:
        return 0.0
    below = 0
    for bits, number in enumerate(buckets):
        if number > 0 and below + number >= rank:
            low = 2.0 ** (bits - 1) if bits else 0.0
            return low * (1 + (rank - below) / number)
        below += number
    return 0.0
