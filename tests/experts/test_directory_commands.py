"""Commands, leaving, chaos and rebalancing at the directory: by hand, and over channels."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experts.channel.channel import ChannelClosed, ChannelTimeout, Connection, Server
from experts.channel.frame import Frame, Status
from experts.directory import client as directory_client
from experts.directory.client import COMMAND_TIMEOUT_S, SEND_TIMEOUT_S, DirectoryClient
from experts.directory.roster import RosterRules
from experts.directory.server import Directory
from experts.load import pack
from experts.messages import (
    Assign,
    Chaos,
    Command,
    CommandRefused,
    Done,
    Drain,
    Holding,
    Leave,
    LoadReport,
    Message,
    Rebalance,
    Register,
    Released,
    Replicate,
    Scale,
    Signal,
    Snapshot,
    decode,
    encode,
)
from experts.metrics import Sample
from experts.placement.rebalance import RebalanceRules
from experts.placement.space import ExpertSpace
from tests.experts.pool import register

SECRET = b"test secret"
SPACE = ExpertSpace(moe_layers=(1,), num_experts=4)
PATIENCE_S = 60.0  # only a broken test waits so long
ANY = Chaos(action="kill", role="experts", worker_id=None, duration_s=5.0)


class Desk:
    """The directory's end of a connection: keeps what is sent."""

    peer = "fake"
    credits = 0

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self._changed = threading.Condition()

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        with self._changed:
            self.sent.append(decode(frame))
            self._changed.notify_all()

    def receive(self, timeout_s: float | None = None) -> Frame:
        raise AssertionError("the directory does not receive")

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        pass

    def await_kind(self, kind: type[Message]) -> Message:
        def found() -> list[Message]:
            return [message for message in self.sent if isinstance(message, kind)]

        with self._changed:
            assert self._changed.wait_for(found, PATIENCE_S)
            return found()[-1]


class World:
    """A directory on a fake clock, spoken to without channels; workers hold what they are told."""

    def __init__(self, rules: RosterRules, **options: object) -> None:
        self.now_s = 1000.0
        self.directory = Directory(rules, clock=lambda: self.now_s, **options)  # type: ignore[arg-type]
        self.desks: dict[str, Desk] = {}

    def say(self, name: str, message: Message, request_id: int = 0) -> Frame | None:
        return self.directory.handle(encode(message, request_id), self.desks[name])

    def join(self, registers: Register) -> Desk:
        desk = self.desks[registers.worker_id] = Desk()
        assert self.say(registers.worker_id, registers) is None
        return desk

    def obey(self) -> None:
        """Everybody holds what was assigned last."""
        for name, member in self.directory._roster.experts().items():
            if member.told is not None:
                self.say(name, Holding(epoch=1 << 40, experts=tuple(member.told)))

    def command(self, message: Command) -> str:
        reply = self.say("i", message, request_id=9)
        assert reply is not None and reply.request_id == 9
        if reply.status is not Status.OK:
            raise CommandRefused(reply.text)
        done = decode(reply)
        assert isinstance(done, Done)
        return done.text


def load(rows: tuple[int, ...]) -> LoadReport:
    packed = pack(np.array(rows))
    return LoadReport(window_s=60.0, rows=packed, recent_s=5.0, recent_rows=packed)


@contextlib.contextmanager
def world(workers: str = "ab", slots: int = 3, **options: object) -> Iterator[World]:
    rules = options.pop("rules", None) or RosterRules(SPACE, len(workers), needs_router=False)
    it = World(rules, **options)  # type: ignore[arg-type]
    it.join(register("i", "ingress"))
    it.join(register("att", "attention"))
    for name in workers:
        it.join(register(name, slots=slots))
    it.obey()
    assert it.directory.snapshot.ready
    yield it
    it.directory.close()


def test_a_leaver_is_released_after_the_snapshot_without_it() -> None:
    with world(slots=4) as it:
        assert it.say("a", Leave()) is None
        assert not [m for m in it.desks["a"].sent if isinstance(m, Released)]
        it.obey()
        desk = it.desks["a"]
        desk.await_kind(Released)
        last = [message for message in desk.sent if isinstance(message, Snapshot)][-1]
        assert desk.sent.index(last) < desk.sent.index(Released())
        assert last.holders_of(1) == (("b",),) * 4
        assert it.directory.counters.released == 1


