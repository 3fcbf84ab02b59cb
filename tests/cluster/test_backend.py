"""The pool of attention workers: who gets what, what waits, what is given up; nobody blocks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from attention.messages import (
    Abort,
    SamplingParams,
    Stats,
    StatsRequest,
    StepOutputs,
    Submit,
    TokenOutput,
    encode_message,
    parse_message,
)
from cluster.backend import PARK_LIMIT_S, AttentionPool, NoWorker
from experts.channel.channel import ChannelClosed, ChannelTimeout, Connection, Server
from experts.channel.frame import Frame, Kind
from experts.messages import Snapshot, WorkerInfo
from tests.fakes import TIMEOUT_S

SECRET = b"s" * 32
STATS = Stats(
    num_running=0,
    num_waiting=0,
    num_waiting_tokens=0,
    kv_blocks_total=1,
    kv_blocks_free=1,
    kv_blocks_cached=0,
    block_size=16,
    max_model_len=64,
)


def snapshot(*names: str, holders: Any = None, ready: bool = True) -> Snapshot:
    workers = tuple(
        WorkerInfo(worker_id=name, role="attention", endpoint=name, pid=1, node="n")
        for name in names
    )
    stage = "ready" if ready else "loading experts 1/2 on 1 workers"
    return Snapshot(
        version=1, epoch=1, ready=ready, stage=stage, workers=workers, holders=holders or {}
    )


def submit(name: str, prompt: int = 1, **fields: Any) -> Submit:
    params = SamplingParams(max_tokens=10)
    return Submit(request_id=name, prompt_ids=[5] * prompt, params=params, **fields)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)  # leaves the interpreter to the others


class FakeClient:
    """An AttentionClient whose worker says what the test has it say."""

    def __init__(self) -> None:
        self.closed = False
        self.silent = False
        self.asked = threading.Semaphore(0)
        self.answers = threading.Event()
        self.answers.set()
        self.unblocked = threading.Event()
        self.unblocked.set()
        self.calls: queue.Queue[Submit | str] = queue.Queue()
        self.open: dict[str, Callable[[TokenOutput], None]] = {}

    def submit(self, submit: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        self.unblocked.wait(TIMEOUT_S)
        if self.closed:
            on_output(TokenOutput(request_id=submit.request_id, finish_reason="lost"))
            return
        self.open[submit.request_id] = on_output
        self.calls.put(submit)

    def abort(self, request_id: str) -> None:
        self.unblocked.wait(TIMEOUT_S)
        self.calls.put(f"abort {request_id}")

    def stats(self, timeout_s: float = 5.0) -> Stats:
        self.asked.release()
        self.answers.wait(TIMEOUT_S)
        if self.silent:
            raise ChannelTimeout("no stats")
        return STATS

    def close(self) -> None:
        """What the reader of a real client does when the connection ends."""
        self.closed = True
        self.unblocked.set()
        while self.open:
            request_id, on_output = self.open.popitem()
            on_output(TokenOutput(request_id=request_id, finish_reason="lost"))

    def say(self, request_id: str, **fields: Any) -> None:
        self.open[request_id](TokenOutput(request_id=request_id, **fields))

    def next_call(self) -> Submit | str:
        return self.calls.get(timeout=TIMEOUT_S)


class World:
    """A pool and the workers that it can reach by endpoint."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.clients: dict[str, FakeClient] = {}
        self.connected: queue.Queue[str] = queue.Queue()
        self.outputs: queue.Queue[TokenOutput] = queue.Queue()
        self.pool = AttentionPool(SECRET, self._connect, lambda: self.now_s)  # type: ignore[arg-type]

    def _connect(self, endpoint: str, secret: bytes, timeout_s: float) -> FakeClient:
        client = self.clients.get(endpoint)
        if client is None or client.closed:
            raise ChannelClosed("nobody there")
        self.connected.put(endpoint)
        return client

    def start(self, *names: str) -> list[FakeClient]:
        """These workers become the members; returns when all are connected."""
        new = [name for name in names if name not in self.clients]
        self.clients |= {name: FakeClient() for name in new}
        self.pool.on_snapshot(snapshot(*names))
        found = {self.connected.get(timeout=TIMEOUT_S) for _ in new}
        assert found == set(new)
        until(lambda: len(self.pool.stats()) == len(names))  # it takes a client a moment later
        return [self.clients[name] for name in names]

    def submit(self, name: str, **fields: Any) -> None:
        self.pool.submit(submit(name, **fields), self.outputs.put)

    def replay(self, name: str, **fields: Any) -> None:
        self.pool.replay(submit(name, **fields), self.outputs.put)

    def output(self) -> TokenOutput:
        return self.outputs.get(timeout=TIMEOUT_S)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.pool.close()


