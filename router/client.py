"""How attention calls a router: in its own process or, with fail-over, a deployed one."""

import itertools
import logging
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
from router.times import HopTimes, LayerHop, Wait

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""How long a wait goes on without a look whether the router is still listed: a router that hangs
keeps its connection, and only the directory knows."""
SEND_TIMEOUT_S = 2.0
"""A router reads at once; one that does not for so long hangs."""
GRACE_S = 2.0
"""A router whose own wait for experts is over answers by then, and all that queued behind it."""


class MoeClient(Protocol):
    """What the layer loop needs of the routed experts; RouterWorker, RouterClient and LocalMoe are
    such.

    x is [T, d] float32 or bfloat16 on the host. A client with `accepts_device` takes it on the
    device as well; one with `capturable` waits neither for the host nor for the device, so that its
    calls may be part of a captured graph.
    """

    @property
    def num_renormalised(self) -> int:
        """Grows with every result that lacks experts."""

    @property
    def hop_times(self) -> HopTimes:
        """Grows with every layer; of a client without hops it is zero."""

    def log_hops(self, log: list[LayerHop] | None) -> None:
        """Add every layer that is finished from now on to `log`; None: no more."""

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Any:
        """Send x on its way; it must not change until `finish`. deadline_s: seconds from now that
        it may take, if that is less than the configured ones."""

    def finish(self, ticket: Any) -> Tensor:
        """The routed experts' output [T, d], summed in float32, where x lies: float32, or the dtype
        of x if another process summed. Raises RouterError, of which Unavailable at the deadline."""


@dataclass(slots=True, eq=False)
class _Line:
    """The connection to one router."""

    worker_id: str
    endpoint: str
    connection: Connection
    seen_generation: int  # of the snapshot that listed it
    in_flight: dict[int, "_Part"] = field(default_factory=dict)  # by request id, oldest first

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer."""
        return all(part.line is not self for part in self.in_flight.values())


