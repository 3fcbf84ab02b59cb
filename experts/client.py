"""How a router talks to the expert workers: one socket a worker, send all, then gather.

A *hop* is one batch to one worker and its answer. Whatever goes wrong with a hop ends as a `Fault`
of that hop, never as an exception, so that its pairs can go to another holder while the other hops
go on. Answers are matched by request id and attempt; one that nobody waits for is dropped.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from experts.channel.channel import (
    ChannelError,
    ChannelTimeout,
    Connection,
    connect,
    wait_readable,
)
from experts.channel.frame import (
    DEFAULT_LIMITS,
    MAX_DEADLINE_US,
    Frame,
    FrameError,
    FrameLimits,
)
from experts.health import WorkerHealth
from experts.hop import Fault, Hop, check_reply
from experts.messages import WorkerInfo
from experts.snapshots import SnapshotBoard

PIPELINE_BYTES = 64 * 1024
"""Unanswered bytes of a connection up to which a further batch is sent.

A worker does not read while it writes an answer. With more in flight than the socket buffers hold,
both sides could wait for the other to read.
"""
_PUNISHED = frozenset({Fault.MALFORMED, Fault.OVERLOADED, Fault.DRAINING, Fault.DEADLINE})
"""Faults that the answer itself shows, and that sending again at once would only repeat."""


@dataclass(slots=True, eq=False)
class _Line:
    """The connection to one worker and what is under way on it."""

    worker_id: str
    endpoint: str
    connection: Connection
    in_flight: dict[int, Hop] = field(default_factory=dict)  # by request id
    queued: deque[Hop] = field(default_factory=deque)
    num_bytes: int = 0  # of the hops in flight
    hung: bool = False  # a hop timed out and was abandoned; no sign of life since

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer."""
        return not self.queued and all(hop.abandoned for hop in self.in_flight.values())

    def has_room(self, hop: Hop) -> bool:
        return not self.in_flight or self.num_bytes + hop.num_bytes <= PIPELINE_BYTES


@dataclass(slots=True)
class HopCounters:
    """Since the start of this client."""

    answers: int = 0
    late_answers: int = 0
    connects: int = 0
    faults: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(Fault, 0))


