"""A served router: answers every micro-batch, merges what waits, refuses what it must."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.channel.channel import Connection, connect
from experts.channel.frame import Frame, Kind, Status
from experts.checkpoint import Checkpoint
from router.worker import RouterWorker
from tests.router.pool import SECRET, NewPool, Pool, every_expert, some_rows, spread

LAYER = 2


@pytest.fixture
def dial() -> Iterator[Callable[[str], Connection]]:
    """Connects to an endpoint; closes at the end of the test."""
    opened: list[Connection] = []

    def connect_to(endpoint: str) -> Connection:
        opened.append(connect(endpoint, SECRET, timeout_s=60.0))
        return opened[-1]

    yield connect_to
    for connection in opened:
        connection.close()


def ask(connection: Connection, request_id: int, layer: int, x: torch.Tensor) -> None:
    connection.send(Frame(Kind.ROUTE_BATCH, request_id=request_id, layer=layer, rows=x), 10.0)


def serve(pool: Pool, folder: Path, **settings: object) -> tuple[RouterWorker, str]:
    router = pool.router(**settings)
    return router, router.start(f"unix:{folder}/router", SECRET)


def test_answers_each_micro_batch_with_its_times(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 2), socket_folder)
    _, endpoint = serve(pool, socket_folder)
    connection = dial(endpoint)
    x = some_rows(5, checkpoint)
    ask(connection, 77, LAYER, x)
    answer = connection.receive(60.0)
    assert (answer.kind, answer.status, answer.request_id) == (Kind.ROUTE_RESULT, Status.OK, 77)
    assert answer.rows is not None
    torch.testing.assert_close(answer.rows, pool.router().forward(LAYER, x))
    assert answer.compute_us > 0


def test_waiting_for_experts_is_not_computing(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    """An expert worker that does not get to it for 50 ms."""
    pool = new_pool(checkpoint, spread(checkpoint, 1), socket_folder)
    worker = pool.workers["w0"]
    router, endpoint = serve(pool, socket_folder)
    connection = dial(endpoint)
    worker.stop()
    ask(connection, 77, LAYER, some_rows(5, checkpoint))
    threading.Timer(0.05, worker.resume).start()
    answer = connection.receive(60.0)
    queue_s, compute_s = (
        sum(getattr(counters.histograms(), part).total for counters in router.hop_counters)
        for part in ("queue", "compute")
    )
    assert answer.compute_us == pytest.approx(1e6 * compute_s, abs=1) != 0
    assert answer.queue_us >= 1e6 * queue_s - 1


def test_rows_come_back_in_the_dtype_of_the_request(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 1))
    _, endpoint = serve(pool, socket_folder)
    connection = dial(endpoint)
    ask(connection, 1, LAYER, some_rows(2, checkpoint).bfloat16())
    answer = connection.receive(60.0)
    assert answer.rows is not None
    assert answer.rows.dtype == torch.bfloat16


class Gatekeeper:
    """An expert worker's handler behind a gate: shows that a batch came, holds it until opened."""

    def __init__(self, pool: Pool) -> None:
        self._worker = pool.workers["real"]
        self.came = threading.Event()
        self.opened = threading.Event()

    def __call__(self, frame: Frame, connection: Connection) -> Frame:
        self.came.set()
        assert self.opened.wait(60)
        return self._worker.handle(frame, connection)


@pytest.mark.parametrize("num_connections", [1, 3])
def test_what_waits_is_merged_by_layer_and_keeps_its_bits(
    num_connections: int,
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"real": everything})
    alone = pool.router(deterministic=True)
    batches = [(i, LAYER if i % 2 else 3, some_rows(1 + i, checkpoint, i)) for i in range(8)]
    right = {i: alone.forward(layer, x) for i, layer, x in batches}
    gate = Gatekeeper(pool)
    pool.add_impostor("gate", everything, gate)
    pool.claims["real"] = set()
    pool.publish()
    router, endpoint = serve(pool, socket_folder, deterministic=True, lanes=1)
    connections = [dial(endpoint) for _ in range(num_connections)]
    first = some_rows(1, checkpoint)
    ask(connections[0], 100, 1, first)
    assert gate.came.wait(60)
    for i, layer, x in batches:
        ask(connections[i % num_connections], i, layer, x)
    wait_until_queued(router, len(batches))
    gate.opened.set()
    answers = [connections[0].receive(60.0)]
    assert answers[0].request_id == 100
    for i, _, _ in batches:
        answers.append(connections[i % num_connections].receive(60.0))
    for answer in answers[1:]:
        assert answer.rows is not None
        assert torch.equal(answer.rows, right[answer.request_id])
        assert answer.queue_us > 0
    assert sum(counters.exchanges for counters in router.counters) == 3