@dataclass(slots=True, eq=False)
class _Part:
    """Rows of a micro-batch that fit in one frame."""

    layer: int
    x: Tensor
    line: _Line | None = None  # where it was sent; None = to be sent (again)
    attempt: int = -1
    sent_s: float = 0.0
    due_s: float = 0.0
    rows: Tensor | None = None
    error: RemoteRouterError | None = None
    wait: Wait | None = None


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
    no longer lists it, or when it is silent for longer than it may wait for experts. Its silence at
    the deadline of a ticket says nothing: it may wait for experts just as long.
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
        """deadline_s: how long a micro-batch may take, and how long a router itself waits for
        experts; router_timeout_s: how long it may be silent, never less than that and GRACE_S."""
        self.num_renormalised = 0
        self.late_answers = 0
        self.failovers = 0
        self._hop_s = 0.0
        self._expert_us = 0
        self._hop_log: list[LayerHop] | None = None
        self._board = board
        self._secret = secret
        self._own_id = own_id
        self._own_node = own_node
        self._deadline_s = deadline_s
        self._router_timeout_s = max(router_timeout_s, deadline_s + GRACE_S)
        self._connect_timeout_s = connect_timeout_s
        self._limits = limits
        self._clock = clock
        self._quarantine = Quarantine(kind="router")
        self._request_ids = itertools.count(1)
        self._lines: dict[str, _Line] = {}
        self._current: _Line | None = None
        self._seen_generation = -1
        self._routers: list[WorkerInfo] = []  # listed, best first
        self._looked_s = 0.0  # when they were last tried
        self._last_error = "no router in the snapshot"

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Ticket:
        """Send x [T, d]; deadline_s: see MoeClient. Never waits for a router: what cannot be sent
        now is sent in `finish`."""
        now_s, limit_s = self._clock(), self._deadline_s
        until_s = now_s + (limit_s if deadline_s is None else min(limit_s, deadline_s))
        row_bytes = x.itemsize * x.shape[1]
        per_frame = min(self._limits.max_rows, self._limits.max_payload_bytes // row_bytes)
        starts = range(0, x.shape[0], max(1, per_frame))
        parts = [_Part(layer, x[start : start + per_frame].contiguous()) for start in starts]
        ticket = Ticket(layer, (x.shape[0], x.shape[1]), now_s, until_s, parts)
        for part in parts:
            self._try_send(part, until_s)
        self._hop_s += self._clock() - now_s
        return ticket

    def finish(self, ticket: Ticket) -> Tensor:
        """See MoeClient. Raises RouterUnavailable or RemoteUnavailable at the deadline,
        RemoteRouterError."""
        begun_s = self._clock()
        try:
            sums = [self._await(part, ticket) for part in ticket.parts]
        finally:
            for part in ticket.parts:
                part.line = None  # nobody waits for what comes now
            self._account(ticket, begun_s)
        if not sums:
            return torch.zeros(ticket.shape)
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """begin and finish."""
        return self.finish(self.begin(layer, x))

    @property
    def hop_times(self) -> HopTimes:
        """See MoeClient."""
        return HopTimes(self._hop_s, self._expert_us * 1e-6)

    def log_hops(self, log: list[LayerHop] | None) -> None:
        """See MoeClient."""
        self._hop_log = log

    def _account(self, ticket: Ticket, begun_s: float) -> None:
        """What `finish` took since begun_s."""
        now_s = self._clock()
        self._hop_s += now_s - begun_s
        if self._hop_log is not None:
            waits = (part.wait for part in ticket.parts)
            self._hop_log.append(LayerHop.of(ticket.layer, ticket.begun_s, now_s, waits))

    def close(self) -> None:
        """Close every connection."""
        for line in list(self._lines.values()):
            self._drop(line)

    # --- waiting ---

    def _await(self, part: _Part, ticket: Ticket) -> Tensor:
        while part.rows is None:
            if part.error is not None:
                raise part.error
            line, left_s = part.line, ticket.deadline_s - self._clock()
            # at the deadline too: its word why is under way, or this process has slept
            limit_s = min(left_s, LOOK_S) if left_s > 0 else LOOK_S
            if line is not None and self._receive(line, limit_s):
                continue
            if left_s <= 0:
                why = f"{line.worker_id} has not answered" if line else self._last_error
                raise RouterUnavailable(ticket.layer, self._clock() - ticket.begun_s, why)
            if line is not None:
                self._doubt(line)
            elif not self._try_send(part, ticket.deadline_s):
                self._wait_for_router(left_s)
        return part.rows

    def _doubt(self, line: _Line) -> None:
        """No answer yet: leave the router if the oldest batch that it has had its time, or others
        are listed and it is not (a directory that restarted knows nobody for a moment)."""
        oldest = next(iter(line.in_flight.values()))
        if self._clock() >= oldest.due_s:
            self._fail(line, "it does not answer")
        elif self._board.generation != line.seen_generation:
            line.seen_generation, snapshot = self._board.current
            listed = {(w.worker_id, w.endpoint) for w in snapshot.workers_of("router")}
            if listed and (line.worker_id, line.endpoint) not in listed:
                self._stop_using(line)
                self._drop(line)

    def _wait_for_router(self, left_s: float) -> None:
        release_s = self._quarantine.next_release_s(self._looked_s)
        if release_s is not None:
            left_s = min(left_s, release_s - self._clock())
        self._board.wait_newer(self._seen_generation, max(0.001, left_s))

    def _receive(self, line: _Line, timeout_s: float) -> bool:
        """Take one answer of a router, or its end; whether there was any."""
        try:
            frame = line.connection.receive(timeout_s)
        except ChannelTimeout:
            return False
        except (ChannelError, FrameError) as error:
            self._fail(line, str(error))
            return True
        part = line.in_flight.pop(frame.request_id, None)
        if part is None or part.line is not line or part.attempt != frame.attempt:
            self.late_answers += 1
            return True
        part.line = None
        self._take(part, line, frame)
        return True

    def _take(self, part: _Part, line: _Line, frame: Frame) -> None:
        if frame.kind != Kind.ROUTE_RESULT or frame.layer != part.layer:
            self._fail(line, "it answered something else")
        elif frame.status in (Status.DRAINING, Status.OVERLOADED):
            self._leave(line, frame.text)
        elif frame.status != Status.OK:
            in_vain = frame.status == Status.DEADLINE
            error_class = RemoteUnavailable if in_vain else RemoteRouterError
            part.error = error_class(part.layer, frame.status.name, frame.text)
        elif frame.rows is None or frame.rows.shape != part.x.shape:
            self._fail(line, "it answered rows of another shape")
        else:
            part.rows = frame.rows.to(part.x.dtype)
            if self._hop_log is not None:
                part.wait = Wait.of(line.worker_id, frame, self._clock() - part.sent_s)
            self._expert_us += frame.expert_us
            self.num_renormalised += bool(frame.flags & RENORMALISED)
            self._quarantine.absolve(line.worker_id)

    # --- sending ---

    def _try_send(self, part: _Part, deadline_s: float) -> bool:
        """Send to the current router or the next that can be reached; False when none can."""
        if self._board.generation != self._seen_generation:
            self._follow_snapshot()
        while (line := self._current or self._connect_any(deadline_s)) is not None:
            now_s = self._clock()
            part.attempt += 1
            part.sent_s = now_s
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
                limit_s = min(SEND_TIMEOUT_S, deadline_s - now_s)
                line.connection.send(frame, max(0.001, limit_s))
            except (ChannelError, FrameError) as error:
                self._fail(line, str(error))
            else:
                return True
        return False

    def _follow_snapshot(self) -> None:
        """Learn who is there. A router that is not, while others are, gets no more; its connection
        is closed once nobody waits for what it has."""
        self._seen_generation, snapshot = self._board.current
        self._routers = sorted(snapshot.workers_of("router"), key=self._preference)
        listed = {router.worker_id: router.endpoint for router in self._routers}
        self._quarantine.keep_only(listed)
        for line in list(self._lines.values()):
            if listed.get(line.worker_id) == line.endpoint:
                continue
            if listed:
                self._stop_using(line)
            if line.idle and line is not self._current:
                self._drop(line)

    def _connect_any(self, deadline_s: float) -> _Line | None:
        self._looked_s = self._clock()
        for router in self._routers:
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
            self._quarantine.punish(router.worker_id, self._clock(), self._last_error)
            return None
        line = _Line(router.worker_id, router.endpoint, connection, self._seen_generation)
        self._lines[router.worker_id] = line
        return line

    def _stop_using(self, line: _Line) -> None:
        """Others are listed and this one is not."""
        if self._current is line:
            logger.warning("router %s is left: it is no longer listed", line.worker_id)
            self._current = None
            self.failovers += 1

    def _leave(self, line: _Line, reason: str) -> None:
        """Send nothing more to this router for a while; what it has is still awaited."""
        self._last_error = f"router {line.worker_id}: {reason}"
        self._quarantine.punish(line.worker_id, self._clock(), reason)
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
