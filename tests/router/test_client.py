"""Attention's side of a deployed router: fail-over without a lost or doubled row."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.channel.channel import Connection, Server
from experts.channel.frame import Frame, FrameLimits, Status, reply_to
from experts.messages import Snapshot, WorkerInfo
from experts.snapshots import SnapshotBoard
from router.client import GRACE_S, RouterClient
from router.errors import RemoteUnavailable, RouterUnavailable

SECRET = b"a secret of the tests"
LAYER = 2
Handler = Callable[[Frame, Connection], Frame | None]


def double(frame: Frame, _: Connection) -> Frame:
    assert frame.rows is not None
    return reply_to(frame, frame.rows * 2)


class Routers:
    """Servers that claim to be routers, and the board that names them."""

    def __init__(self, folder: Path) -> None:
        self.board = SnapshotBoard()
        self._folder = folder
        self._servers: dict[str, Server] = {}
        self._nodes: dict[str, str] = {}
        self._clients: list[RouterClient] = []
        self._unlisted: list[Server] = []

    def serve(self, name: str, handler: Handler, node: str = "here") -> None:
        server = Server(f"unix:{self._folder}/{name}", handler, SECRET)
        server.start()
        self._servers[name] = server
        self._nodes[name] = node
        self.publish()

    def publish(self, *extra: WorkerInfo) -> None:
        workers = [
            WorkerInfo(worker_id=n, role="router", endpoint=s.endpoint, pid=1, node=self._nodes[n])
            for n, s in self._servers.items()
        ]
        version = self.board.generation + 1
        self.board.publish(
            Snapshot(version=version, epoch=1, ready=True, stage="", workers=(*workers, *extra))
        )

    def kill(self, name: str) -> None:
        """The board still names it."""
        self._servers[name].close()

    def forget(self, name: str) -> None:
        """It still runs, but the board names it no longer."""
        self._nodes.pop(name)
        self._unlisted.append(self._servers.pop(name))
        self.publish()

    def client(self, **settings: object) -> RouterClient:
        defaults = {"deadline_s": 60.0, "own_node": "here", "connect_timeout_s": 60.0}
        client = RouterClient(self.board, SECRET, "me", **{**defaults, **settings})  # type: ignore
        self._clients.append(client)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for server in (*self._servers.values(), *self._unlisted):
            server.close()


@pytest.fixture
def routers(socket_folder: Path) -> Iterator[Routers]:
    made = Routers(socket_folder)
    yield made
    made.close()


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


X = torch.arange(12, dtype=torch.float32).view(3, 4)


def test_begin_and_finish(routers: Routers) -> None:
    routers.serve("r0", double)
    assert torch.equal(routers.client().forward(LAYER, X), X * 2)


def test_tickets_may_be_finished_in_any_order(routers: Routers) -> None:
    routers.serve("r0", double)
    client = routers.client()
    first, second = client.begin(LAYER, X), client.begin(LAYER, X + 1)
    assert torch.equal(client.finish(second), (X + 1) * 2)
    assert torch.equal(client.finish(first), X * 2)


def test_no_rows_need_no_router(routers: Routers) -> None:
    assert routers.client().forward(LAYER, X[:0]).shape == (0, 4)


def test_more_rows_than_a_frame_holds_are_split(routers: Routers) -> None:
    sizes = []

    def note(frame: Frame, connection: Connection) -> Frame:
        assert frame.rows is not None
        sizes.append(len(frame.rows))
        return double(frame, connection)

    routers.serve("r0", note)
    client = routers.client(limits=FrameLimits(max_rows=2))
    assert torch.equal(client.forward(LAYER, X), X * 2)
    assert sizes == [2, 1]


def test_a_router_on_the_own_node_is_preferred(routers: Routers) -> None:
    routers.serve("r0", lambda frame, _: reply_to(frame, status=Status.FAILED, text="far"), "far")
    routers.serve("r1", double, "here")
    for own_id in ("a", "b", "c", "d"):
        client = RouterClient(routers.board, SECRET, own_id, "here")
        assert torch.equal(client.forward(LAYER, X), X * 2)
        client.close()


def test_attention_workers_spread_over_equal_routers(routers: Routers) -> None:
    used = set()

    def named(name: str) -> Handler:
        def handle(frame: Frame, connection: Connection) -> Frame:
            used.add(name)
            return double(frame, connection)

        return handle

    for name in ("r0", "r1"):
        routers.serve(name, named(name))
    for i in range(16):
        client = RouterClient(routers.board, SECRET, f"attention-{i}", "here")
        client.forward(LAYER, X)
        client.close()
    assert used == {"r0", "r1"}


def test_a_router_that_dies_with_batches_under_way(routers: Routers) -> None:
    def die(frame: Frame, connection: Connection) -> None:
        connection.close()

    routers.serve("good", double, "far")
    routers.serve("bad", die)
    client = routers.client()
    tickets = [client.begin(LAYER, X + i) for i in range(3)]
    for i, ticket in enumerate(tickets):
        assert torch.equal(client.finish(ticket), (X + i) * 2)
    assert client.failovers == 1


def test_a_killed_router_with_many_batches_under_way_costs_no_wait(
    routers: Routers, caplog: pytest.LogCaptureFixture
) -> None:
    """Its socket ends; what it had goes to the other one, on a clock that stands still."""
    asked, doomed = threading.Semaphore(0), []

    def hold(frame: Frame, connection: Connection) -> None:
        doomed.append(connection)
        asked.release()

    routers.serve("good", double, "far")
    routers.serve("bad", hold)
    client = routers.client(clock=Clock())
    tickets = [client.begin(LAYER, X + i) for i in range(8)]
    for _ in tickets:
        assert asked.acquire(timeout=60)
    doomed[0]._sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]
    for i, ticket in enumerate(tickets):
        assert torch.equal(client.finish(ticket), (X + i) * 2)
    assert client.failovers == 1
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("router bad is left alone: ")


def test_a_router_that_hangs_is_left_when_the_snapshot_drops_it(routers: Routers) -> None:
    """Long before its time is over."""
    asked = threading.Event()

    def hang(frame: Frame, connection: Connection) -> None:
        asked.set()

    routers.serve("good", double, "far")
    routers.serve("bad", hang)
    client = routers.client(router_timeout_s=1000.0, deadline_s=1000.0)
    tickets = [client.begin(LAYER, X + i) for i in range(3)]
    assert asked.wait(60)
    routers.forget("bad")
    for i, ticket in enumerate(tickets):
        assert torch.equal(client.finish(ticket), (X + i) * 2)


@pytest.mark.parametrize("news", ["another router", "no router at all"])
def test_other_news_are_no_reason_to_leave(routers: Routers, news: str) -> None:
    """A directory that restarted knows nobody for a moment."""
    held, asked = [], threading.Event()

    def hold(frame: Frame, connection: Connection) -> None:
        held.append((frame, connection))
        asked.set()

    routers.serve("slow", hold)
    client = routers.client(router_timeout_s=1000.0)
    ticket = client.begin(LAYER, X)
    assert asked.wait(60)
    if news == "another router":
        routers.serve("new", double, "far")
    else:
        routers.forget("slow")

    def answer() -> None:
        frame, connection = held[0]
        connection.send(double(frame, connection))

    threading.Timer(0.15, answer).start()
    assert torch.equal(client.finish(ticket), X * 2)
    assert (len(held), client.failovers) == (1, 0)


@pytest.mark.parametrize("status", [Status.DRAINING, Status.OVERLOADED])
def test_a_router_that_refuses_is_left(routers: Routers, status: Status) -> None:
    routers.serve("good", double, "far")
    routers.serve("bad", lambda frame, _: reply_to(frame, status=status, text="not now"))
    assert torch.equal(routers.client().forward(LAYER, X), X * 2)


def test_a_router_that_hangs_is_left(routers: Routers) -> None:
    """Not at the deadline of a ticket, experts may be missing as long; when it is silent then."""
    routers.serve("good", double, "far")
    routers.serve("bad", lambda frame, _: None)
    clock = Clock()
    client = routers.client(deadline_s=20.0, router_timeout_s=1.0, clock=clock)
    ticket = client.begin(LAYER, X)
    clock.now_s += 20.0
    with pytest.raises(RouterUnavailable, match="bad has not answered"):
        client.finish(ticket)
    ticket = client.begin(LAYER, X)
    assert (client.failovers, ticket.parts[0].line) == (0, client._lines["bad"])
    clock.now_s += GRACE_S
    assert torch.equal(client.finish(ticket), X * 2)
    assert client.failovers == 1


def test_a_router_that_waits_for_experts_is_not_left(routers: Routers) -> None:
    def answer_late(frame: Frame, connection: Connection) -> None:
        threading.Timer(0.15, connection.send, [double(frame, connection)]).start()

    routers.serve("good", double, "far")
    routers.serve("slow", answer_late)
    client = routers.client(router_timeout_s=0.01)
    assert torch.equal(client.forward(LAYER, X), X * 2)
    assert client.failovers == 0


def test_a_router_that_waited_in_vain_may_say_so(
    routers: Routers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It measures the same time, so its answer comes a moment after the deadline."""
    monkeypatch.setattr("router.client.LOOK_S", 60.0)

    def give_up(frame: Frame, connection: Connection) -> None:
        answer = reply_to(frame, status=Status.DEADLINE, text="layer 2, experts 5: nobody")
        threading.Timer(frame.deadline_us / 1e6, connection.send, [answer]).start()

    routers.serve("r0", give_up)
    with pytest.raises(RemoteUnavailable, match="experts 5"):
        routers.client(deadline_s=0.2).forward(LAYER, X)


