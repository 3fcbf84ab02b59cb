import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from experts.channel.channel import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    Connection,
    Server,
    connect,
)
from experts.channel.frame import Frame, Kind, Status
from experts.directory.client import DirectoryClient
from experts.directory.roster import RosterRules
from experts.directory.server import Directory
from experts.load import pack
from experts.messages import (
    Assign,
    ClusterLoadReply,
    Holding,
    LoadReport,
    LoadRequest,
    Message,
    MetricsReport,
    MetricsRequest,
    Ping,
    Pong,
    Register,
    Role,
    Snapshot,
    WorkerRows,
    decode,
    encode,
)
from experts.placement.space import ExpertSpace

SECRET = b"test secret"
SPACE = ExpertSpace(moe_layers=(1, 2), num_experts=4)
RULES = RosterRules(SPACE, expected_experts=2)
PATIENCE_S = 60.0  # only a broken test waits so long


def register(worker_id: str, role: Role = "experts", slots: int = 4) -> Register:
    return Register(
        worker_id=worker_id,
        role=role,
        endpoint=f"inproc:{worker_id}",
        pid=os.getpid(),
        node="n",
        num_slots=slots if role == "experts" else 0,
    )


def report(
    *rows: list[int],
    recent: list[list[int]] | None = None,
    window_s: float = 60.0,
    recent_s: float = 5.0,
) -> LoadReport:
    """Rows of each layer; none were recent unless told."""
    return LoadReport(
        window_s=window_s,
        rows=pack(np.array(rows)),
        recent_s=recent_s,
        recent_rows=pack(np.array(recent or np.zeros_like(rows))),
    )