def test_leave_of_a_stranger_is_refused() -> None:
    with world() as it:
        it.desks["x"] = Desk()
        reply = it.say("x", Leave())
        assert reply is not None and reply.status is Status.FAILED
        assert "leave: register first" in reply.text


def test_what_is_to_be_dropped_is_unpublished_before_it_is_dropped() -> None:
    with world(slots=4) as it:
        it.command(Drain(worker_id="a"))
        it.obey()
        desk = it.desks["a"]
        while not (isinstance(last := desk.await_kind(Assign), Assign) and last.experts == ()):
            time.sleep(0.001)
        assert isinstance(desk.sent[desk.sent.index(last) - 1], Snapshot)


def test_commands_need_a_member_and_answer_with_the_request_id() -> None:
    with world() as it:
        it.desks["x"] = Desk()
        reply = it.say("x", Rebalance(), request_id=4)
        assert reply is not None and reply.status is Status.FAILED and reply.request_id == 4
        assert "rebalance: register first" in reply.text
        assert it.command(Scale(role="experts", workers=3)) == "experts: 3 workers from now on"
        assert it.directory.snapshot.scale == {"experts": 3}
        it.command(Replicate(layer=1, expert=2, replicas=2))
        it.obey()
        assert it.directory.snapshot.holders_of(1)[2] == ("a", "b")
        with pytest.raises(CommandRefused, match="no expert worker q: one of a, b"):
            it.command(Drain(worker_id="q"))


def test_a_leaver_that_is_the_first_with_a_new_directory_is_not_let_go() -> None:
    it = World(RosterRules(SPACE, 2, needs_router=False))
    holds = [(1, e) for e in range(4)]
    desk = it.join(register("a", slots=4, holds=holds, seen_version=9, seen_epoch=3))
    it.say("a", Leave())
    it.now_s += 1.0
    it.directory.tick()
    assert it.directory.snapshot.holders_of(1) == (("a",),) * 4
    it.join(register("b", slots=4, seen_version=9))
    it.obey()
    desk.await_kind(Released)
    assert it.directory.snapshot.holders_of(1) == (("b",),) * 4
    it.directory.close()


def test_rebalancing_by_command_and_by_the_clock() -> None:
    rules = RosterRules(
        SPACE, 2, needs_router=False, rebalance=RebalanceRules(every_s=10.0, max_moves=1)
    )
    with world(rules=rules) as it:
        assert it.directory.snapshot.holders_of(1) == (("a",), ("b",), ("a",), ("b",))
        assert it.command(Rebalance()) == "nothing moved: no load has been reported yet"
        it.say("a", load((50, 0, 50, 0)))
        it.say("b", load((0, 1, 0, 1)))
        it.now_s += 9.9
        it.directory.tick()
        assert it.directory.counters.steps == 0
        it.now_s += 0.1
        it.directory.tick()
        assert (it.directory.counters.steps, it.directory.counters.moves) == (1, 1)
        assert Sample("shoal_expert_moves_total", (), 1) in it.directory.samples()
        it.obey()
        assert it.directory.snapshot.holders_of(1) == (("a", "b"), ("b",), ("a",), ("b",))
        text = it.command(Rebalance())  # at once, whatever the clock says
        assert text == "dropped 1 replica, busiest worker 47 % -> 2 % above the mean"


def test_the_lock_is_free_while_a_step_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    with world() as it:
        it.say("a", load((50, 0, 50, 0)))
        planning, go_on, texts = threading.Event(), threading.Event(), []
        from experts.directory import rebalancer

        plan = rebalancer.Step.plan

        def slow(step: rebalancer.Step) -> object:
            planning.set()
            assert go_on.wait(PATIENCE_S)
            return plan(step)

        monkeypatch.setattr(rebalancer.Step, "plan", slow)
        thread = threading.Thread(target=lambda: texts.append(it.command(Rebalance())))
        thread.start()
        assert planning.wait(PATIENCE_S)
        it.join(register("c"))  # would wait for the lock
        go_on.set()
        thread.join(PATIENCE_S)
        assert texts == ["nothing moved: the pool has changed meanwhile, ask again"]


