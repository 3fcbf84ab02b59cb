"""The directory: one per cluster, tells everyone who lives and who holds which expert.

A member's life, which is the life of its connection:

    connected --Register--> member --Assign--> loading --Holding...--> holding
        any of them --connection ends, or silent for `silence_limit_s`--> gone, at once

After each of these events `Roster.settle` decides (see roster.py for GATHERING and PLACED), new
Assigns go to their workers and the new Snapshot to all. State is soft: a restarted directory learns
everything from what the workers register. It is no single point of failure for requests: without it
routers go on with their last snapshot.

Threads: one a connection (the channel server's) runs `handle`; one a member sends to it, so that a
stuck member delays nobody; one calls `tick`. A lock guards roster and members; nobody sends or
closes a connection while holding it.
"""

import logging
import threading
import time
from collections.abc import Callable

from experts.channel.channel import ChannelClosed, ChannelError, Connection, FrameError, Server
from experts.channel.frame import Frame, Status, reply_to
from experts.load import LoadBoard
from experts.messages import (
    ClusterLoadReply,
    Holding,
    LoadReport,
    LoadRequest,
    MessageError,
    Ping,
    Pong,
    Register,
    Snapshot,
    WorkerRows,
    decode,
    encode,
)
from experts.roster import Roster, RosterRules

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 5.0
TICKS_PER_SILENCE_LIMIT = 6