class FakeConnection:
    """The directory's end of a connection: keeps what is sent."""

    peer = "fake"
    credits = 0

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.closed = False
        self._changed = threading.Condition()

    def send(self, frame: Frame, timeout_s: float | None = None) -> None:
        with self._changed:
            if self.closed:
                raise ChannelClosed("closed")
            self.sent.append(decode(frame))
            self._changed.notify_all()

    def receive(self, timeout_s: float | None = None) -> Frame:
        raise AssertionError("the directory does not receive")

    def fileno(self) -> int:
        return -1

    def close(self) -> None:
        self.closed = True

    def newest(self, kind: type[Message], test: Callable[[Message], bool] = bool) -> Message:
        """The newest message of a kind, once one passes the test."""

        def found() -> list[Message]:
            return [m for m in self.sent if isinstance(m, kind) and test(m)]

        with self._changed:
            assert self._changed.wait_for(found, PATIENCE_S)
            return found()[-1]


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    """A directory on a fake clock, spoken to without channels."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.directory = Directory(RULES, silence_limit_s=3.0, clock=self.clock)

    def say(self, connection: FakeConnection, message: Message) -> Frame | None:
        return self.directory.handle(encode(message), connection)

    def join(self, worker_id: str, role: Role = "experts") -> FakeConnection:
        connection = FakeConnection()
        assert self.say(connection, register(worker_id, role)) is None
        return connection

    def pass_time(self, seconds: float, *alive: FakeConnection) -> None:
        """In ticks of half a second, the given members ping at each."""
        for _ in range(round(seconds / 0.5)):
            self.clock.now_s += 0.5
            for connection in alive:
                self.say(connection, Ping())
            self.directory.tick()

    def members(self) -> list[str]:
        return [worker.worker_id for worker in self.directory.snapshot.workers]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.directory.close()


def test_ping_is_answered(world: World) -> None:
    reply = world.say(world.join("a"), Ping())
    assert reply is not None and decode(reply) == Pong()


def test_silent_member_is_removed_and_cut_off(world: World) -> None:
    quiet, lively = world.join("a"), world.join("b")
    world.pass_time(3.0, lively)
    assert world.members() == ["a", "b"]
    world.pass_time(0.5, lively)
    assert world.members() == ["b"]
    assert quiet.closed and not lively.closed
    lively.newest(Snapshot, lambda s: [w.worker_id for w in s.workers] == ["b"])


def test_own_pause_is_not_held_against_the_members(world: World) -> None:
    world.join("a")
    world.clock.now_s += 60.0  # this process was stopped
    world.directory.tick()
    assert world.members() == ["a"]


def test_grace_ends_by_the_clock() -> None:
    clock = FakeClock()
    directory = Directory(RosterRules(SPACE, 2, grace_s=2.0), silence_limit_s=60.0, clock=clock)
    connection = FakeConnection()
    directory.handle(encode(register("a", slots=8)), connection)
    clock.now_s += 2.0
    directory.tick()
    assign = connection.newest(Assign)
    assert isinstance(assign, Assign) and len(assign.experts) == 8
    directory.close()


def test_newcomer_of_the_same_id_takes_the_place(world: World) -> None:
    old, _ = world.join("a"), world.join("b")
    new = world.join("a")
    assert old.closed
    world.directory.connection_closed(old)  # the channel server reports it later
    assert world.members() == ["a", "b"]
    new.newest(Snapshot)
    world.directory.connection_closed(new)
    assert world.members() == ["b"]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Holding(epoch=0, experts=[]), "register first"),
        (Pong(), "pong is for workers only"),
        (LoadRequest(), "load_request: register first"),
        (MetricsRequest(), "metrics_request: register first"),
        (MetricsReport(samples=()), "metrics_report: register first"),
        (report([0] * 4, [0] * 4), "load_report: register first"),
    ],
)
def test_messages_out_of_place_are_refused(world: World, message: Message, words: str) -> None:
    reply = world.say(FakeConnection(), message)
    assert reply is not None and reply.status is Status.FAILED
    assert words in reply.text


def test_registering_twice_is_refused(world: World) -> None:
    reply = world.say(world.join("a"), register("b"))
    assert reply is not None and "this connection has registered" in reply.text
    assert world.members() == ["a"]


def test_garbage_is_refused_and_costs_nothing(world: World) -> None:
    connection = world.join("a")
    reply = world.directory.handle(Frame(kind=Kind.CONTROL, body=b"\x00{"), connection)
    assert reply is not None and reply.status is Status.FAILED
    assert world.members() == ["a"]


def load_of(world: World, asker: FakeConnection) -> ClusterLoadReply:
    reply = world.directory.handle(encode(LoadRequest(), 77), asker)
    assert reply is not None and reply.request_id == 77
    answer = decode(reply)
    assert isinstance(answer, ClusterLoadReply)
    return answer


def test_loads_of_the_live_workers_are_added_up(world: World) -> None:
    a, b, asker = world.join("a"), world.join("b"), world.join("i", "ingress")
    assert world.say(a, report([9, 9, 9, 9], [9, 9, 9, 9])) is None
    recent = [[1, 0, 0, 1], [0, 0, 0, 0]]
    world.say(a, report([1, 0, 0, 2], [0, 5, 0, 0], recent=recent))  # the newest counts
    assert load_of(world, asker).workers[1].rows == (0, 0)  # b has said nothing yet
    recent = [[3, 0, 0, 0], [0, 0, 0, 0]]
    message = report([10, 0, 0, 0], [0, 0, 0, 1], recent=recent, window_s=30.0, recent_s=4.0)
    world.say(b, message)
    load = load_of(world, asker)
    assert load.layers == SPACE.moe_layers
    assert load.rows == ((11, 0, 0, 2), (0, 5, 0, 1))
    assert load.workers == (
        WorkerRows(worker_id="a", rows=(3, 5), recent_rows=(2, 0)),
        WorkerRows(worker_id="b", rows=(10, 1), recent_rows=(3, 0)),
    )
    assert load.recent_rows == ((4, 0, 0, 1), (0, 0, 0, 0))
    assert (load.window_s, load.recent_s) == (60.0, 5.0)
    assert load.epoch == world.directory.snapshot.epoch


def test_load_of_a_worker_goes_with_it(world: World) -> None:
    a, b, asker = world.join("a"), world.join("b"), world.join("i", "ingress")
    for worker in (a, b):
        world.say(worker, report([1, 1, 1, 1], [2, 2, 2, 2]))
    world.directory.connection_closed(a)
    load = load_of(world, asker)
    assert load.rows == ((1, 1, 1, 1), (2, 2, 2, 2))
    assert [worker.worker_id for worker in load.workers] == ["b"]

    world.join("a")  # a new process of the same name has computed nothing
    assert load_of(world, asker).rows == ((1, 1, 1, 1), (2, 2, 2, 2))
    world.join("b")  # takes the place of b, whose connection has not ended yet
    assert load_of(world, asker).rows == ((0, 0, 0, 0), (0, 0, 0, 0))


def test_load_of_a_silent_worker_is_dropped(world: World) -> None:
    quiet, asker = world.join("a"), world.join("i", "ingress")
    world.say(quiet, report([1, 1, 1, 1], [1, 1, 1, 1]))
    world.pass_time(3.5, asker)
    assert load_of(world, asker).workers == ()


def test_load_of_another_shape_is_refused(world: World) -> None:
    reply = world.say(world.join("a"), report([0] * 4, [0] * 4, [0] * 4))
    assert reply is not None and reply.status is Status.FAILED
    assert "load_report: 96 bytes of rows, not those of 2 x 4" in reply.text
    assert world.members() == ["a"]


# ---------------------------------------------------------------- with channels, threads, processes


class FakeWorker:
    """Holds at once whatever it is told to."""

    def __init__(self, source: Callable[[], str], registers: Register) -> None:
        self.told: list[Assign] = []
        self.client = DirectoryClient(source, SECRET, registers, on_assign=self.load)
        self.client.start()

    def load(self, assign: Assign) -> None:
        self.told.append(assign)
        self.client.report_holding(assign.experts, assign.epoch)


class Cluster:
    """A directory at `endpoint` and workers that are all closed at the end."""

    def __init__(self, stack: contextlib.ExitStack, endpoint: str) -> None:
        self.endpoint = endpoint
        self.stack = stack
        self.workers: dict[str, FakeWorker] = {}

    def serve(self, rules: RosterRules = RULES, silence_limit_s: float = 10.0) -> Directory:
        directory = Directory(rules, silence_limit_s=silence_limit_s)
        directory.start(self.endpoint, SECRET)
        self.stack.callback(directory.close)
        return directory

    def add(self, worker_id: str, role: Role = "experts", slots: int = 4) -> DirectoryClient:
        worker = FakeWorker(lambda: self.endpoint, register(worker_id, role, slots))
        self.stack.callback(worker.client.close)
        self.workers[worker_id] = worker
        return worker.client

    def add_all(self) -> DirectoryClient:
        """Two expert workers, a router, and the attention worker, which is returned."""
        for worker_id, role in (("a", "experts"), ("b", "experts"), ("r", "router")):
            self.add(worker_id, role)  # type: ignore[arg-type]
        return self.add("att", "attention")


@pytest.fixture(params=["inproc", "unix"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    endpoint = "inproc:directory" if request.param == "inproc" else f"unix:{tmp_path}/d.sock"
    with contextlib.ExitStack() as stack:
        yield Cluster(stack, endpoint)


def wait_until(client: DirectoryClient, test: Callable[[Snapshot], bool]) -> Snapshot:
    """The first snapshot that passes."""
    deadline_s = time.monotonic() + PATIENCE_S
    snapshot = client.wait_newer(-1, PATIENCE_S)
    while snapshot is not None and not test(snapshot):
        snapshot = client.wait_newer(snapshot.version, deadline_s - time.monotonic())
    assert snapshot is not None, client.snapshot and client.snapshot.stage
    return snapshot


def ids(snapshot: Snapshot) -> list[str]:
    return [worker.worker_id for worker in snapshot.workers]


def test_cluster_gets_ready_loses_a_worker_and_recovers(cluster: Cluster) -> None:
    cluster.serve()
    seen = cluster.add_all()
    ready = seen.wait_ready(PATIENCE_S)
    assert ready.holders_of(1) == (("a",), ("b",), ("a",), ("b",))
    assert ready.holders_of(2) == (("a",), ("b",), ("a",), ("b",))
    assert ids(ready) == ["a", "att", "b", "r"]

    cluster.workers["b"].client.close()
    lost = wait_until(seen, lambda s: "b" not in ids(s))
    assert not lost.ready and lost.epoch > ready.epoch
    assert lost.holders_of(1) == (("a",), (), ("a",), ())

    cluster.add("c")
    again = wait_until(seen, lambda s: s.ready)
    assert again.holders_of(1) == (("a",), ("c",), ("a",), ("c",))
    assert len(cluster.workers["a"].told) == 1  # the survivor moved nothing


def test_restarted_directory_learns_everything_from_the_workers(cluster: Cluster) -> None:
    first = cluster.serve()
    seen = cluster.add_all()
    before = seen.wait_ready(PATIENCE_S)
    first.close()
    assert seen.snapshot is not None and seen.snapshot.ready  # goes on with what it knows

    cluster.endpoint += "2"
    cluster.serve()
    after = wait_until(seen, lambda s: s.ready and s.epoch > before.epoch)
    assert after.version > before.version
    assert after.holders == before.holders and after.workers == before.workers


def test_client_waits_for_a_directory_that_is_not_there_yet(cluster: Cluster) -> None:
    seen = cluster.add("att", "attention")
    with pytest.raises(TimeoutError, match="not ready after 0.01 s: no directory yet: "):
        seen.wait_ready(0.01)
    assert seen.wait_newer(0, 0.01) is None
    cluster.serve()
    snapshot = wait_until(seen, lambda s: ids(s) == ["att"])
    with pytest.raises(TimeoutError, match="waiting for expert workers 0/2"):
        seen.wait_ready(0.01)
    assert seen.snapshot is snapshot


class Reporter:
    """An expert worker whose load a test sets; `told` keeps what a directory is told of it, by
    line."""

    def __init__(self, cluster: Cluster, directory: Directory) -> None:
        self.load = report([1, 2, 3, 4], [0, 0, 0, 0])
        self.told: dict[Connection, list[LoadReport]] = {}
        self.asked = 0
        take = directory._take_load

        def take_noted(message: LoadReport, connection: Connection) -> None:
            self.told.setdefault(connection, []).append(message)
            take(message, connection)

        directory._take_load = take_noted  # type: ignore[method-assign]
        self.client = DirectoryClient(
            lambda: cluster.endpoint,
            SECRET,
            register("a"),
            load_source=self.source,
            ping_interval_s=0.1,  # on a busy machine three without an answer may break the line
        )
        cluster.stack.callback(self.client.close)
        self.client.start()

    def source(self) -> LoadReport:
        self.asked += 1
        return self.load.model_copy()


def wait_load(client: DirectoryClient, rows: tuple[tuple[int, ...], ...]) -> None:
    """Ask until the answer is this; a line that is being made anew may fail meanwhile."""
    deadline_s = time.monotonic() + PATIENCE_S
    found: object = None
    while found != rows:
        assert time.monotonic() < deadline_s, found
        with contextlib.suppress(ChannelError):
            found = client.ask_load(PATIENCE_S).rows


def test_a_load_is_told_when_it_changes_and_to_every_new_directory(cluster: Cluster) -> None:
    first = cluster.serve()
    seen = cluster.add("i", "ingress")
    wait_until(seen, lambda s: ids(s) == ["i"])
    reporter = Reporter(cluster, first)
    wait_load(seen, ((1, 2, 3, 4), (0, 0, 0, 0)))
    asked = reporter.asked
    while reporter.asked < asked + 3:
        time.sleep(0.005)
    first_report, second_report = reporter.load, report([1, 2, 3, 5], [0, 0, 0, 1])
    assert all(reports == [first_report] for reports in reporter.told.values())
    reporter.load = second_report
    wait_load(seen, ((1, 2, 3, 5), (0, 0, 0, 1)))
    news = [first_report, second_report]
    assert all(reports in (news, news[:1], news[1:]) for reports in reporter.told.values())

    first.close()
    cluster.endpoint += "2"
    cluster.serve()
    wait_load(seen, ((1, 2, 3, 5), (0, 0, 0, 1)))


def test_asking_for_the_load_without_a_directory_fails_at_once() -> None:
    client = DirectoryClient(lambda: "inproc:nobody-listens", SECRET, register("i", "ingress"))
    client.start()
    with pytest.raises(ChannelClosed, match="no line to the directory"):
        client.ask_load(PATIENCE_S)
    client.close()


@pytest.mark.parametrize("hangs_up", [False, True])
def test_asking_a_directory_that_does_not_answer(tmp_path: Path, hangs_up: bool) -> None:
    endpoint, joined = f"unix:{tmp_path}/d.sock", threading.Event()

    def handle(frame: Frame, connection: Connection) -> None:
        message = decode(frame)
        if isinstance(message, LoadRequest) and hangs_up:
            connection.close()
        joined.set()

    silent = Server(endpoint, handle, SECRET)
    silent.start()
    registers = register("i", "ingress")
    client = DirectoryClient(lambda: endpoint, SECRET, registers, ping_interval_s=PATIENCE_S)
    client.start()
    assert joined.wait(PATIENCE_S)
    with pytest.raises(ChannelClosed if hangs_up else ChannelTimeout):
        client.ask_load(PATIENCE_S if hangs_up else 0.05)
    client.close()
    silent.close()


def test_source_of_the_endpoint_may_fail() -> None:
    asked = threading.Semaphore(0)

    def source() -> str:
        asked.release()
        raise RuntimeError("no such actor")

    client = DirectoryClient(source, SECRET, register("a"))
    client.start()
    for _ in range(3):
        assert asked.acquire(timeout=PATIENCE_S)
    with pytest.raises(TimeoutError, match="RuntimeError: no such actor"):
        client.wait_ready(0.01)
    client.close()


def test_client_leaves_a_silent_directory(tmp_path: Path) -> None:
    opened = threading.Semaphore(0)
    endpoint = f"unix:{tmp_path}/d.sock"
    silent = Server(endpoint, lambda f, c: None, SECRET, on_open=lambda c: opened.release())
    silent.start()
    client = DirectoryClient(lambda: endpoint, SECRET, register("a"), ping_interval_s=0.02)
    client.start()
    for _ in range(2):
        assert opened.acquire(timeout=PATIENCE_S)
    client.close()
    silent.close()


def test_slow_load_does_not_look_like_death(cluster: Cluster) -> None:
    cluster.serve(RosterRules(SPACE, 1), silence_limit_s=1.0)
    go_on = threading.Event()
    loading = DirectoryClient(
        lambda: cluster.endpoint,
        SECRET,
        register("a", slots=8),
        on_assign=lambda assign: go_on.wait(PATIENCE_S),
        ping_interval_s=0.05,
    )
    cluster.stack.callback(loading.close)
    loading.start()
    wait_until(loading, lambda s: ids(s) == ["a"])
    mute = connect(cluster.endpoint, SECRET)  # registers later and never pings
    mute.send(encode(register("mute", "ingress")))
    with pytest.raises(ChannelClosed):  # cut off for its silence
        while True:
            mute.receive(PATIENCE_S)
    wait_until(loading, lambda s: ids(s) == ["a"])
    go_on.set()
    mute.close()


def test_of_several_assignments_during_a_load_the_newest_is_run() -> None:
    started, go_on = threading.Semaphore(0), threading.Event()
    told: list[int] = []

    def load(assign: Assign) -> None:
        told.append(assign.epoch)
        started.release()
        assert go_on.wait(PATIENCE_S)

    opened = threading.Event()
    server = Server("inproc:assigns", lambda f, c: None, SECRET, on_open=lambda c: opened.set())
    server.start()
    client = DirectoryClient(
        lambda: "inproc:assigns",
        SECRET,
        register("a"),
        on_assign=load,
        ping_interval_s=PATIENCE_S,  # nobody answers
    )
    client.start()
    assert opened.wait(PATIENCE_S)
    (line,) = server.connections
    line.send(encode(Assign(epoch=1, experts=[])))
    assert started.acquire(timeout=PATIENCE_S)
    line.send(encode(Assign(epoch=2, experts=[])))
    line.send(encode(Assign(epoch=3, experts=[])))
    line.send(encode(Snapshot(version=1, epoch=3, ready=False, stage="")))
    assert client.wait_newer(0, PATIENCE_S)
    go_on.set()
    assert started.acquire(timeout=PATIENCE_S)
    assert told == [1, 3]
    client.close()
    server.close()


def test_failed_load_is_tried_again_and_logged_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.serve(RosterRules(SPACE, 1))
    attempts: list[int] = []

    def load(assign: Assign) -> None:
        attempts.append(assign.epoch)
        if len(attempts) <= 3:
            raise OSError("file system is away")
        client.report_holding(assign.experts, assign.epoch)

    client = DirectoryClient(
        lambda: cluster.endpoint,
        SECRET,
        register("a", slots=8),
        on_assign=load,
        retry_assign_s=0.01,
    )
    cluster.stack.callback(client.close)
    client.start()
    wait_until(client, lambda s: all(s.holders_of(1)) and all(s.holders_of(2)))
    assert len(attempts) == 4
    told = [r.getMessage() for r in caplog.records if "on_assign failed" in r.getMessage()]
    assert told == [f"on_assign failed at epoch {attempts[0]}: OSError: file system is away"]


def test_failing_on_snapshot_does_not_cost_the_membership(cluster: Cluster) -> None:
    cluster.serve()

    def fail(snapshot: Snapshot) -> None:
        raise RuntimeError("a bug of the owner")

    client = DirectoryClient(
        lambda: cluster.endpoint, SECRET, register("att", "attention"), on_snapshot=fail
    )
    cluster.stack.callback(client.close)
    client.start()
    cluster.add("r", "router")
    wait_until(client, lambda s: ids(s) == ["att", "r"])


CHILD = """
import sys, threading
from experts.directory.client import DirectoryClient
from experts.messages import Register
me = Register(worker_id="b", role="experts", endpoint="", pid=1, node="n", num_slots=4)
def load(assign):
    client.report_holding(assign.experts, assign.epoch)
