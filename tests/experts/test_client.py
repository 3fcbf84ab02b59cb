"""A router's connections to expert workers: every way an answer can fail becomes a Fault."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.channel.channel import ChannelCounters, Connection, Server
from experts.channel.codec import HEADER_BYTES
from experts.channel.frame import Frame, Kind, Status, reply_to
from experts.client import ExpertClient
from experts.health import HopTimer, Quarantine, WorkerHealth
from experts.hop import Fault, Hop
from experts.line import PIPELINE_BYTES
from experts.messages import Snapshot, WorkerInfo
from experts.snapshots import SnapshotBoard
from tests.experts.stage import join_probes

SECRET = b"a secret of the tests"
WIDTH = 16
WAIT_S = 60.0  # only a broken test waits so long
Handler = Callable[[Frame, Connection], Frame | None]


def double(frame: Frame, _: Connection) -> Frame:
    assert frame.rows is not None
    return reply_to(frame, frame.rows * 2)


class Workers:
    """Servers that claim to be expert workers, and a client over them."""

    def __init__(self, folder: Path | None) -> None:
        self.board = SnapshotBoard()
        self.counters = ChannelCounters()
        self._folder = folder
        self._servers: dict[str, Server] = {}
        self._count = 0
        health = WorkerHealth(Quarantine(base_s=1000.0, max_s=1e6), HopTimer(floor_s=WAIT_S))
        self.client = ExpertClient(self.board, SECRET, health, connect_timeout_s=WAIT_S)

    def serve(self, name: str, handler: Handler) -> Server:
        self._count += 1
        path = f"{name}-{self._count}-{id(self)}"
        endpoint = f"inproc:{path}" if self._folder is None else f"unix:{self._folder}/{path}"
        server = Server(endpoint, handler, SECRET, counters=self.counters)
        server.start()
        self._servers[name] = server
        self.publish()
        return server

    def forget(self, name: str) -> None:
        self._servers.pop(name).close()
        self.publish()

    def publish(self) -> None:
        workers = tuple(
            WorkerInfo(worker_id=n, role="experts", endpoint=s.endpoint, pid=1, node="")
            for n, s in self._servers.items()
        )
        self.board.publish(
            Snapshot(
                version=self.board.generation + 1, epoch=1, ready=True, stage="", workers=workers
            )
        )

    def close(self) -> None:
        self.client.close()
        for server in self._servers.values():
            server.close()
        join_probes()


@pytest.fixture(params=["inproc", "unix"])
def workers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Workers]:
    tmp_path.chmod(0o700)
    made = Workers(None if request.param == "inproc" else tmp_path)
    yield made
    made.close()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Workers]:
    """Over unix sockets: where a handler may be silent while the client goes on."""
    tmp_path.chmod(0o700)
    made = Workers(tmp_path)
    yield made
    made.close()


def hop(worker_id: str, num_rows: int = 2, deadline_s: float = WAIT_S, attempt: int = 0) -> Hop:
    frame = Frame(
        Kind.EXPERT_BATCH,
        attempt=attempt,
        layer=3,
        rows=torch.ones(num_rows, WIDTH),
        row_ids=torch.zeros(1, dtype=torch.int32),
        expert_ids=torch.tensor([5], dtype=torch.int32),
        weights=torch.ones(1),
    )
    return Hop(worker_id, frame, time.monotonic() + deadline_s)


def exchange(workers: Workers, hops: list[Hop]) -> None:
    for h in hops:
        workers.client.post(h)
    workers.client.gather(hops)


def test_all_are_sent_before_the_first_answer_is_awaited(remote: Workers) -> None:
    meet = threading.Barrier(3)

    def wait_for_the_others(frame: Frame, connection: Connection) -> Frame:
        meet.wait(WAIT_S)
        return double(frame, connection)

    for name in ("a", "b", "c"):
        remote.serve(name, wait_for_the_others)
    hops = [hop(name) for name in ("a", "b", "c")]
    exchange(remote, hops)
    assert all(h.reply is not None for h in hops)


def test_answers_belong_to_their_hops(workers: Workers) -> None:
    workers.serve("a", double)
    workers.serve("b", lambda frame, _: reply_to(frame, frame.rows * 3))  # type: ignore[operator]
    first, second, third = hop("a"), hop("b"), hop("a", 5)
    exchange(workers, [first, second, third])
    values = [h.reply.rows.unique().tolist() for h in (first, second, third)]  # type: ignore[union-attr]
    assert values == [[2.0], [3.0], [2.0]]
    assert third.reply.rows.shape == (5, WIDTH)  # type: ignore[union-attr]
    assert workers.client.counters.answers == 3
    assert workers.client.health.outstanding_rows("a") == 0


def test_one_connection_a_worker(workers: Workers) -> None:
    workers.serve("a", double)
    for _ in range(3):
        exchange(workers, [hop("a"), hop("a")])
    assert workers.client.counters.connects == 1


def test_gathering_one_exchange_keeps_the_answers_of_another(workers: Workers) -> None:
    workers.serve("a", double)
    first, second = hop("a"), hop("a")
    workers.client.post(first)
    workers.client.post(second)
    workers.client.gather([second])
    workers.client.gather([first])
    assert first.reply is not None
    assert second.reply is not None


def test_a_worker_nobody_knows_and_one_that_is_gone(workers: Workers) -> None:
    workers.serve("gone", double).close()
    workers.serve("b", double)
    hops = [hop("stranger"), hop("gone"), hop("b")]
    exchange(workers, hops)
    assert [h.fault for h in hops] == [Fault.LOST, Fault.LOST, None]
    assert not workers.client.health.quarantine.admits("gone", hops[1].deadline_s)


def test_everything_under_way_at_a_worker_that_dies_is_lost(remote: Workers) -> None:
    def die(frame: Frame, connection: Connection) -> None:
        connection.close()

    remote.serve("a", die)
    hops = [hop("a"), hop("a"), hop("a", 10_000)]
    exchange(remote, hops)
    assert [h.fault for h in hops] == [Fault.LOST] * 3
    assert remote.client.health.outstanding_rows("a") == 0


def test_a_worker_that_restarts_is_connected_to_again(workers: Workers) -> None:
    workers.serve("a", double)
    exchange(workers, [hop("a")])
    workers.forget("a")
    workers.serve("a", double)
    again = hop("a")
    exchange(workers, [again])
    assert again.reply is not None
    assert workers.client.counters.connects == 2


@pytest.mark.parametrize(
    ("status", "fault"),
    [
        (Status.OVERLOADED, Fault.OVERLOADED),
        (Status.DRAINING, Fault.DRAINING),
        (Status.DEADLINE, Fault.DEADLINE),
        (Status.FAILED, Fault.FAILED),
    ],
)
def test_a_refusal_keeps_its_reason(workers: Workers, status: Status, fault: Fault) -> None:
    workers.serve("a", lambda frame, _: reply_to(frame, status=status, text="because"))
    h = hop("a")
    exchange(workers, [h])
    assert (h.fault, h.detail) == (fault, "because")
    assert workers.client.counters.faults[fault] == 1


def not_here(*experts: int) -> Handler:
    def handle(frame: Frame, _: Connection) -> Frame:
        reply = reply_to(frame, status=Status.NOT_HERE)
        reply.expert_ids = torch.tensor(experts, dtype=torch.int32)
        return reply

    return handle


def test_not_here_names_the_experts(workers: Workers) -> None:
    workers.serve("a", not_here(5, 99))
    h = hop("a")
    exchange(workers, [h])
    assert (h.fault, h.missing) == (Fault.NOT_HERE, [5])
    assert len(workers.client.health.quarantine) == 0


def test_not_here_about_other_experts_breaks_the_protocol(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """Believing it would send the same pairs to the same worker for ever."""
    workers.serve("a", not_here(99))
    h = hop("a")
    exchange(workers, [h])
    assert h.fault is Fault.MALFORMED
    assert len(workers.client.health.quarantine) == 1
    assert caplog.messages == ["expert worker a is left alone: answer broke the protocol"]


def with_rows(make: Callable[[torch.Tensor], torch.Tensor]) -> Handler:
    def handle(frame: Frame, _: Connection) -> Frame:
        assert frame.rows is not None
        return reply_to(frame, make(frame.rows))

    return handle


@pytest.mark.parametrize(
    ("handler", "fault"),
    [
        (with_rows(lambda rows: rows[:1]), Fault.MALFORMED),
        (with_rows(lambda rows: rows[:, :3]), Fault.MALFORMED),
        (with_rows(lambda rows: rows.bfloat16()), Fault.MALFORMED),
        (with_rows(lambda rows: rows / 0), Fault.NOT_FINITE),
        (with_rows(lambda rows: rows * torch.nan), Fault.NOT_FINITE),
    ],
)
def test_rows_that_cannot_be_added(workers: Workers, handler: Handler, fault: Fault) -> None:
    workers.serve("a", handler)
    h = hop("a")
    exchange(workers, [h])
    assert h.fault is fault


def test_large_finite_rows_are_finite(workers: Workers) -> None:
    """Their squares overflow."""
    workers.serve("a", with_rows(lambda rows: rows * 1e30))
    h = hop("a")
    exchange(workers, [h])
    assert h.fault is None


def test_garbage_on_the_wire_ends_the_connection(remote: Workers) -> None:
    def write_garbage(frame: Frame, connection: Connection) -> None:
        connection._sock.sendall(b"\0" * 2 * HEADER_BYTES)  # type: ignore[attr-defined]

    remote.serve("a", write_garbage)
    h = hop("a")
    exchange(remote, [h])
    assert h.fault is Fault.MALFORMED
    assert len(remote.client.health.quarantine) == 1


class Silent:
    """Answers when told to, and what it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.frames: list[tuple[Frame, Connection]] = []

    def __call__(self, frame: Frame, connection: Connection) -> None:
        self.frames.append((frame, connection))
        self.asked.release()

    def await_frame(self) -> None:
        assert self.asked.acquire(timeout=WAIT_S)

    def answer(self, i: int) -> None:
        frame, connection = self.frames[i]
        connection.send(double(frame, connection))