def test_answers_that_lie_there_are_taken_after_the_deadline(routers: Routers) -> None:
    """The process was stopped meanwhile."""
    answered = threading.Semaphore(0)

    def answer(frame: Frame, connection: Connection) -> None:
        connection.send(double(frame, connection))
        answered.release()

    routers.serve("r0", answer)
    clock = Clock()
    client = routers.client(clock=clock)
    first, second = client.begin(LAYER, X), client.begin(LAYER, X + 1)
    for _ in range(2):
        assert answered.acquire(timeout=60)
    clock.now_s += 1000.0
    assert torch.equal(client.finish(second), (X + 1) * 2)
    assert torch.equal(client.finish(first), X * 2)
    assert client.failovers == 0


def test_the_log_says_when_a_router_is_no_longer_listed(
    routers: Routers, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is closed, and nothing more is sent to it."""
    routers.serve("other", double, "far")
    routers.serve("near", double)
    client = routers.client()
    client.forward(LAYER, X)
    assert list(client._lines) == ["near"]
    routers.forget("near")
    for _ in range(2):
        assert torch.equal(client.forward(LAYER, X), X * 2)
    assert list(client._lines) == ["other"]
    assert caplog.messages == ["router near is left: it is no longer listed"]


def test_a_line_that_is_still_needed_is_closed_later(routers: Routers) -> None:
    held, asked = [], threading.Event()

    def hold(frame: Frame, connection: Connection) -> None:
        held.append((frame, connection))
        asked.set()

    routers.serve("other", double, "far")
    routers.serve("near", hold)
    client = routers.client()
    ticket = client.begin(LAYER, X)
    assert asked.wait(60)
    routers.forget("near")
    assert torch.equal(client.forward(LAYER, X + 1), (X + 1) * 2)
    assert sorted(client._lines) == ["near", "other"]
    held[0][1].send(double(*held[0]))
    assert torch.equal(client.finish(ticket), X * 2)
    routers.publish()
    client.forward(LAYER, X)
    assert list(client._lines) == ["other"]


def test_waiting_for_a_router_is_no_busy_loop(routers: Routers) -> None:
    """The end of a dead router's quarantine is no reason to look again and again."""
    routers.serve("r0", lambda frame, connection: connection.close())  # type: ignore[arg-type]
    clock = Clock()
    client = routers.client(clock=clock)
    ticket = client.begin(LAYER, X)
    routers.kill("r0")
    routers.forget("r0")
    looks = []

    def wait(generation: int, timeout_s: float) -> bool:
        looks.append(timeout_s)
        clock.now_s += timeout_s
        return False

    routers.board.wait_newer = wait  # type: ignore[method-assign]
    with pytest.raises(RouterUnavailable):
        client.finish(ticket)
    assert 1 <= len(looks) <= 3


def test_rows_of_another_shape_are_not_used(routers: Routers) -> None:
    routers.serve("good", double, "far")
    routers.serve("bad", lambda frame, _: reply_to(frame, torch.zeros(1, 4)))
    assert torch.equal(routers.client().forward(LAYER, X), X * 2)


def test_what_a_router_could_not_do_is_said_for_that_ticket_only(routers: Routers) -> None:
    def fail_zeros(frame: Frame, connection: Connection) -> Frame:
        assert frame.rows is not None
        if frame.rows.any():
            return double(frame, connection)
        return reply_to(frame, status=Status.DEADLINE, text="layer 2, experts 5: nobody")

    routers.serve("r0", fail_zeros)
    client = routers.client()
    bad, good = client.begin(LAYER, torch.zeros(1, 4)), client.begin(LAYER, X)
    assert torch.equal(client.finish(good), X * 2)
    with pytest.raises(RemoteUnavailable, match="DEADLINE: layer 2, experts 5: nobody"):
        client.finish(bad)


def test_an_answer_nobody_waits_for_is_dropped(routers: Routers) -> None:
    def twice(frame: Frame, connection: Connection) -> Frame:
        stray = reply_to(frame, torch.zeros_like(X))
        stray.request_id += 1000
        connection.send(stray)
        return double(frame, connection)

    routers.serve("r0", twice)
    client = routers.client()
    assert torch.equal(client.forward(LAYER, X), X * 2)
    assert client.late_answers == 1


def test_without_a_router_it_waits_for_one(routers: Routers) -> None:
    client = routers.client()
    ticket = client.begin(LAYER, X)
    thread = threading.Thread(target=routers.serve, args=("r0", double))
    thread.start()
    assert torch.equal(client.finish(ticket), X * 2)
    thread.join()


def test_the_deadline_ends_the_wait(routers: Routers) -> None:
    client = routers.client(deadline_s=0.05)
    with pytest.raises(RouterUnavailable, match="no router in the snapshot") as caught:
        client.forward(LAYER, X)
    assert caught.value.layer == LAYER
    assert caught.value.waited_s >= 0.05


def test_a_longer_limit_than_the_own_is_not_taken(routers: Routers) -> None:
    client = routers.client(deadline_s=0.05)
    with pytest.raises(RouterUnavailable) as caught:
        client.finish(client.begin(LAYER, X, 1000.0))
    assert 0.05 <= caught.value.waited_s < 900.0


def test_a_router_that_cannot_be_reached_is_named(routers: Routers, socket_folder: Path) -> None:
    endpoint = f"unix:{socket_folder}/nobody"
    routers.publish(WorkerInfo(worker_id="r9", role="router", endpoint=endpoint, pid=1, node=""))
    clock = Clock()
    client = routers.client(clock=clock)
    ticket = client.begin(LAYER, X)
    clock.now_s += 60.0
    with pytest.raises(RouterUnavailable, match="cannot connect to unix:.*nobody"):
        client.finish(ticket)