client = DirectoryClient(
    lambda: sys.argv[1], b"test secret", me, on_assign=load, ping_interval_s=0.1
)
client.start()
threading.Event().wait(120)
"""


@pytest.fixture
def child_cluster(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Cluster, "subprocess.Popen[bytes]"]]:
    """Ready, with worker b in a process of its own; the parameter is the limit of its silence."""
    with contextlib.ExitStack() as stack:
        cluster = Cluster(stack, f"unix:{tmp_path}/d.sock")
        cluster.serve(silence_limit_s=request.param)
        child = subprocess.Popen([sys.executable, "-c", CHILD, cluster.endpoint], cwd=Path.cwd())
        stack.callback(child.wait)
        stack.callback(child.kill)
        for worker_id, role in (("a", "experts"), ("r", "router"), ("att", "attention")):
            cluster.add(worker_id, role)  # type: ignore[arg-type]
        cluster.workers["att"].client.wait_ready(PATIENCE_S)
        yield cluster, child


@pytest.mark.chaos
@pytest.mark.parametrize("child_cluster", [100 * PATIENCE_S], indirect=True)
def test_killed_process_leaves_at_once(
    child_cluster: tuple[Cluster, "subprocess.Popen[bytes]"],
) -> None:
    """Long before its silence is noticed."""
    cluster, child = child_cluster
    child.send_signal(signal.SIGKILL)
    snapshot = wait_until(cluster.workers["att"].client, lambda s: "b" not in ids(s))
    assert not snapshot.ready


@pytest.mark.chaos
@pytest.mark.parametrize("child_cluster", [2.0], indirect=True)
def test_stopped_process_leaves_after_the_silence_limit_and_comes_back(
    child_cluster: tuple[Cluster, "subprocess.Popen[bytes]"],
) -> None:
    cluster, child = child_cluster
    seen = cluster.workers["att"].client
    child.send_signal(signal.SIGSTOP)
    wait_until(seen, lambda s: "b" not in ids(s))
    child.send_signal(signal.SIGCONT)
    snapshot = wait_until(seen, lambda s: s.ready)
    assert snapshot.holders_of(1) == (("a",), ("b",), ("a",), ("b",))