def let_time_out(remote: Workers, silent: Silent, h: Hop) -> None:
    """The worker has the batch, and its time is over."""
    remote.client.post(h)
    silent.await_frame()
    h.due_s = 0.0
    remote.client.gather([h])
    assert h.fault is Fault.TIMEOUT


def test_a_worker_that_does_not_answer_times_out_alone(remote: Workers) -> None:
    remote.serve("a", Silent())
    remote.serve("b", double)
    slow, quick = hop("a"), hop("b")
    for h in (slow, quick):
        remote.client.post(h)
    slow.due_s = 0.0
    remote.client.gather([slow, quick])
    assert (slow.fault, quick.fault) == (Fault.TIMEOUT, None)
    assert remote.client.health.outstanding_rows("a") == 2  # it still owes them


def test_a_timed_out_hop_can_be_waited_for_again(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    h = hop("a")
    let_time_out(remote, silent, h)
    remote.client.wait_again(h)
    silent.answer(0)
    remote.client.gather([h])
    assert (h.fault, h.reply is not None) == (None, True)


def test_a_late_answer_is_dropped_and_shows_that_the_worker_lives(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    remote.serve("b", double)
    h = hop("a")
    let_time_out(remote, silent, h)
    remote.client.abandon(h)
    remote.client.health.quarantine.punish("a", 0.0)
    silent.answer(0)
    while not remote.client.counters.late_answers:
        exchange(remote, [hop("b")])
    assert h.reply is None
    assert len(remote.client.health.quarantine) == 0
    assert remote.client.health.outstanding_rows("a") == 0


def hang(remote: Workers) -> tuple[Silent, Server, int]:
    """A worker that has not answered five rows and is asked again; the board's generation."""
    silent = Silent()
    server = remote.serve("a", silent)
    let_time_out(remote, silent, hop("a", 5))
    generation = remote.board.generation
    silent.await_frame()
    return silent, server, generation


def test_a_worker_that_hangs_is_asked_again_with_one_row(
    remote: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    """On another connection; its answer ends the quarantine and wakes those who wait."""
    silent, _, generation = hang(remote)
    (first, its_line), (probe, other_line) = silent.frames
    assert probe.rows is not None
    assert (probe.rows.shape, probe.layer, probe.expert_ids.tolist()) == ((1, WIDTH), 3, [5])  # type: ignore[union-attr]
    assert its_line is not other_line
    assert remote.client.health.quarantine.is_suspended("a")
    silent.answer(1)
    assert remote.board.wait_newer(generation, WAIT_S)
    assert len(remote.client.health.quarantine) == 0
    hung, answers = caplog.messages
    assert hung == "expert worker a is left alone: it hangs, no answer to 5 rows within 60.00 s"
    assert answers == "expert worker a answers again"


def test_a_worker_that_hung_and_died_is_in_quarantine_for_a_time(remote: Workers) -> None:
    _, server, generation = hang(remote)
    server.close()
    assert remote.board.wait_newer(generation, WAIT_S)
    assert not remote.client.health.quarantine.is_suspended("a")
    assert len(remote.client.health.quarantine) == 1


def test_a_deadline_of_the_hop_itself_says_nothing_of_the_worker(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    first = hop("a")
    remote.client.post(first)  # connects, which could take longer than the second one has
    silent.await_frame()
    h = hop("a", deadline_s=0.05)
    exchange(remote, [h])
    assert h.fault is Fault.TIMEOUT
    assert len(remote.client.health.quarantine) == 0


def test_news_end_the_wait(remote: Workers) -> None:
    remote.serve("a", Silent())
    h = hop("a")
    remote.client.post(h)
    remote.client.gather([h], remote.board.generation - 1)
    assert not h.settled


def test_a_worker_that_hung_must_shake_hands_before_it_gets_more(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    first = hop("a")
    let_time_out(remote, silent, first)
    remote.client.abandon(first)
    remote.client.post(hop("a"))
    assert remote.client.counters.connects == 2


def test_the_worker_is_told_how_long_it_has(workers: Workers) -> None:
    seen = []

    def note(frame: Frame, connection: Connection) -> Frame:
        seen.append(frame.deadline_us)
        return double(frame, connection)

    workers.serve("a", note)
    exchange(workers, [hop("a", deadline_s=1000.0)])
    assert 500e6 < seen[0] <= 1000e6


def test_a_large_batch_waits_until_the_one_before_is_answered(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    large = PIPELINE_BYTES // (4 * WIDTH)
    first, second = hop("a", large), hop("a", large)
    remote.client.post(first)
    remote.client.post(second)
    silent.await_frame()
    assert not silent.asked.acquire(blocking=False)
    silent.answer(0)
    remote.client.gather([first])
    silent.await_frame()
    silent.answer(1)
    remote.client.gather([second])
    assert second.reply is not None


def test_small_batches_do_not_wait_for_each_other(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    hops = [hop("a", 1), hop("a", 1)]
    for h in hops:
        remote.client.post(h)
    for _ in hops:
        silent.await_frame()


def test_a_queued_batch_can_be_abandoned(remote: Workers) -> None:
    silent = Silent()
    remote.serve("a", silent)
    large = PIPELINE_BYTES // (4 * WIDTH)
    first, second = hop("a", large), hop("a", large)
    remote.client.post(first)
    remote.client.post(second)
    remote.client.abandon(second)
    silent.await_frame()
    silent.answer(0)
    remote.client.gather([first])
    assert len(silent.frames) == 1
    assert remote.client.health.outstanding_rows("a") == 0


def test_a_restarted_worker_starts_without_the_faults_of_the_last_process(
    workers: Workers,
) -> None:
    workers.serve("a", lambda frame, _: reply_to(frame, status=Status.OVERLOADED, text="no"))
    exchange(workers, [hop("a")])
    assert len(workers.client.health.quarantine) == 1
    workers._servers.pop("a").close()
    workers.serve("a", double)  # no snapshot in between: the client never sees it gone
    again = hop("a")
    exchange(workers, [again])
    assert again.fault is None
    assert len(workers.client.health.quarantine) == 0


def test_connections_of_workers_that_left_are_closed(workers: Workers) -> None:
    server = workers.serve("a", double)
    workers.serve("b", double)
    exchange(workers, [hop("a"), hop("b")])
    workers._servers.pop("a")
    workers.publish()
    exchange(workers, [hop("b")])
    for connection in server.connections:  # the server's thread may take a moment to see it
        with pytest.raises(OSError):
            connection.receive(WAIT_S)
    assert list(workers.client._lines) == ["b"]
    server.close()


def test_bytes_on_the_wire(remote: Workers) -> None:
    """There: header, 4-byte row id, expert id and weight a pair, 4 d bytes a row. Back: header and
    4 d bytes a row."""
    remote.serve("a", double)
    num_rows, num_pairs = 7, 1
    exchange(remote, [hop("a", num_rows)])
    remote.forget("a")  # joins its threads: the server counts what it sent after sending
    row_bytes = num_rows * 4 * WIDTH
    assert remote.counters.bytes_in == HEADER_BYTES + 12 * num_pairs + row_bytes
    assert remote.counters.bytes_out == HEADER_BYTES + row_bytes
