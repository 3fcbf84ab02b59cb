"""What a router remembers about expert workers between exchanges: faults, times, open rows.

Without a quarantine one dead worker cost 195 retries and a failed frame in 1.3 s: every exchange
ran into it again until the table caught up.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Collection
from time import monotonic

_MAX_STRIKES = 16
_WINDOW = 256  # hops of a size that the moving p99 looks back
_REFRESH = 32  # hops of a size before the first look and between two
_NUM_SIZES = 33  # by the bit length of the rows


class Quarantine:
    """Workers that failed and are left alone for a while; each further fault doubles the while.

    When it is over, one caller is let through as a probe while the others still see the worker as
    out; `absolve` (an answer came) ends it, `punish` (a fault) prolongs it. A worker that hangs is
    suspended: a caller let through would hang as well, so it is out for all until it answers
    (`absolve`) or turns out to be gone (`punish`). Times in seconds of any clock that only grows.
    """

    def __init__(self, base_s: float = 0.05, max_s: float = 10.0) -> None:
        self._base_s = base_s
        self._max_s = max_s
        self._lock = threading.Lock()
        self._until: dict[str, tuple[float, int]] = {}  # worker -> (time, strikes)

    def __len__(self) -> int:
        return len(self._until)

    def punish(self, worker_id: str, now_s: float) -> None:
        """Start or prolong."""
        with self._lock:
            strikes = min(self._until.get(worker_id, (0.0, 0))[1] + 1, _MAX_STRIKES)
            self._until[worker_id] = (now_s + self._backoff_s(strikes), strikes)

    def suspend(self, worker_id: str) -> bool:
        """The worker hangs. False when that was known."""
        with self._lock:
            until_s, strikes = self._until.get(worker_id, (0.0, 0))
            self._until[worker_id] = (math.inf, min(strikes + 1, _MAX_STRIKES))
            return until_s < math.inf

    def is_suspended(self, worker_id: str) -> bool:
        return self._until.get(worker_id, (0.0, 0))[0] == math.inf

    def absolve(self, worker_id: str) -> bool:
        """The worker answered: forget its faults. False when there were none."""
        if not self._until:
            return False
        with self._lock:
            return self._until.pop(worker_id, None) is not None

    def keep_only(self, worker_ids: Collection[str]) -> None:
        """Forget workers that are gone."""
        with self._lock:
            for worker_id in self._until.keys() - set(worker_ids):
                del self._until[worker_id]

    def admits(self, worker_id: str, now_s: float) -> bool:
        """Whether to use the worker now. True for the one caller that shall probe it."""
        if worker_id not in self._until:
            return True
        with self._lock:
            until_s, strikes = self._until.get(worker_id, (now_s, 0))
            if now_s < until_s:
                return False
            if strikes:
                self._until[worker_id] = (now_s + self._backoff_s(strikes), strikes)
            return True

    def next_release_s(self) -> float | None:
        """Time at which the next worker may be probed, infinite if all in quarantine hang; None
        when nobody is in quarantine."""
        with self._lock:
            return min((until_s for until_s, _ in self._until.values()), default=None)

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