def test_chaos_is_refused_unless_enabled_and_names_whom_it_hit() -> None:
    with world() as it, pytest.raises(CommandRefused, match="chaos is not enabled: start the"):
        it.command(ANY)
    with world(enable_chaos=True) as it:
        text = it.command(ANY)
        name = text.removeprefix("kill sent to ")
        assert name in ("a", "b")
        assert it.desks[name].await_kind(Signal) == Signal(action="kill", duration_s=5.0)
        stop = Chaos(action="stop", role="experts", worker_id="b", duration_s=2.5)
        assert it.command(stop) == "stop sent to b for 2.5 s"
        with pytest.raises(CommandRefused, match="no worker of role router: there is none"):
            it.command(ANY.model_copy(update={"role": "router"}))
        with pytest.raises(CommandRefused, match="no att of role experts: one of a, b"):
            it.command(ANY.model_copy(update={"worker_id": "att"}))


# ---------------------------------------------------------------- over channels


class Node:
    """A worker that holds at once whatever it is told to."""

    def __init__(self, endpoint: str, registers: Register) -> None:
        self.signals: list[Signal] = []
        self.endpoint = endpoint
        self.client = DirectoryClient(
            lambda: self.endpoint,
            SECRET,
            registers,
            on_assign=self.load,
            on_signal=self.signal,
        )
        self.client.start()

    def load(self, assign: Assign) -> None:
        self.client.report_holding(assign.experts, assign.epoch)

    def signal(self, signal: Signal) -> None:
        self.signals.append(signal)
        raise RuntimeError("a bug of the owner")


class Cluster:
    def __init__(self, stack: contextlib.ExitStack, endpoint: str) -> None:
        self.stack, self.endpoint = stack, endpoint
        self.nodes: dict[str, Node] = {}

    def serve(self) -> Directory:
        rules = RosterRules(SPACE, 2, needs_router=False)
        directory = Directory(rules, enable_chaos=True, silence_limit_s=10.0)
        directory.start(self.endpoint, SECRET)
        self.stack.callback(directory.close)
        return directory

    def add(self, registers: Register) -> DirectoryClient:
        node = self.nodes[registers.worker_id] = Node(self.endpoint, registers)
        self.stack.callback(node.client.close)
        return node.client


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """a and b hold two of four experts each and have room for all; i asks."""
    with contextlib.ExitStack() as stack:
        it = Cluster(stack, f"unix:{tmp_path}/d.sock")
        it.serve()
        it.add(register("att", "attention"))
        for name in "ab":
            it.add(register(name, slots=2, spare=2))
        it.add(register("i", "ingress")).wait_ready(PATIENCE_S)
        yield it


def test_leaving_over_a_channel_ends_when_the_other_has_it_all(cluster: Cluster) -> None:
    leaver, asker = cluster.nodes["a"].client, cluster.nodes["i"].client
    assert leaver.leave(PATIENCE_S)
    snapshot = asker.snapshot
    while snapshot is not None and snapshot.holders_of(1) != (("b",),) * 4:
        snapshot = asker.wait_newer(snapshot.version, PATIENCE_S)
    assert snapshot is not None and snapshot.ready


def test_all_may_leave_at_once(cluster: Cluster) -> None:
    clients, left = [cluster.nodes[name].client for name in "ab"], []
    threads = [
        threading.Thread(target=lambda c=client: left.append(c.leave(PATIENCE_S)))
        for client in clients
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert left == [True, True]


def test_leaving_a_directory_that_does_not_let_go_ends_with_the_time(tmp_path: Path) -> None:
    asked = threading.Semaphore(0)

    def handle(frame: Frame, connection: Connection) -> None:
        if isinstance(decode(frame), Leave):
            asked.release()

    server = Server(f"unix:{tmp_path}/d.sock", handle, SECRET)
    server.start()
    client = DirectoryClient(lambda: server.endpoint, SECRET, register("a"), ping_interval_s=0.02)
    client.start()
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(client.leave(1.0)))
    thread.start()
    assert asked.acquire(timeout=PATIENCE_S)
    assert asked.acquire(timeout=PATIENCE_S)  # again after the silence broke the line
    thread.join(PATIENCE_S)
    assert results == [False]
    client.close()
    server.close()


def test_leaving_without_a_directory_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_client, "NO_LINE_LIMIT_S", 0.05)
    client = DirectoryClient(lambda: "inproc:nobody-listens", SECRET, register("a"))
    client.start()
    begun_s = time.monotonic()
    assert not client.leave(PATIENCE_S)
    assert time.monotonic() - begun_s < PATIENCE_S / 2
    client.close()