# ---- who gets what


def test_the_least_loaded_worker_gets_it(world: World) -> None:
    a, b = world.start("a", "b")
    world.submit("1", prompt=20)  # 30 tokens on a
    world.submit("2", prompt=5)  # 15 on b
    world.submit("3", prompt=5)  # 30 on b
    world.submit("4")  # a again, by name
    assert [a.next_call().request_id for _ in range(2)] == ["1", "4"]  # type: ignore[union-attr]
    assert [b.next_call().request_id for _ in range(2)] == ["2", "3"]  # type: ignore[union-attr]


def test_what_has_ended_is_no_load(world: World) -> None:
    a, b = world.start("a", "b")
    world.submit("1", prompt=20)
    a.next_call()
    a.say("1", finish_reason="stop")
    assert world.output().finish_reason == "stop"
    world.submit("2")
    assert a.next_call() == submit("2")


def test_replays_of_a_dead_worker_spread_over_the_others(world: World) -> None:
    a, *others = world.start("a", "b", "c")
    world.submit("0")
    a.next_call()
    for number in range(1, 3):
        world.submit(str(number))  # one on b, one on c
    a.close()
    assert world.output().finish_reason == "lost"
    for number in range(10, 14):
        world.replay(str(number), emitted_ids=[7])
    for client in others:
        assert [client.calls.get(timeout=TIMEOUT_S) for _ in range(3)]
        assert client.calls.empty()


# ---- no worker


def test_before_the_first_worker_new_requests_are_refused_and_replays_wait(world: World) -> None:
    with pytest.raises(NoWorker):
        world.submit("new")
    world.replay("kept", deadline_s=9.0, emitted_ids=[7, 8])
    world.replay("dropped")
    world.replay("late", deadline_s=1.0)
    assert world.pool.num_parked == 3
    world.pool.abort("dropped")
    world.now_s += 4.0
    (a,) = world.start("a")
    kept = submit("kept", deadline_s=5.0, emitted_ids=[7, 8])
    assert [a.next_call(), a.next_call()] == [kept, submit("late", deadline_s=1e-3)]
    assert a.calls.empty() and world.pool.num_parked == 0
    a.say("kept", token_ids=[9])
    assert world.output().token_ids == [9]


def test_when_all_workers_died_new_requests_wait_too(world: World) -> None:
    (a,) = world.start("a")
    a.close()
    world.submit("1")
    assert world.pool.num_parked == 1
    state = world.pool.ready()
    assert (state.ready, state.missing) == (False, "attention")
    (b,) = world.start("b")
    assert b.next_call() == submit("1")


def test_who_waits_too_long_for_a_worker_is_told(world: World) -> None:
    world.replay("1")
    world.now_s += PARK_LIMIT_S + 1
    assert world.output() == TokenOutput(request_id="1", finish_reason="unavailable")
    assert world.pool.num_parked == 0


def test_closing_ends_what_waits_and_what_comes(world: World) -> None:
    world.replay("1")
    world.pool.close()
    world.replay("2")
    assert [world.output().finish_reason for _ in range(2)] == ["error", "error"]


def test_closing_loses_what_runs(world: World) -> None:
    (a,) = world.start("a")
    world.submit("1")
    a.next_call()
    world.pool.close()
    assert world.output().finish_reason == "lost"


# ---- nobody blocks


def test_a_stuck_worker_holds_up_nobody(world: World) -> None:
    """Its sender waits; the callers, the other worker and the order of its messages do not."""
    a, b = world.start("a", "b")
    a.unblocked.clear()
    world.submit("1")
    world.pool.abort("1")
    world.submit("2", prompt=3)
    world.submit("3")
    assert b.next_call() == submit("3")
    a.unblocked.set()
    calls = [a.next_call() for _ in range(3)]
    assert calls == [submit("1"), "abort 1", submit("2", prompt=3)]


def test_what_was_not_sent_yet_is_lost_too(world: World) -> None:
    (a,) = world.start("a")
    a.unblocked.clear()
    for name in ("1", "2"):
        world.submit(name)
    a.close()
    assert {world.output().request_id for _ in range(2)} == {"1", "2"}


# ---- members that vanish


def test_workers_are_asked_for_their_numbers_at_once(world: World) -> None:
    """The answer takes as long as the slowest one, not all together."""
    clients = world.start("a", "b", "c")
    for client in clients:
        while client.asked.acquire(blocking=False):
            pass
        client.answers.clear()
    clients[1].silent = True
    found: queue.Queue[list[Stats]] = queue.Queue()
    thread = threading.Thread(target=lambda: found.put(world.pool.stats()))
    thread.start()
    try:
        assert all(client.asked.acquire(timeout=TIMEOUT_S) for client in clients)
    finally:
        for client in clients:
            client.answers.set()
        thread.join(TIMEOUT_S)
    assert found.get(timeout=TIMEOUT_S) == [STATS, STATS]