class ExpertClient:
    """Connections to the expert workers of the newest snapshot. One thread at a time uses it."""

    def __init__(
        self,
        board: SnapshotBoard,
        secret: bytes,
        health: WorkerHealth,
        limits: FrameLimits = DEFAULT_LIMITS,
        connect_timeout_s: float = 1.0,
    ) -> None:
        self.health = health
        self.counters = HopCounters()
        self._now = health.clock
        self._board = board
        self._secret = secret
        self._limits = limits
        self._connect_timeout_s = connect_timeout_s
        self._request_ids = itertools.count(1)
        self._generation = -1
        self._members: dict[str, WorkerInfo] = {}
        self._lines: dict[str, _Line] = {}

    def post(self, hop: Hop) -> None:
        """Send the batch, or queue it behind what the worker has not answered yet."""
        if self._board.generation != self._generation:
            self._follow_snapshot()
        line = self._lines.get(hop.worker_id)
        if line is None or line.hung:
            line = self._reconnect(hop, line)
            if line is None:
                return
        self.health.add_rows(hop.worker_id, hop.num_rows)
        if line.has_room(hop):
            self._transmit(line, hop)
        else:
            self._give_time(hop)
            line.queued.append(hop)

    def gather(self, hops: Sequence[Hop]) -> None:
        """Wait until every hop is settled or due; also collects answers to others' hops."""
        while waiting := [hop for hop in hops if not hop.settled]:
            left_s = min(hop.due_s for hop in waiting) - self._now()
            self._receive_any(max(0.0, left_s))  # once more when due: an answer may lie there
            for hop in waiting:
                if not hop.settled and hop.due_s <= self._now():
                    self._fail(hop, Fault.TIMEOUT)

    def wait_again(self, hop: Hop) -> None:
        """Give a timed-out hop more time: nobody else has its experts."""
        hop.fault = None
        self._give_time(hop)

    def abandon(self, hop: Hop) -> None:
        """Nobody wants the answer any more: drop it when it comes."""
        hop.abandoned = True
        line = self._lines.get(hop.worker_id)
        if line is None:
            return
        if hop in line.queued:
            line.queued.remove(hop)
            self.health.add_rows(hop.worker_id, -hop.num_rows)
        elif hop.fault is Fault.TIMEOUT:
            line.hung = True

    def exchange(self, hops: Sequence[Hop]) -> None:
        """Send all, then gather."""
        for hop in hops:
            self.post(hop)
        self.gather(hops)

    def close(self) -> None:
        """Close every connection; hops under way fail as LOST."""
        for line in list(self._lines.values()):
            self._drop(line, Fault.LOST, "client closed")

    def _give_time(self, hop: Hop) -> float:
        """The worker has from now, which is returned, until due_s."""
        now_s = self._now()
        hop.due_s = min(now_s + self.health.hop_timer.timeout_s, hop.deadline_s)
        return now_s

    # --- connections ---

    def _follow_snapshot(self) -> None:
        """Learn who is there; close connections to workers that left or restarted, once idle."""
        generation, snapshot = self._board.current
        before, self._members = self._members, {}
        for info in snapshot.workers_of("experts"):
            self._members[info.worker_id] = info
            known = before.get(info.worker_id, info)
            if (known.pid, known.endpoint) != (info.pid, info.endpoint):
                self.health.quarantine.absolve(info.worker_id)  # another process, another chance
        self.health.keep_only(self._members.keys())
        gone = [line for line in self._lines.values() if not self._is_current(line)]
        for line in gone:
            if line.idle:
                self._drop(line, Fault.LOST, "worker left")
        if all(line.idle for line in gone):
            self._generation = generation

    def _is_current(self, line: _Line) -> bool:
        info = self._members.get(line.worker_id)
        return info is not None and info.endpoint == line.endpoint

    def _reconnect(self, hop: Hop, line: _Line | None) -> _Line | None:
        """A new connection to the worker; None after failing the hop."""
        if line is not None:  # it hung: let it prove by a handshake that it lives
            self._drop(line, Fault.LOST, "reconnecting")
        info = self._members.get(hop.worker_id)
        endpoint = info.endpoint if info else ""
        timeout_s = max(0.001, min(self._connect_timeout_s, hop.deadline_s - self._now()))
        try:
            connection = connect(endpoint, self._secret, self._limits, timeout_s)
        except (ChannelError, ValueError) as error:
            self._fail(hop, Fault.LOST, str(error))
            self.health.quarantine.punish(hop.worker_id, self._now())
            return None
        self.counters.connects += 1
        line = self._lines[hop.worker_id] = _Line(hop.worker_id, endpoint, connection)
        return line

    def _drop(self, line: _Line, fault: Fault, detail: str) -> None:
        """Close a connection; everything under way on it fails."""
        line.connection.close()
        if self._lines.get(line.worker_id) is line:
            del self._lines[line.worker_id]
        for hop in (*line.in_flight.values(), *line.queued):
            self.health.add_rows(line.worker_id, -hop.num_rows)
            if not hop.abandoned and hop.fault in (None, Fault.TIMEOUT):
                self._fail(hop, fault, detail)
        line.in_flight.clear()
        line.queued.clear()

    def _lose(self, line: _Line, fault: Fault, detail: str) -> None:
        """The connection failed: drop it and leave the worker alone for a while."""
        self._drop(line, fault, detail)
        self.health.quarantine.punish(line.worker_id, self._now())

    # --- sending ---

    def _transmit(self, line: _Line, hop: Hop) -> None:
        frame, now_s = hop.frame, self._give_time(hop)
        hop.sent_s = now_s
        frame.request_id = next(self._request_ids)
        left_us = int((hop.deadline_s - now_s) * 1e6)
        frame.deadline_us = min(max(1, left_us), MAX_DEADLINE_US)
        line.in_flight[frame.request_id] = hop
        line.num_bytes += hop.num_bytes
        try:
            line.connection.send(frame, max(0.001, hop.due_s - now_s))
        except FrameError as error:  # over the peer's limits: nothing was sent
            self._unsend(line, hop, Fault.FAILED, str(error))
        except ChannelTimeout as error:
            if line.connection.closed:
                self._lose(line, Fault.LOST, str(error))
            else:
                self._unsend(line, hop, Fault.OVERLOADED, str(error))
        except ChannelError as error:
            self._lose(line, Fault.LOST, str(error))

    def _unsend(self, line: _Line, hop: Hop, fault: Fault, detail: str) -> None:
        self._retire(line, hop)
        self._fail(hop, fault, detail)
        self._punish(line, fault)

    def _retire(self, line: _Line, hop: Hop) -> None:
        """The hop is no longer in flight."""
        del line.in_flight[hop.frame.request_id]
        line.num_bytes -= hop.num_bytes
        self.health.add_rows(hop.worker_id, -hop.num_rows)

    # --- receiving ---

    def _receive_any(self, timeout_s: float) -> None:
        """Take one frame of every connection that has one, waiting at most timeout_s.

        Answers of inproc workers lie ready since `send`; polling for them takes longer.
        """
        busy = [line for line in self._lines.values() if line.in_flight]
        if len(busy) > 1 and busy[0].connection.fileno() >= 0:
            ready = set(map(id, wait_readable([line.connection for line in busy], timeout_s)))
            busy = [line for line in busy if id(line.connection) in ready]
        for line in busy:
            self._receive(line, timeout_s)

    def _receive(self, line: _Line, timeout_s: float) -> None:
        try:
            frame = line.connection.receive(timeout_s)
        except ChannelTimeout:
            return
        except FrameError as error:
            self._lose(line, Fault.MALFORMED, str(error))
            return
        except ChannelError as error:
            self._lose(line, Fault.LOST, str(error))
            return
        self._settle(line, frame)
        while line.queued and line.has_room(line.queued[0]) and not line.connection.closed:
            self._transmit(line, line.queued.popleft())

    def _settle(self, line: _Line, frame: Frame) -> None:
        hop = line.in_flight.get(frame.request_id)
        if hop is None or hop.frame.attempt != frame.attempt:
            self.counters.late_answers += 1
            return
        self._retire(line, hop)
        line.hung = False
        if hop.abandoned:
            self.counters.late_answers += 1
            self.health.quarantine.absolve(line.worker_id)
            return
        fault = check_reply(hop, frame)
        if fault is None:
            hop.reply, hop.fault = frame, None
            self.counters.answers += 1
            self.health.hop_timer.observe(self._now() - hop.sent_s)
            self.health.quarantine.absolve(line.worker_id)
            return
        self._fail(hop, fault, frame.text)
        if fault is Fault.MALFORMED:
            self._drop(line, Fault.LOST, "protocol broken")
        self._punish(line, fault)

    def _punish(self, line: _Line, fault: Fault) -> None:
        if fault in _PUNISHED:
            self.health.quarantine.punish(line.worker_id, self._now())

    def _fail(self, hop: Hop, fault: Fault, detail: str = "") -> None:
        hop.fail(fault, detail)
        self.counters.faults[fault] += 1