def wait_until_queued(router: RouterWorker, count: int) -> None:
    """The connections' threads queue; there is no event for it, so look until they have."""
    patience = threading.Event()
    for _ in range(12_000):
        if router.num_waiting == count:
            return
        patience.wait(0.005)
    raise AssertionError(f"{router.num_waiting} of {count} queued")


def test_a_bad_micro_batch_does_not_fail_those_merged_with_it(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"real": everything})
    gate = Gatekeeper(pool)
    pool.add_impostor("gate", everything, gate)
    pool.claims["real"] = set()
    pool.publish()
    router, endpoint = serve(pool, socket_folder, lanes=1)
    connection = dial(endpoint)
    x = some_rows(2, checkpoint)
    ask(connection, 0, 1, x)
    assert gate.came.wait(60)
    ask(connection, 1, LAYER, torch.full_like(x, torch.nan))
    ask(connection, 2, LAYER, x)
    wait_until_queued(router, 2)
    gate.opened.set()
    answers = {answer.request_id: answer for answer in (connection.receive(60.0) for _ in range(3))}
    assert answers[1].status == Status.FAILED
    assert answers[1].text == "NonFiniteInput: row 0 of the micro-batch is not finite"
    assert answers[2].status == Status.OK


@pytest.mark.parametrize(
    ("layer", "width", "text"),
    [(0, 128, "layer 0, width 128: not of this model"), (2, 4, "layer 2, width 4: not of this")],
)
def test_foreign_layers_and_widths_are_refused(
    layer: int,
    width: int,
    text: str,
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    _, endpoint = serve(new_pool(checkpoint, spread(checkpoint, 1)), socket_folder)
    connection = dial(endpoint)
    ask(connection, 1, layer, torch.zeros(1, width))
    answer = connection.receive(60.0)
    assert answer.status == Status.FAILED
    assert answer.text.startswith(text)


def test_missing_experts_end_in_a_deadline_that_names_them(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    pool = new_pool(checkpoint, {"a": {(1, 0)}})
    _, endpoint = serve(pool, socket_folder)
    connection = dial(endpoint)
    frame = Frame(Kind.ROUTE_BATCH, layer=LAYER, rows=some_rows(1, checkpoint), deadline_us=50_000)
    connection.send(frame, 10.0)
    answer = connection.receive(60.0)
    assert answer.status == Status.DEADLINE
    assert answer.text.startswith("layer 2, experts ")


def test_a_draining_router_refuses(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
) -> None:
    router, endpoint = serve(new_pool(checkpoint, spread(checkpoint, 1)), socket_folder)
    router.drain()
    connection = dial(endpoint)
    ask(connection, 1, LAYER, some_rows(1, checkpoint))
    assert connection.receive(60.0).status == Status.DRAINING


def test_frames_of_other_kinds_are_refused(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 1)).router()
    nobody: Connection = None  # type: ignore[assignment]
    answer = router.handle(Frame(Kind.CONTROL, body=b"{}"), nobody)
    assert answer is not None
    assert answer.status == Status.FAILED
    assert answer.text == "not a batch: CONTROL"


def test_a_sender_that_does_not_read_stops_no_lane(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    dial: Callable[[str], Connection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More answers than lanes wait for it, each larger than the buffer of a socket."""
    monkeypatch.setattr("router.worker.ANSWER_TIMEOUT_S", 600.0)
    pool = new_pool(checkpoint, spread(checkpoint, 2), socket_folder)
    router, endpoint = serve(pool, socket_folder)
    hung, other = dial(endpoint), dial(endpoint)
    large, x = some_rows(1, checkpoint).repeat(16_384, 1), some_rows(3, checkpoint)
    for request_id in range(router.config.lanes + 1):
        ask(hung, request_id, LAYER, large)
    for request_id in range(3):
        ask(other, request_id, LAYER, x)
        assert other.receive(60.0).request_id == request_id
