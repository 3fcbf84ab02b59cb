"""What a server says at one moment, and a thread that asks it again and again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from queue import SimpleQueue
from typing import Any

from cluster.http_client import ApiClient, ApiError

STATUS_PATH = "/status"
STATUS_FIELDS = ("model", "ready", "stage", "epoch", "workers")
"""Without these nothing is shown; further ones may be missing or null."""
LOAD_PATH = "/v1/experts/load?compact=true"


@dataclass(frozen=True)
class Load:
    """Rows (one token computed by one expert) of L layers x E experts, and who holds them."""

    layers: list[int]
    """Ids, [L]."""
    workers: list[str]
    """Ids, [W]."""
    window_s: float
    rows: list[list[int]]
    """[L][E] within window_s."""
    recent_s: float
    recent_rows: list[list[int]]
    """[L][E] within recent_s."""
    holders: list[list[list[int]]]
    """[L][E], each a list of indices into `workers`."""
    balancedness: list[float]
    """[L]: mean/max of the workers' rows, 1.0 is even."""

    @classmethod
    def of(cls, body: dict[str, Any]) -> Load:
        """From the body of GET LOAD_PATH, whose further fields are not needed. Raises ApiError."""
        names = [field.name for field in fields(cls)]
        _check(body, names, LOAD_PATH)
        return cls(**{name: body[name] for name in names})

    def per_s(self, recent_rows: int) -> float:
        """Rows a second, from rows within recent_s."""
        return recent_rows / self.recent_s if self.recent_s else 0.0


@dataclass(frozen=True)
class Reading:
    """One answer. Without `status` the server is away, without `load` its directory is."""

    at_s: float
    """By the wall clock."""
    status: dict[str, Any] | None
    load: Load | None
    error: str = ""
    """Why something is missing."""

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def read(client: ApiClient, clock: Callable[[], float] = time.time) -> Reading:
    """What the server says now. Raises ApiError when it does not answer."""
    status = client.read(STATUS_PATH)
    _check(status, STATUS_FIELDS, STATUS_PATH)
    try:
        return Reading(clock(), status, Load.of(client.read(LOAD_PATH)))
    except ApiError as error:
        return Reading(clock(), status, None, str(error))


def _check(body: Any, names: Iterable[str], path: str) -> None:
    missing = [name for name in names if not isinstance(body, dict) or name not in body]
    if missing:
        what = f"{path} answers without {', '.join(missing)}"
        raise ApiError(f"{what}: the server is none of this version of Shoal")


def read_or_away(client: ApiClient, clock: Callable[[], float] = time.time) -> Reading:
    """The same, but a server that does not answer is a reading too."""
    try:
        return read(client, clock)
    except ApiError as error:
        return Reading(clock(), None, None, str(error))


class Poller:
    """Reads every `interval_s` in a thread of its own: whoever looks at `readings` never waits."""

    def __init__(self, read: Callable[[], Reading], interval_s: float) -> None:
        self.readings: SimpleQueue[Reading] = SimpleQueue()
        self._read = read
        self._interval_s = interval_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            self.readings.put(self._read())

    def __enter__(self) -> Poller:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """The thread is not waited for: it may hang in a read, for seconds."""
        self._closing.set()
