"""The directory: one per cluster, tells everyone who lives and who holds which expert.

A member's life, which is the life of its connection:

    connected --Register--> member --Assign--> loading --Holding...--> holding
        any of them --Leave--> hands over --Released--> closes its connection
                               (with nothing to hand over, as in other roles, at once)
        any of them --connection ends, or silent for `silence_limit_s`--> gone, at once

After each of these events `Roster.settle` decides (see roster.py for GATHERING and PLACED), the new
Snapshot goes to all and new Assigns to their workers, in this order: what is to be dropped is
unpublished first. When all is loaded, a rebalancing step follows from time to time. State is soft:
a restarted directory learns everything but the pins from what the workers register. It is no single
point of failure for requests: without it routers go on with their last snapshot.

Threads: one a connection (the channel server's) runs `handle`; one a member sends to it, so that a
stuck member delays nobody; one calls `tick`. A lock guards roster and members; nobody sends,
closes a connection or plans a rebalancing step while holding it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping

from experts.channel.channel import Connection, Server
from experts.channel.frame import Frame, Status, reply_to
from experts.directory.commands import carry_out, target_of
from experts.directory.member_line import MemberLine
from experts.directory.rebalancer import Rebalancer
from experts.directory.reports import Reports, load_reply, metrics_reply
from experts.directory.roster import PoolCounters, Roster, RosterRules
from experts.directory.samples import placement_samples
from experts.load import ClusterLoad
from experts.messages import (
    Chaos,
    ClusterLoadReply,
    Command,
    CommandRefused,
    Done,
    Drain,
    Holding,
    Leave,
    LoadReport,
    LoadRequest,
    MessageError,
    MetricsReply,
    MetricsReport,
    MetricsRequest,
    Ping,
    Pong,
    Rebalance,
    Register,
    Replicate,
    Role,
    Scale,
    Signal,
    Snapshot,
    decode,
    encode,
)
from experts.metrics import Sample
from experts.placement.space import Loads, Unit, unit_loads

logger = logging.getLogger(__name__)

TICKS_PER_SILENCE_LIMIT = 6


class Directory:
    """The server side. `start` serves an endpoint; tests call `handle` and `tick` themselves."""

    def __init__(
        self,
        rules: RosterRules,
        *,
        enable_chaos: bool = False,
        silence_limit_s: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enable_chaos = enable_chaos
        self._silence_limit_s = silence_limit_s
        self._clock = clock
        self._lock = threading.Lock()
        self._planning = threading.Lock()  # one rebalancing step at a time
        self._roster = Roster(rules, self._unit_loads)
        self._rebalancer = Rebalancer(self._roster, self._layer_loads, clock())
        self._space = rules.space
        self._reports = Reports(rules.space)
        self._published = self._roster.snapshot
        self._members: dict[Connection, MemberLine] = {}
        self._last_tick_s = clock()
        self._closing = threading.Event()
        self._server: Server | None = None
        self._ticker: threading.Thread | None = None

    @property
    def snapshot(self) -> Snapshot:
        """What was published last."""
        return self._published

    @property
    def counters(self) -> PoolCounters:
        """Of deaths and moves since the start."""
        return self._roster.counters

    def samples(self) -> list[Sample]:
        """Its own numbers: the pool, how even it is, the busiest experts."""
        with self._lock:
            return self._samples()

    def note_sizes(self, sizes: Mapping[Role, int]) -> None:
        """What the policies of some tiers want, for those who watch."""
        with self._lock:
            self._roster.sizes.update(sizes)

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
        except CommandRefused as error:
            return reply_to(frame, status=Status.FAILED, text=str(error))

    def connection_closed(self, connection: Connection) -> None:
        """on_close of the channel server: the member is gone and everyone learns it."""
        with self._lock:
            member = self._remove(connection)
            self._settle()
        if member is not None:
            member.close()

    def tick(self) -> None:
        """What time alone brings about: the end of the grace, and of silent members; balance."""
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
            dropped = [self._remove(connection, "silent") for connection in silent]
            self._settle()
        for member in dropped:
            if member is not None:
                member.close()
        if self._rebalancer.is_due(now_s):
            self._rebalance()

    def _tick_loop(self) -> None:
        while not self._closing.wait(self._silence_limit_s / TICKS_PER_SILENCE_LIMIT):
            try:
                self.tick()
            except Exception:  # without it nobody would notice silent members
                logger.exception("a tick failed")

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
        elif isinstance(message, MetricsReport):
            self._take_metrics(message, connection)
        elif isinstance(message, Leave):
            self._leave(connection)
        elif isinstance(message, LoadRequest):
            return encode(self._cluster_load(connection), frame.request_id)
        elif isinstance(message, MetricsRequest):
            return encode(self._metrics(connection), frame.request_id)
        elif isinstance(message, Command):
            return encode(Done(text=self._command(message, connection)), frame.request_id)
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
            self._reports.drop(register.worker_id)
            now_s = self._clock()
            newcomer = MemberLine(register.worker_id, connection, now_s)
            self._members[connection] = newcomer
            self._roster.join(register, now_s)
            self._settle()
            newcomer.post("snapshot", encode(self._published))
        for member in older:
            member.close()

    def _hold(self, holding: Holding, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, holding.type)
            self._roster.hold(member.worker_id, holding.experts, holding.epoch)
            self._settle()

    def _leave(self, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, "leave")
            self._roster.hand_over(member.worker_id, "leave")
            self._settle()

    def _command(self, command: Command, connection: Connection) -> str:
        """Raises CommandRefused."""
        with self._lock:
            asker = self._member_of(connection, command.type).worker_id
            if isinstance(command, Drain | Replicate | Scale):
                text = carry_out(self._roster, command)
                self._settle()
            elif isinstance(command, Chaos):
                text = self._signal(command)
        if isinstance(command, Rebalance):
            text = self._rebalance()
        logger.info("%s of %s: %s", command.type, asker, text)
        return text

    def _signal(self, chaos: Chaos) -> str:
        """Caller holds the lock."""
        if not self._enable_chaos:
            raise CommandRefused("chaos is not enabled: start the cluster with enable_chaos")
        chosen = target_of(chaos, self._published)
        signal = Signal(action=chaos.action, duration_s=chaos.duration_s)
        for member in self._members.values():
            if member.worker_id == chosen:
                member.post(signal.type, encode(signal))
        for_s = f" for {chaos.duration_s:g} s" if chaos.action == "stop" else ""
        return f"{chaos.action} sent to {chosen}{for_s}"

    def _rebalance(self) -> str:
        """One step, planned without the lock."""
        with self._planning:
            with self._lock:
                step = self._rebalancer.begin(self._clock())
            if isinstance(step, str):
                return step
            plan = step.plan()
            with self._lock:
                text = self._rebalancer.finish(step, plan)
                self._settle()
            return text

    def _layer_loads(self) -> Loads:
        """Rows by layer within the window, {} if there are none. Caller holds the lock."""
        return self._reports.layer_loads(self._roster.experts())

    def _unit_loads(self) -> Mapping[Unit, float]:
        """The same by unit."""
        loads = self._layer_loads()
        return unit_loads(self._space, loads) if loads else {}

    def _cluster_loads(self) -> tuple[ClusterLoad, ClusterLoad]:
        """Of the published workers, within the window and recently. Caller holds the lock."""
        workers = self._published.workers_of("experts")
        return self._reports.cluster_loads([worker.worker_id for worker in workers])

    def _samples(self) -> list[Sample]:
        """Caller holds the lock."""
        return placement_samples(self._roster, *self._cluster_loads())

    def _take_load(self, report: LoadReport, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, report.type)
            try:
                self._reports.take_load(member.worker_id, report)
            except ValueError as error:
                raise MessageError(f"control message: {report.type}: {error}") from None

    def _take_metrics(self, report: MetricsReport, connection: Connection) -> None:
        with self._lock:
            member = self._member_of(connection, report.type)
            self._reports.take_samples(member.worker_id, report.samples)

    def _cluster_load(self, connection: Connection) -> ClusterLoadReply:
        with self._lock:
            self._member_of(connection, "load_request")
            epoch, loads = self._published.epoch, self._cluster_loads()
        return load_reply(epoch, self._space.moe_layers, *loads)

    def _metrics(self, connection: Connection) -> MetricsReply:
        with self._lock:
            self._member_of(connection, "metrics_request")
            own, members = self._samples(), self._reports.samples(self._published)
            gone = self._reports.gone()
        return metrics_reply(own, members, gone)

    def _member_of(self, connection: Connection, message: str) -> MemberLine:
        """Caller holds the lock."""
        member = self._members.get(connection)
        if member is None:
            raise MessageError(f"control message: {message}: register first")
        return member

    def _remove(
        self, connection: Connection, how: str = "its connection ended"
    ) -> MemberLine | None:
        """Caller holds the lock, and closes what it gets after releasing it."""
        member = self._members.pop(connection, None)
        if member is not None:
            self._roster.remove(member.worker_id, how)
            self._reports.drop(member.worker_id)
        return member

    def _forgive(self, now_s: float) -> None:
        """This process itself was stopped or starved: their silence proves nothing."""
        for member in self._members.values():
            member.last_heard_s = now_s

    def _settle(self) -> None:
        """Decide and tell. Caller holds the lock."""
        orders = self._roster.settle(self._clock())
        self._publish()
        for member in self._members.values():
            order = orders.get(member.worker_id)
            if order is not None:
                member.post(order.type, encode(order))

    def _publish(self) -> None:
        snapshot = self._roster.snapshot
        if snapshot is self._published:
            return
        if snapshot.stage != self._published.stage:
            logger.info("version %d: %s", snapshot.version, snapshot.stage)
        self._published = snapshot
        frame = encode(snapshot)
        for member in self._members.values():
            member.post("snapshot", frame)
