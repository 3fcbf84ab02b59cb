"""What a router remembers about expert workers between exchanges: faults, times, open rows.

Without a quarantine one dead worker cost 195 retries and a failed frame in 1.3 s: every exchange
ran into it again until the table caught up.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection
from time import monotonic
from typing import NamedTuple

logger = logging.getLogger(__name__)

TELL_EVERY_S = 10.0
"""A worker that fails and answers in turns is told of once in so long."""
_MAX_STRIKES = 16
_WINDOW = 256  # hops of a size that the moving p99 looks back
_REFRESH = 32  # hops of a size before the first look and between two
_NUM_SIZES = 33  # by the bit length of the rows


class _Case(NamedTuple):
    """A worker in quarantine."""

    until_s: float
    strikes: int
    told: bool
    """The log says why, and shall say when it answers again."""


_NO_CASE = _Case(-math.inf, 0, False)


class Quarantine:
    """Workers that failed and are left alone for a while; each further fault doubles the while.

    When it is over, one caller is let through as a probe while the others still see the worker as
    out; `absolve` (an answer came) ends it, `punish` (a fault) prolongs it. A worker that hangs is
    suspended: a caller let through would hang as well, so it is out for all until it answers
    (`absolve`) or turns out to be gone (`punish`). Times in seconds of any clock that only grows.

    A fault that comes with a reason is logged, the first until the worker answers; so is the answer
    that ends it.
    """

    def __init__(
        self, base_s: float = 0.05, max_s: float = 10.0, kind: str = "expert worker"
    ) -> None:
        """`kind` names the workers in the log."""
        self._base_s = base_s
        self._max_s = max_s
        self._kind = kind
        self._lock = threading.Lock()
        self._cases: dict[str, _Case] = {}
        self._told_s: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._cases)

    def punish(self, worker_id: str, now_s: float, why: str = "") -> None:
        """Start or prolong."""
        with self._lock:
            _, strikes, told = self._cases.get(worker_id, _NO_CASE)
            strikes = min(strikes + 1, _MAX_STRIKES)
            told = self._tell(worker_id, now_s, told, why)
            self._cases[worker_id] = _Case(now_s + self._backoff_s(strikes), strikes, told)

    def suspend(self, worker_id: str, now_s: float, why: str = "") -> bool:
        """The worker hangs. False when that was known."""
        with self._lock:
            until_s, strikes, told = self._cases.get(worker_id, _NO_CASE)
            told = self._tell(worker_id, now_s, told, why)
            self._cases[worker_id] = _Case(math.inf, min(strikes + 1, _MAX_STRIKES), told)
            return until_s < math.inf

    def is_suspended(self, worker_id: str) -> bool:
        return self._cases.get(worker_id, _NO_CASE).until_s == math.inf

    def absolve(self, worker_id: str) -> bool:
        """The worker answered: forget its faults. False when there were none."""
        if not self._cases:
            return False
        with self._lock:
            case = self._cases.pop(worker_id, None)
        if case is not None and case.told:
            logger.warning("%s %s answers again", self._kind, worker_id)
        return case is not None

    def forget(self, worker_id: str) -> None:
        """Another process has the name now."""
        with self._lock:
            self._forget(worker_id)

    def keep_only(self, worker_ids: Collection[str]) -> None:
        """Forget workers that are gone."""
        with self._lock:
            for worker_id in (self._cases.keys() | self._told_s.keys()) - set(worker_ids):
                self._forget(worker_id)

    def is_out(self, worker_id: str, now_s: float) -> bool:
        """Whether the worker is left alone now. If not, `admits` says who may use it."""
        return now_s < self._cases.get(worker_id, _NO_CASE).until_s

    def admits(self, worker_id: str, now_s: float) -> bool:
        """Whether to use the worker now. True for the one caller that shall probe it."""
        if worker_id not in self._cases:
            return True
        with self._lock:
            case = self._cases.get(worker_id)
            if case is None:
                return True
            if now_s < case.until_s:
                return False
            self._cases[worker_id] = case._replace(until_s=now_s + self._backoff_s(case.strikes))
            return True

    def next_release_s(self, after_s: float) -> float | None:
        """The first time after `after_s` at which a worker may be probed, infinite if those left
        out all hang; None when nobody is. Who could be probed before is no news."""
        with self._lock:
            times_s = (case.until_s for case in self._cases.values())
            return min((until_s for until_s in times_s if until_s > after_s), default=None)

    def _forget(self, worker_id: str) -> None:
        self._cases.pop(worker_id, None)
        self._told_s.pop(worker_id, None)

    def _tell(self, worker_id: str, now_s: float, told: bool, why: str) -> bool:
        """Log why, unless that is `told` or was a moment ago; whether it is told now."""
        if told or not why or now_s - self._told_s.get(worker_id, -math.inf) < TELL_EVERY_S:
            return told
        self._told_s[worker_id] = now_s
        logger.warning("%s %s is left alone: %s", self._kind, worker_id, why)
        return True

    def _backoff_s(self, strikes: int) -> float:
        return min(self._max_s, self._base_s * 2.0 ** (strikes - 1))


class HopTimer:
    """How long to wait for one answer: max(floor_s, factor * moving p99), by the size of the hop.

    A size is a power of two of rows. One with too few answers so far has the limit of the next
    larger that is known, else cold_s: the first prefill on a slow CPU is no fault.
    """

    def __init__(self, floor_s: float = 0.25, factor: float = 8.0, cold_s: float = 2.0) -> None:
        self._floor_s = floor_s
        self._factor = factor
        self._limits_s = [max(floor_s, cold_s)] * _NUM_SIZES
        self._recent = [deque[float](maxlen=_WINDOW) for _ in range(_NUM_SIZES)]
        self._counts = [0] * _NUM_SIZES

    def timeout_s(self, num_rows: int) -> float:
        """For a hop of so many rows."""
        return self._limits_s[num_rows.bit_length()]

    def observe(self, num_rows: int, hop_s: float) -> None:
        """An answer came after hop_s. A race between lanes can only delay the next look.

        Late answers count too, or the limit would never follow a pool that became slower; but a
        look at most doubles it: a worker that was stopped for a minute is no measure.
        """
        size = num_rows.bit_length()
        self._recent[size].append(min(hop_s, 2.0 * self._limits_s[size] / self._factor))
        self._counts[size] += 1
        if self._counts[size] % _REFRESH == 0:
            self._look(size)

    def _look(self, size: int) -> None:
        ordered = sorted(self._recent[size].copy())
        p99_s = ordered[int(0.99 * (len(ordered) - 1))]
        limit_s = self._limits_s[size] = max(self._floor_s, self._factor * p99_s)
        while size and self._counts[size - 1] < _REFRESH:
            size -= 1
            self._limits_s[size] = limit_s


class WorkerHealth:
    """The shared memory of all lanes of a router."""

    def __init__(
        self,
        quarantine: Quarantine | None = None,
        hop_timer: HopTimer | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        # not `or`: an empty quarantine is false
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self.hop_timer = HopTimer() if hop_timer is None else hop_timer
        self.clock = clock
        self._lock = threading.Lock()
        self._outstanding_rows: dict[str, int] = {}

    def add_rows(self, worker_id: str, num_rows: int) -> None:
        """Rows sent (positive) or answered, lost or given up (negative)."""
        with self._lock:
            left = self._outstanding_rows.get(worker_id, 0) + num_rows
            self._outstanding_rows[worker_id] = left

    def outstanding_rows(self, worker_id: str) -> int:
        return self._outstanding_rows.get(worker_id, 0)

    def keep_only(self, worker_ids: Collection[str]) -> None:
        """Forget workers that are gone and owe nothing."""
        self.quarantine.keep_only(worker_ids)
        with self._lock:
            for worker_id in self._outstanding_rows.keys() - set(worker_ids):
                if not self._outstanding_rows[worker_id]:
                    del self._outstanding_rows[worker_id]