def test_commands_over_a_channel_and_refusals_that_cost_nothing(cluster: Cluster) -> None:
    asker = cluster.nodes["i"].client
    assert asker.command(Scale(role="attention", workers=2)) == "attention: 2 workers from now on"
    for _ in range(3):
        with pytest.raises(CommandRefused, match="no expert worker q: one of a, b") as caught:
            asker.command(Drain(worker_id="q"))
        assert "\n" not in str(caught.value)
    snapshot = asker.snapshot
    assert snapshot is not None
    while snapshot.scale != {"attention": 2}:
        newer = asker.wait_newer(snapshot.version, PATIENCE_S)
        assert newer is not None
        snapshot = newer
    assert [worker.worker_id for worker in snapshot.workers] == ["a", "att", "b", "i"]
    assert asker.command(Drain(worker_id="a")) == "a hands over its 2 experts"


def test_a_signal_reaches_its_worker_whose_bug_costs_nothing(cluster: Cluster) -> None:
    asker = cluster.nodes["i"].client
    kill = ANY.model_copy(update={"worker_id": "b"})
    for number in (1, 2):
        assert asker.command(kill) == "kill sent to b"
        deadline_s = time.monotonic() + PATIENCE_S
        while len(cluster.nodes["b"].signals) < number:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
    assert cluster.nodes["b"].signals == [Signal(action="kill", duration_s=5.0)] * 2


@pytest.mark.parametrize("hangs_up", [False, True])
def test_a_command_that_nobody_answers(tmp_path: Path, hangs_up: bool) -> None:
    joined = threading.Event()

    def handle(frame: Frame, connection: Connection) -> None:
        if isinstance(decode(frame), Rebalance) and hangs_up:
            connection.close()
        joined.set()

    server = Server(f"unix:{tmp_path}/d.sock", handle, SECRET)
    server.start()
    client = DirectoryClient(
        lambda: server.endpoint, SECRET, register("i", "ingress"), ping_interval_s=PATIENCE_S
    )
    client.start()
    assert joined.wait(PATIENCE_S)
    with pytest.raises(ChannelClosed if hangs_up else ChannelTimeout):
        client.command(Rebalance(), PATIENCE_S if hangs_up else 0.05)
    client.close()
    with pytest.raises(ChannelClosed):
        client.command(Rebalance())
    server.close()


def test_a_command_holds_the_line_no_longer_than_other_messages() -> None:
    """To a directory that does not read: who has something else to tell waits behind it."""
    limits_s: list[float] = []

    class Full:
        def send(self, frame: Frame, timeout_s: float) -> None:
            limits_s.append(timeout_s)
            raise ChannelTimeout("full")

    client = DirectoryClient(lambda: "inproc:nobody", SECRET, register("i", "ingress"))
    client._line = Full()  # type: ignore[assignment]
    for timeout_s in (COMMAND_TIMEOUT_S, 0.5):
        with pytest.raises(ChannelTimeout, match="full"):
            client.command(Rebalance(), timeout_s)
    assert limits_s == [SEND_TIMEOUT_S, 0.5] and SEND_TIMEOUT_S < COMMAND_TIMEOUT_S


def test_what_a_newer_assign_drops_is_not_registered_again(tmp_path: Path) -> None:
    """A worker that reconnects while it is about to drop an expert does not bring it along."""
    registers: list[Register] = []
    told = threading.Semaphore(0)

    def handle(frame: Frame, connection: Connection) -> None:
        message = decode(frame)
        if isinstance(message, Register):
            registers.append(message)
            told.release()

    server = Server(f"unix:{tmp_path}/d.sock", handle, SECRET)
    server.start()
    client = DirectoryClient(
        lambda: server.endpoint, SECRET, register("a"), ping_interval_s=PATIENCE_S
    )
    client.start()
    assert told.acquire(timeout=PATIENCE_S)
    client.report_holding([(1, 0), (1, 1)])
    (line,) = server.connections
    line.send(encode(Assign(epoch=6, experts=[(1, 1), (1, 2)])))
    news = Snapshot(version=3, epoch=2, ready=False, stage="", scale={"experts": 2})
    line.send(encode(news.model_copy(update={"drained": ("a",)})))
    assert client.wait_newer(0, PATIENCE_S)
    line.close()
    assert told.acquire(timeout=PATIENCE_S)
    again = registers[-1]
    assert again.holds == ((1, 1),)
    assert (again.seen_epoch, again.seen_version, again.seen_scale) == (6, 3, {"experts": 2})
    assert again.drained
    client.close()
    server.close()