class _Member:
    """A registered connection and the thread that sends to it; the newest of each kind wins."""

    def __init__(self, worker_id: str, connection: Connection, now_s: float) -> None:
        self.worker_id = worker_id
        self.connection = connection
        self.last_heard_s = now_s
        self._waiting: dict[str, Frame] = {}
        self._closed = False
        self._changed = threading.Condition()
        self._sender = threading.Thread(
            target=self._send_all, name=f"directory-to-{worker_id}", daemon=True
        )
        self._sender.start()

    def post(self, kind: str, frame: Frame) -> None:
        """Send soon, instead of an older frame of the same kind that still waits."""
        with self._changed:
            self._waiting[kind] = frame
            self._changed.notify()

    def close(self) -> None:
        """Close the connection and end the sender."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.connection.close()
        if threading.current_thread() is not self._sender:
            self._sender.join(SEND_TIMEOUT_S)

    def _next(self) -> Frame | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.pop(next(iter(self._waiting)))

    def _send_all(self) -> None:
        while (frame := self._next()) is not None:
            try:
                self.connection.send(frame, SEND_TIMEOUT_S)
            except ChannelClosed:
                return  # on_close removes the member
            except (ChannelError, FrameError) as error:
                logger.warning("cannot tell %s: %s", self.worker_id, error)
                self.connection.close()
                return


class Directory:
    """The server side. `start` serves an endpoint; tests call `handle` and `tick` themselves."""

    def __init__(
        self,
        rules: RosterRules,
        *,
        silence_limit_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._silence_limit_s = silence_limit_s
        self._clock = clock
        self._lock = threading.Lock()
        self._roster = Roster(rules)
        self._space = rules.space
        self._loads = LoadBoard(len(rules.space.moe_layers), rules.space.num_experts)
        self._published = self._roster.snapshot
        self._members: dict[Connection, _Member] = {}
        self._last_tick_s = clock()
        self._closing = threading.Event()
        self._server: Server | None = None
        self._ticker: threading.Thread | None = None

    @property
    def snapshot(self) -> Snapshot:
        """What was published last."""
        return self._published

    @property
    def endpoint(self) -> str:
        """Where it listens, after `start`."""
        return self._server.endpoint if self._server else ""

    def start(self, endpoint: str, secret: bytes) -> None:
        """Serve until `close`. Raises ChannelError when the endpoint is taken."""
        self._server = Server(
            endpoint, self.handle, secret, name="directory", on_close=self.connection_closed
        )
        self._server.start()
        self._ticker = threading.Thread(target=self._tick_loop, name="directory", daemon=True)
        self._ticker.start()

    def close(self) -> None:
        """Stop serving. Members are told nothing: they keep their snapshot and look for another."""
        self._closing.set()
        with self._lock:
            members = list(self._members.values())
            self._members.clear()
        if self._server is not None:
            self._server.close()
        for member in members:
            member.close()
        if self._ticker is not None:
            self._ticker.join()

    def handle(self, frame: Frame, connection: Connection) -> Frame | None:
        """Handler of the channel server; a bad message is answered with one line of text."""
        try:
            return self._handle(frame, connection)
        except MessageError as error:
            logger.warning("%s: %s", connection.peer, error)
            return reply_to(frame, status=Status.FAILED, text=str(error))

    def connection_closed(self, connection: Connection) -> None:
        """on_close of the channel server: the member is gone and everyone learns it."""
        with self._lock:
            member = self._remove(connection)
            self._settle()
        if member is not None:
            member.close()

    def tick(self) -> None:
        """What time alone brings about: the end of the grace, and of silent members."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._last_tick_s > self._silence_limit_s / 2:
                self._forgive(now_s)
            self._last_tick_s = now_s
            silent = [
                connection
                for connection, member in self._members.items()
                if now_s - member.last_heard_s > self._silence_limit_s
            ]
            dropped = [self._remove(connection) for connection in silent]
            self._settle()
        for member in dropped:
            if member is not None:
                logger.warning("%s is silent, removed", member.worker_id)
                member.close()

    def _tick_loop(self) -> None:
        while not self._closing.wait(self._silence_limit_s / TICKS_PER_SILENCE_LIMIT):
            self.tick()

    def _handle(self, frame: Frame, connection: Connection) -> Frame | None:
        message = decode(frame)
        member = self._members.get(connection)
        if member is not None:
            member.last_heard_s = self._clock()
        if isinstance(message, Ping):
            return encode(Pong())
        if isinstance(message, Register):
            self._register(message, connection)
        elif isinstance(message, Holding):
            self._hold(message, connection)
        elif isinstance(message, LoadReport):
            self._take_load(message, connection)
        elif isinstance(message, LoadRequest):
            return encode(self._cluster_load(connection), frame.request_id)
        else:
            raise MessageError(f"control message: {message.type} is for workers only")
        return None

    def _register(self, register: Register, connection: Connection) -> None:
        with self._lock:
            if connection in self._members:
                raise MessageError("control message: register: this connection has registered")
            older = [m for m in self._members.values() if m.worker_id == register.worker_id]
            for member in older:  # its connection is dead, we just have not noticed
                del self._members[member.connection]
            self._loads.drop(register.worker_id)
            now_s = self._clock()
            newcomer = _Member(register.worker_id, connection, now_s)
            self._members[connection] = newcomer
            self._roster.join(register, now_s)
            self._settle()
            newcomer.post("snapshot", encode(self._published))
        for member in older:
            member.close()

    def _hold(self, holding: Holding, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, holding.type)
            self._roster.hold(member.worker_id, holding.experts)
            self._settle()

    def _take_load(self, report: LoadReport, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, report.type)
            try:
                self._loads.put(member.worker_id, report.window_s, report.rows)
            except ValueError as error:
                raise MessageError(f"control message: {report.type}: {error}") from None

    def _cluster_load(self, connection: Connection) -> ClusterLoadReply:
        with self._lock:
            self._member_of(connection, "load_request")
            snapshot = self._published
            live = [worker.worker_id for worker in snapshot.workers_of("experts")]
            load = self._loads.total(live)
        return ClusterLoadReply(
            epoch=snapshot.epoch,
            window_s=load.window_s,
            layers=self._space.moe_layers,
            rows=tuple(map(tuple, load.rows.tolist())),
            workers=tuple(
                WorkerRows(worker_id=worker, rows=tuple(rows.tolist()))
                for worker, rows in load.rows_by_worker.items()
            ),
        )

    def _member_of(self, connection: Connection, message: str) -> _Member:
        """Caller holds the lock."""
        member = self._members.get(connection)
        if member is None:
            raise MessageError(f"control message: {message}: register first")
        return member

    def _remove(self, connection: Connection) -> _Member | None:
        """Caller holds the lock, and closes what it gets after releasing it."""
        member = self._members.pop(connection, None)
        if member is not None:
            self._roster.leave(member.worker_id)
            self._loads.drop(member.worker_id)
        return member

    def _forgive(self, now_s: float) -> None:
        """This process itself was stopped or starved: their silence proves nothing."""
        for member in self._members.values():
            member.last_heard_s = now_s

    def _settle(self) -> None:
        """Decide and tell. Caller holds the lock."""
        assigns = self._roster.settle(self._clock())
        for member in self._members.values():
            if member.worker_id in assigns:
                member.post("assign", encode(assigns[member.worker_id]))
        snapshot = self._roster.snapshot
        if snapshot is self._published:
            return
        if snapshot.stage != self._published.stage:
            logger.info("version %d: %s", snapshot.version, snapshot.stage)
        self._published = snapshot
        frame = encode(snapshot)
        for member in self._members.values():
            member.post("snapshot", frame)
