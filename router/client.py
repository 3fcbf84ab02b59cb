"""How attention calls a router: in its own process or, with fail-over, a deployed one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from experts.channel.channel import ChannelError, ChannelTimeout, Connection, connect
from experts.channel.frame import (
    DEFAULT_LIMITS,
    MAX_DEADLINE_US,
    RENORMALISED,
    Frame,
    FrameError,
    FrameLimits,
    Kind,
    Status,
)
from experts.health import Quarantine
from experts.messages import WorkerInfo
from experts.snapshots import SnapshotBoard
from router.errors import RemoteRouterError, RemoteUnavailable, RouterUnavailable

LOOK_S = 0.05
"""How long a wait goes on without a look whether the router is still listed: a router that hangs
keeps its connection, and only the directory knows."""
SEND_TIMEOUT_S = 2.0
"""A router reads at once; one that does not for so long hangs."""


class MoeClient(Protocol):
    """What the layer loop needs of the routed experts; RouterWorker and RouterClient are such."""

    @property
    def num_renormalised(self) -> int:
        """Grows with every result that lacks experts."""

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Any:
        """Send x [T, d] float32 on its way; x must not change until `finish`. deadline_s: seconds
        from now that it may take, None = the configured ones."""

    def finish(self, ticket: Any) -> Tensor:
        """The routed experts' output [T, d] float32. Raises RouterError, of which Unavailable at
        the deadline."""


@dataclass(slots=True, eq=False)
class _Line:
    """The connection to one router."""

    worker_id: str
    endpoint: str
    connection: Connection
    seen_generation: int  # of the snapshot that listed it
    in_flight: dict[int, "_Part"] = field(default_factory=dict)  # by request id


@dataclass(slots=True, eq=False)
class _Part:
    """Rows of a micro-batch that fit in one frame."""

    layer: int
    x: Tensor
    line: _Line | None = None  # where it was sent; None = to be sent (again)
    attempt: int = -1
    due_s: float = 0.0
    rows: Tensor | None = None
    error: RemoteRouterError | None = None


@dataclass(slots=True, eq=False)
class Ticket:
    """A micro-batch between begin and finish."""

    layer: int
    shape: tuple[int, int]
    begun_s: float
    deadline_s: float
    parts: list[_Part]


class RouterClient:
    """One thread's way to the deployed routers: stays with one, moves on when it fails.

    A router on the own node is preferred, then the order in which a hash of both names puts them,
    so that attention workers spread over the routers. Resending is safe: routing has no state.
    A router that died is noticed by the end of its connection, one that hangs when the directory
    no longer lists it.
    """

    def __init__(
        self,
        board: SnapshotBoard,
        secret: bytes,
        own_id: str = "",
        own_node: str = "",
        *,
        deadline_s: float = 30.0,
        router_timeout_s: float = 10.0,
        connect_timeout_s: float = 1.0,
        limits: FrameLimits = DEFAULT_LIMITS,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.num_renormalised = 0
        self.late_answers = 0
        self.failovers = 0
        self._board = board
        self._secret = secret
        self._own_id = own_id
        self._own_node = own_node
        self._deadline_s = deadline_s
        self._router_timeout_s = router_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._limits = limits
        self._clock = clock
        self._quarantine = Quarantine()
        self._request_ids = itertools.count(1)
        self._lines: dict[str, _Line] = {}
        self._current: _Line | None = None
        self._seen_generation = 0
        self._last_error = "no router in the snapshot"

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Ticket:
        """Send x [T, d] float32; seconds from now, None = the configured ones. Never waits for a
        router: what cannot be sent now is sent in `finish`."""
        now_s = self._clock()
        until_s = now_s + (self._deadline_s if deadline_s is None else deadline_s)
        per_frame = min(self._limits.max_rows, self._limits.max_payload_bytes // (4 * x.shape[1]))
        starts = range(0, x.shape[0], max(1, per_frame))
        parts = [_Part(layer, x[start : start + per_frame].contiguous()) for start in starts]
        ticket = Ticket(layer, (x.shape[0], x.shape[1]), now_s, until_s, parts)
        for part in parts:
            self._try_send(part, until_s)
        return ticket

    def finish(self, ticket: Ticket) -> Tensor:
        """See MoeClient. Raises RouterUnavailable or RemoteUnavailable at the deadline,
        RemoteRouterError."""
        sums = [self._await(part, ticket) for part in ticket.parts]
        if not sums:
            return torch.zeros(ticket.shape)
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """begin and finish."""
        return self.finish(self.begin(layer, x))

    def close(self) -> None:
        """Close every connection."""
        for line in list(self._lines.values()):
            self._drop(line)

    # --- waiting ---

    def _await(self, part: _Part, ticket: Ticket) -> Tensor:
        while part.rows is None:
            if part.error is not None:
                raise part.error
            now_s = self._clock()
            if now_s >= ticket.deadline_s:
                raise RouterUnavailable(ticket.layer, now_s - ticket.begun_s, self._last_error)
            if part.line is not None:
                self._receive(part.line, min(part.due_s - now_s, ticket.deadline_s - now_s, LOOK_S))
                if part.line is not None:
                    self._doubt(part, part.line)
            elif not self._try_send(part, ticket.deadline_s):
                self._wait_for_router(ticket.deadline_s - now_s)
        return part.rows

    def _doubt(self, part: _Part, line: _Line) -> None:
        """No answer yet: leave the router if it had its time, or others are listed and it is not
        (a directory that restarted knows nobody for a moment)."""
        if self._clock() >= part.due_s:
            self._fail(line, f"{line.worker_id} does not answer")
        elif self._board.generation != line.seen_generation:
            line.seen_generation, snapshot = self._board.current
            listed = {(w.worker_id, w.endpoint) for w in snapshot.workers_of("router")}
            if listed and (line.worker_id, line.endpoint) not in listed:
                self._fail(line, f"{line.worker_id} has left")

    def _wait_for_router(self, left_s: float) -> None:
        release_s = self._quarantine.next_release_s()
        if release_s is not None:
            left_s = min(left_s, release_s - self._clock())
        self._board.wait_newer(self._seen_generation, max(0.001, left_s))

    def _receive(self, line: _Line, timeout_s: float) -> None:
        """Take one answer of a router."""
        try:
            frame = line.connection.receive(max(0.0, timeout_s))
        except ChannelTimeout:
            return
        except (ChannelError, FrameError) as error:
            self._fail(line, str(error))
            return
        part = line.in_flight.pop(frame.request_id, None)
        if part is None or part.line is not line or part.attempt != frame.attempt:
            self.late_answers += 1
            return
        part.line = None
        self._take(part, line, frame)

    def _take(self, part: _Part, line: _Line, frame: Frame) -> None:
        if frame.kind != Kind.ROUTE_RESULT or frame.layer != part.layer:
            self._fail(line, f"{line.worker_id} answered something else")
        elif frame.status in (Status.DRAINING, Status.OVERLOADED):
            self._leave(line, frame.text)
        elif frame.status != Status.OK:
            in_vain = frame.status == Status.DEADLINE
            error_class = RemoteUnavailable if in_vain else RemoteRouterError
            part.error = error_class(part.layer, frame.status.name, frame.text)
        elif frame.rows is None or frame.rows.shape != part.x.shape:
            self._fail(line, f"{line.worker_id} answered rows of another shape")
        else:
            part.rows = frame.rows.float()
            self.num_renormalised += bool(frame.flags & RENORMALISED)
            self._quarantine.absolve(line.worker_id)

    # --- sending ---

    def _try_send(self, part: _Part, deadline_s: float) -> bool:
        """Send to the current router or the next that can be reached; False when none can."""
        while (line := self._current or self._connect_any(deadline_s)) is not None:
            now_s = self._clock()
            part.attempt += 1
            part.due_s = now_s + self._router_timeout_s
            frame = Frame(
                Kind.ROUTE_BATCH,
                request_id=next(self._request_ids),
                attempt=part.attempt,
                layer=part.layer,
                deadline_us=min(max(1, int((deadline_s - now_s) * 1e6)), MAX_DEADLINE_US),
                rows=part.x,
            )
            part.line = line
            line.in_flight[frame.request_id] = part
            try:
                limit_s = min(SEND_TIMEOUT_S, part.due_s - now_s, deadline_s - now_s)
                line.connection.send(frame, max(0.001, limit_s))
            except (ChannelError, FrameError) as error:
                self._fail(line, str(error))
            else:
                return True
        return False

    def _connect_any(self, deadline_s: float) -> _Line | None:
        self._seen_generation, snapshot = self._board.current
        routers = sorted(snapshot.workers_of("router"), key=self._preference)
        for router in routers:
            now_s = self._clock()
            if now_s < deadline_s and self._quarantine.admits(router.worker_id, now_s):
                line = self._line_to(router)
                if line is not None:
                    self._current = line
                    return line
        return None

    def _preference(self, router: WorkerInfo) -> tuple[bool, int, str]:
        spread = crc32(f"{self._own_id}|{router.worker_id}".encode())
        return router.node != self._own_node, spread, router.worker_id

    def _line_to(self, router: WorkerInfo) -> _Line | None:
        line = self._lines.get(router.worker_id)
        if line is not None and line.endpoint == router.endpoint:
            return line
        if line is not None:
            self._drop(line)
        try:
            connection = connect(
                router.endpoint, self._secret, self._limits, self._connect_timeout_s
            )
        except (ChannelError, ValueError) as error:
            self._last_error = str(error)
            self._quarantine.punish(router.worker_id, self._clock())
            return None
        line = _Line(router.worker_id, router.endpoint, connection, self._seen_generation)
        self._lines[router.worker_id] = line
        return line

    def _leave(self, line: _Line, reason: str) -> None:
        """Send nothing more to this router for a while; what it has is still awaited."""
        self._last_error = reason
        self._quarantine.punish(line.worker_id, self._clock())
        if self._current is line:
            self._current = None
            self.failovers += 1

    def _fail(self, line: _Line, reason: str) -> None:
        """Give a router up: what it has must be sent again."""
        self._leave(line, reason)
        self._drop(line)

    def _drop(self, line: _Line) -> None:
        line.connection.close()
        self._lines.pop(line.worker_id, None)
        if self._current is line:
            self._current = None
        for part in line.in_flight.values():
            if part.line is line:
                part.line = None
        line.in_flight.clear()
