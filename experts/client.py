"""How a router talks to the expert workers: one socket a worker, send all, then gather.

A *hop* is one batch to one worker and its answer. Whatever goes wrong with a hop ends as a `Fault`
of that hop, never as an exception, so that its pairs can go to another holder while the other hops
go on. Answers are matched by request id and attempt; one that nobody waits for is dropped.
"""

import itertools
import threading
from collections.abc import Sequence

from experts.channel.channel import (
    ChannelError,
    ChannelTimeout,
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
from experts.channel.memory import ChannelMemory
from experts.health import WorkerHealth
from experts.hop import Fault, Hop, check_reply
from experts.hop_counters import HopCounters
from experts.line import Line
from experts.messages import WorkerInfo
from experts.probe import Probe
from experts.snapshots import SnapshotBoard

LOOK_S = 0.02
"""How long a wait goes on without a look whether the snapshot has changed. Most answers come
before the first look, so looking costs them nothing."""
_PUNISHED = frozenset({Fault.MALFORMED, Fault.OVERLOADED, Fault.DRAINING, Fault.DEADLINE})
"""Faults that the answer itself shows, and that sending again at once would only repeat."""


class ExpertClient:
    """Connections to the expert workers of the newest snapshot. One thread at a time uses it."""

    def __init__(
        self,
        board: SnapshotBoard,
        secret: bytes,
        health: WorkerHealth,
        limits: FrameLimits = DEFAULT_LIMITS,
        connect_timeout_s: float = 0.25,
        memory: ChannelMemory | None = None,
    ) -> None:
        """memory: where answers may land, None = on the host."""
        self.health = health
        self.counters = HopCounters()
        self._now = health.clock
        self._board = board
        self._secret = secret
        self._limits = limits
        self._connect_timeout_s = connect_timeout_s
        self._memory = memory
        self._request_ids = itertools.count(1)
        self._generation = -1
        self._members: dict[str, WorkerInfo] = {}
        self._lines: dict[str, Line] = {}

    def takes_device_rows(self, worker_id: str) -> bool:
        """Whether rows for this worker may stay on their device. False before the first batch,
        which goes by the host and opens the connection."""
        line = self._lines.get(worker_id)
        return line is not None and line.connection.accepts_device

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

    def gather(self, hops: Sequence[Hop], generation: int | None = None) -> None:
        """Wait until every hop is settled or due, or there is a later snapshot than of this
        generation; also collects answers to others' hops.

        A hop is not due before every answer that lies there is read: this process may have slept.
        """
        while waiting := [hop for hop in hops if not hop.settled]:
            left_s = min(hop.due_s for hop in waiting) - self._now()
            if self._receive_any(min(max(0.0, left_s), LOOK_S)):
                continue
            for hop in waiting:
                if hop.due_s <= self._now():
                    self._time_out(hop)
            if generation is not None and self._board.generation != generation:
                return

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

    def close(self) -> None:
        """Close every connection; hops under way fail as LOST."""
        for line in list(self._lines.values()):
            self._drop(line, Fault.LOST, "client closed")

    def _give_time(self, hop: Hop) -> float:
        """The worker has from now, which is returned, until due_s."""
        now_s = self._now()
        hop.due_s = min(now_s + self.health.hop_timer.timeout_s(hop.num_rows), hop.deadline_s)
        return now_s

    # --- workers that hang ---

    def _time_out(self, hop: Hop) -> None:
        """No answer when due. A hop cut short by its own deadline says nothing of its worker."""
        hop.late = True
        self._fail(hop, Fault.TIMEOUT)
        if hop.due_s < hop.deadline_s:
            limit_s = self.health.hop_timer.timeout_s(hop.num_rows)
            self._suspend(hop, f"no answer to {hop.num_rows} rows within {limit_s:.2f} s")

    def _suspend(self, hop: Hop, why: str) -> None:
        """Nobody sends to the worker until it answers: here, or a thread that asks it again.

        So a worker that hangs costs a step one timeout, once.
        """
        info = self._members.get(hop.worker_id)
        if info is None:
            return
        if self.health.quarantine.suspend(hop.worker_id, self._now(), f"it hangs, {why}"):
            hop.stage()  # another connection, another thread
            probe = Probe(hop, info.endpoint, self._secret, self._limits)
            name = f"probe {hop.worker_id}"
            threading.Thread(target=self._run_probe, args=(probe,), name=name, daemon=True).start()

    def _run_probe(self, probe: Probe) -> None:
        lives = probe.run(self.health.quarantine)
        if lives:
            self._absolve(probe.worker_id)
        elif lives is False and self.health.quarantine.is_suspended(probe.worker_id):
            self.health.quarantine.punish(probe.worker_id, self._now())
            self._board.touch()

    def _absolve(self, worker_id: str) -> None:
        """It answered: whoever waits for a holder may find one now."""
        if self.health.quarantine.absolve(worker_id):
            self._board.touch()

    # --- connections ---

    def _follow_snapshot(self) -> None:
        """Learn who is there; close connections to workers that left or restarted, once idle."""
        generation, snapshot = self._board.current
        before, self._members = self._members, {}
        for info in snapshot.workers_of("experts"):
            self._members[info.worker_id] = info
            known = before.get(info.worker_id, info)
            if (known.pid, known.endpoint) != (info.pid, info.endpoint):
                self.health.quarantine.forget(info.worker_id)  # another process, another chance
        self.health.keep_only(self._members.keys())
        gone = [line for line in self._lines.values() if not self._is_current(line)]
        for line in gone:
            if line.idle:
                self._drop(line, Fault.LOST, "worker left")
        if all(line.idle for line in gone):
            self._generation = generation

    def _is_current(self, line: Line) -> bool:
        info = self._members.get(line.worker_id)
        return info is not None and info.endpoint == line.endpoint

    def _reconnect(self, hop: Hop, line: Line | None) -> Line | None:
        """A new connection to the worker; None after failing the hop."""
        if line is not None:  # it hung: let it prove by a handshake that it lives
            self._drop(line, Fault.LOST, "reconnecting")
        info = self._members.get(hop.worker_id)
        endpoint = info.endpoint if info else ""
        timeout_s = max(0.001, min(self._connect_timeout_s, hop.deadline_s - self._now()))
        try:
            connection = connect(
                endpoint, self._secret, self._limits, timeout_s, memory=self._memory
            )
        except (ChannelError, ValueError) as error:
            self._fail(hop, Fault.LOST, str(error))
            self._blame(hop, error)
            return None
        self.counters.connects += 1
        line = self._lines[hop.worker_id] = Line(hop.worker_id, endpoint, connection)
        return line

    def _drop(self, line: Line, fault: Fault, detail: str) -> None:
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

    def _lose(self, line: Line, fault: Fault, detail: str) -> None:
        """The connection failed: drop it and leave the worker alone for a while."""
        self._drop(line, fault, detail)
        self.health.quarantine.punish(line.worker_id, self._now(), _told(fault, detail))

    def _blame(self, hop: Hop, error: Exception) -> None:
        """Of one that did not accept or read in time nobody knows whether it is gone or hangs."""
        if isinstance(error, ChannelTimeout):
            self._suspend(hop, str(error))
        else:
            self.health.quarantine.punish(hop.worker_id, self._now())

    # --- sending ---

    def _transmit(self, line: Line, hop: Hop) -> None:
        if hop.on_device and not line.connection.accepts_device:
            hop.stage()  # reconnected since they were picked
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
        except ChannelError as error:
            if isinstance(error, ChannelTimeout) and not line.connection.closed:
                self._unsend(line, hop, Fault.OVERLOADED, str(error))
            else:
                self._drop(line, Fault.LOST, str(error))
                self._blame(hop, error)

    def _unsend(self, line: Line, hop: Hop, fault: Fault, detail: str) -> None:
        self._retire(line, hop)
        self._fail(hop, fault, detail)
        self._punish(line, fault, detail)

    def _retire(self, line: Line, hop: Hop) -> None:
        """The hop is no longer in flight."""
        del line.in_flight[hop.frame.request_id]
        line.num_bytes -= hop.num_bytes
        self.health.add_rows(hop.worker_id, -hop.num_rows)

    # --- receiving ---

    def _receive_any(self, timeout_s: float) -> bool:
        """Take one frame, or the end, of every connection that has one, waiting at most timeout_s.
        Whether there was any.

        Answers of inproc workers lie ready since `send`; polling for them takes longer.
        """
        busy = [line for line in self._lines.values() if line.in_flight]
        if len(busy) > 1 and busy[0].connection.fileno() >= 0:
            ready = set(map(id, wait_readable([line.connection for line in busy], timeout_s)))
            busy = [line for line in busy if id(line.connection) in ready]
        return any([self._receive(line, timeout_s) for line in busy])

    def _receive(self, line: Line, timeout_s: float) -> bool:
        try:
            frame = line.connection.receive(timeout_s)
        except ChannelTimeout:
            return False
        except FrameError as error:
            self._lose(line, Fault.MALFORMED, str(error))
            return True
        except ChannelError as error:
            self._lose(line, Fault.LOST, str(error))
            return True
        self._settle(line, frame)
        while line.queued and line.has_room(line.queued[0]) and not line.connection.closed:
            self._transmit(line, line.queued.popleft())
        return True

    def _settle(self, line: Line, frame: Frame) -> None:
        hop = line.in_flight.get(frame.request_id)
        if hop is None or hop.frame.attempt != frame.attempt:
            self.counters.late_answers += 1
            return
        self._retire(line, hop)
        line.hung = False
        if hop.late:
            self.health.hop_timer.observe(hop.num_rows, self._now() - hop.sent_s)
        if hop.abandoned:
            self.counters.late_answers += 1
            self._absolve(line.worker_id)
            return
        fault = check_reply(hop, frame)
        if fault is None:
            hop.reply, hop.fault, hop.took_s = frame, None, self._now() - hop.sent_s
            self.counters.count_answer(frame, hop.took_s)
            if not hop.late:
                self.health.hop_timer.observe(hop.num_rows, hop.took_s)
            self._absolve(line.worker_id)
            return
        self._fail(hop, fault, frame.text)
        if fault is Fault.MALFORMED:
            self._drop(line, Fault.LOST, "protocol broken")
        self._punish(line, fault, frame.text)

    def _punish(self, line: Line, fault: Fault, detail: str) -> None:
        if fault in _PUNISHED:
            self.health.quarantine.punish(line.worker_id, self._now(), _told(fault, detail))

    def _fail(self, hop: Hop, fault: Fault, detail: str = "") -> None:
        hop.fail(fault, detail)
        self.counters.faults[fault] += 1


def _told(fault: Fault, detail: str) -> str:
    """What the log says of a fault: nothing of one that a busy or leaving worker may have."""
    return f"{fault.value} {detail}".strip() if fault is Fault.MALFORMED else ""