def test_a_silent_worker_that_left_the_snapshot_is_lost(world: World) -> None:
    a, b = world.start("a", "b")
    world.submit("1")
    a.next_call()
    a.silent = True
    world.pool.on_snapshot(snapshot("b"))
    assert world.output() == TokenOutput(request_id="1", finish_reason="lost")
    world.replay("1")
    assert b.next_call() == submit("1")
    assert a.closed and not b.closed


def test_a_worker_that_left_the_snapshot_but_answers_is_kept(world: World) -> None:
    """A restarted directory knows nobody at first; that must not cost a replay."""
    a, b = world.start("a", "b")
    world.submit("1")
    a.next_call()
    b.silent = True
    world.pool.on_snapshot(snapshot())
    until(lambda: b.closed)  # its probe is over, and so is that of a
    a.say("1", token_ids=[4])
    assert world.output().token_ids == [4]
    world.submit("2")
    assert a.next_call() == submit("2") and not a.closed


def test_a_broken_connection_is_made_again(world: World) -> None:
    (a,) = world.start("a")
    world.clients["a"] = again = FakeClient()
    a.close()
    assert world.connected.get(timeout=TIMEOUT_S) == "a"
    world.replay("1")
    assert again.next_call() == submit("1")


# ---- readiness


def test_readiness_says_what_is_missing(world: World) -> None:
    assert world.pool.ready() == (False, "waiting for placement", 0, 0, None)
    world.pool.on_snapshot(snapshot("a", holders={"1": (("e",), ())}, ready=False))
    assert world.pool.ready() == (False, "loading experts 1/2 on 1 workers", 1, 2, None)
    world.start("a")
    assert world.pool.ready() == (True, "ready", 0, 0, None)
    world.pool.on_snapshot(snapshot("a", holders={"1": (("e",), ())}, ready=False))
    assert world.pool.ready().missing == "experts"
    assert world.pool.ready().ready
    world.clients["a"].close()
    del world.clients["a"]
    assert world.pool.ready().missing == "attention"
    assert not world.pool.ready().ready


# ---- over sockets


class SocketWorker:
    """Gives every sequence its next `num_tokens`, then ends it or keeps it open."""

    def __init__(self, endpoint: str, num_tokens: int, finish: bool = False) -> None:
        self._num_tokens, self._finish = num_tokens, finish
        self.aborted: queue.Queue[str] = queue.Queue()
        self._server = Server(endpoint, self._handle, SECRET)
        self._server.start()
        self.kill = self._server.close

    def _handle(self, frame: Frame, connection: Connection) -> Frame | None:
        message = parse_message(frame.body)
        if isinstance(message, StatsRequest):
            return Frame(Kind.CONTROL, request_id=frame.request_id, body=encode_message(STATS))
        if isinstance(message, Abort):
            self.aborted.put(message.request_id)
        if isinstance(message, Submit):
            start = len(message.emitted_ids)
            ids = list(range(start, start + self._num_tokens))
            reason = "length" if self._finish else None
            told = TokenOutput(request_id=message.request_id, token_ids=ids, finish_reason=reason)
            body = encode_message(StepOutputs(outputs=[told]))
            connection.send(Frame(Kind.CONTROL, body=body), TIMEOUT_S)
        return None


def test_a_killed_worker_is_replaced_over_sockets(tmp_path: Path) -> None:
    first = SocketWorker(f"unix:{tmp_path}/a", 3)
    pool = AttentionPool(SECRET)
    outputs: queue.Queue[TokenOutput] = queue.Queue()
    try:
        pool.on_snapshot(snapshot(f"unix:{tmp_path}/a"))
        pool.wait_connected(TIMEOUT_S)
        pool.submit(submit("1"), outputs.put)
        assert outputs.get(timeout=TIMEOUT_S).token_ids == [0, 1, 2]
        first.kill()
        assert outputs.get(timeout=TIMEOUT_S).finish_reason == "lost"
        pool.replay(submit("1", emitted_ids=[0, 1, 2]), outputs.put)
        second = SocketWorker(f"unix:{tmp_path}/b", 2, finish=True)
        pool.on_snapshot(snapshot(f"unix:{tmp_path}/b"))
        last = outputs.get(timeout=TIMEOUT_S)
        assert (last.token_ids, last.finish_reason) == ([3, 4], "length")
        second.kill()
    finally:
        pool.close()
