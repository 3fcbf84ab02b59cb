"""Connections and servers: what all back ends have in common."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.channel.channel import (
    ChannelClosed,
    ChannelError,
    ChannelTimeout,
    Connection,
    FrameError,
    FrameLimits,
    Server,
    connect,
    wait_readable,
)
from experts.channel.frame import Frame, Kind, Status, reply_to
from tests.experts.frames import (
    SECRET,
    control,
    expert_batch,
    not_here,
    rows,
    same_frame,
)
from tests.experts.stage import BRIEF_S, WAIT_S, Desk, Stage, echo


@pytest.fixture(params=["inproc", "unix", "tcp", "shm", "nixl"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(request.param, tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    "answer",
    [
        Frame(Kind.EXPERT_RESULT, request_id=1, rows=rows(3, 7, torch.bfloat16), flags=1),
        Frame(Kind.EXPERT_RESULT, rows=rows(0, 7)),
        not_here(),
        Frame(Kind.ROUTE_RESULT, rows=rows(1, 1, torch.float8_e4m3fn), queue_us=3, compute_us=4),
        Frame(Kind.ROUTE_RESULT, status=Status.OVERLOADED, body=b"busy"),
        control(b""),
        control(bytes(100_000)),
    ],
)
def test_every_kind_goes_both_ways(stage: Stage, answer: Frame) -> None:
    seen: list[Frame] = []

    def handler(frame: Frame, _: Connection) -> Frame:
        seen.append(frame)
        return answer

    client = stage.connect(stage.serve(handler))
    requests = [control(), expert_batch(), expert_batch(0, 0), expert_batch(1, 1, 3)]
    requests.append(Frame(Kind.ROUTE_BATCH, rows=rows(5, 9, torch.bfloat16)))
    for request in requests:
        client.send(request, WAIT_S)
        same_frame(client.receive(WAIT_S), answer)
    for sent, received in zip(requests, seen, strict=True):
        same_frame(sent, received)


def test_a_large_frame_arrives_whole(stage: Stage) -> None:
    client = stage.connect(stage.serve())
    request = Frame(Kind.ROUTE_BATCH, rows=rows(1024, 2048))  # 8 MiB: many partial sends
    sender = threading.Thread(target=client.send, args=(request, WAIT_S))
    sender.start()
    answer = client.receive(WAIT_S)
    sender.join()
    assert answer.rows is not None and request.rows is not None
    assert torch.equal(answer.rows, request.rows)


def test_frames_say_when_they_arrived(stage: Stage) -> None:
    client = stage.connect(stage.serve())
    before_s = time.monotonic()
    client.send(expert_batch(), WAIT_S)
    frame = client.receive(WAIT_S)
    assert before_s <= frame.received_s <= time.monotonic()


def test_a_push_wakes_a_receiver(stage: Stage) -> None:
    desk = Desk()
    client = stage.connect(stage.serve(desk))
    client.send(control(), WAIT_S)
    received: list[Frame] = []
    reader = threading.Thread(target=lambda: received.append(client.receive(WAIT_S)))
    reader.start()
    desk.server_end().send(control(b"pushed"), WAIT_S)
    reader.join(WAIT_S)
    assert [frame.body for frame in received] == [b"pushed"]


def test_receive_times_out_and_can_be_called_again(stage: Stage) -> None:
    desk = Desk()
    client = stage.connect(stage.serve(desk))
    client.send(expert_batch(), WAIT_S)
    desk.wait(1)
    for timeout_s in (0.0, BRIEF_S):
        with pytest.raises(ChannelTimeout):
            client.receive(timeout_s)
    desk.answer(0)
    assert client.receive(WAIT_S).kind is Kind.EXPERT_RESULT


def test_credits_run_out_and_come_back(stage: Stage) -> None:
    desk = Desk()
    client = stage.connect(stage.serve(desk, credits=2))
    assert client.credits == 2
    client.send(expert_batch(), WAIT_S)
    client.send(Frame(Kind.ROUTE_BATCH, rows=rows()), WAIT_S)
    assert client.credits == 0
    with pytest.raises(ChannelTimeout):
        client.send(expert_batch(), BRIEF_S)
    client.send(control(), WAIT_S)  # costs none
    assert not client.closed
    desk.wait(3)
    sender = threading.Thread(target=client.send, args=(expert_batch(), WAIT_S))
    sender.start()
    desk.answer(1)
    assert client.receive(WAIT_S).kind is Kind.ROUTE_RESULT  # gives the credit back
    sender.join(WAIT_S)
    desk.wait(4)
    desk.answer(0)
    desk.answer(3)
    client.receive(WAIT_S)
    client.receive(WAIT_S)
    assert client.credits == 2


def test_closing_wakes_a_sender_without_credits(stage: Stage) -> None:
    client = stage.connect(stage.serve(Desk(), credits=1))
    client.send(expert_batch(), WAIT_S)
    caught: list[Exception] = []

    def send() -> None:
        try:
            client.send(expert_batch(), WAIT_S)
        except ChannelError as error:
            caught.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    client.close()
    sender.join(WAIT_S)
    assert [type(error) for error in caught] == [ChannelClosed]


def test_a_failing_handler_fails_its_frame_only(stage: Stage) -> None:
    def handler(frame: Frame, connection: Connection) -> Frame:
        if frame.attempt == 2:
            raise RuntimeError("no such\nexpert")
        return echo(frame, connection)

    server = stage.serve(handler)
    client = stage.connect(server)
    client.send(expert_batch(), WAIT_S)
    answer = client.receive(WAIT_S)
    assert (answer.kind, answer.status) == (Kind.EXPERT_RESULT, Status.FAILED)
    assert answer.text == "RuntimeError: no such"
    assert server.counters.handler_errors == 1
    good = expert_batch()
    good.attempt = 3
    client.send(good, WAIT_S)
    assert client.receive(WAIT_S).status is Status.OK


def test_a_reply_that_breaks_a_rule_becomes_a_failure(stage: Stage) -> None:
    server = stage.serve(lambda frame, _: reply_to(frame, rows()[0]))
    client = stage.connect(server)
    client.send(expert_batch(), WAIT_S)
    answer = client.receive(WAIT_S)
    assert answer.status is Status.FAILED
    assert answer.text.startswith("bad reply: frame refused: rows is")
    assert server.counters.handler_errors == 1


def test_a_refused_frame_leaves_the_connection_usable(stage: Stage) -> None:
    limits = FrameLimits(max_rows=4)
    client = stage.connect(stage.serve(limits=limits))
    bad_weights = expert_batch(4)
    bad_weights.weights = torch.full((6,), torch.nan)
    for frame, field in (
        (expert_batch(5), "num_rows"),  # the server's limit, known from the handshake
        (bad_weights, "weights"),
        (Frame(Kind.ROUTE_RESULT, rows=rows()), "direction"),
    ):
        with pytest.raises(FrameError) as caught:
            client.send(frame, WAIT_S)
        assert caught.value.field == field
    assert client.credits == 32
    client.send(expert_batch(4), WAIT_S)
    assert client.receive(WAIT_S).status is Status.OK


def test_a_server_sends_no_batches(stage: Stage) -> None:
    desk = Desk()
    stage.connect(stage.serve(desk)).send(control(), WAIT_S)
    with pytest.raises(FrameError, match="direction"):
        desk.server_end().send(expert_batch(), WAIT_S)


def test_many_threads_send(stage: Stage) -> None:
    client = stage.connect(stage.serve(credits=8))

    def send(number: int) -> None:
        for step in range(25):
            frame = expert_batch()
            frame.request_id = 100 * number + step
            client.send(frame, WAIT_S)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ids = [client.receive(WAIT_S).request_id for _ in range(100)]
    for thread in threads:
        thread.join(WAIT_S)
    assert sorted(ids) == sorted(100 * number + step for number in range(4) for step in range(25))
    assert client.credits == 8


def test_a_client_that_leaves(stage: Stage) -> None:
    events: list[str] = []
    left = threading.Event()

    def on_close(connection: Connection) -> None:
        events.append("close")
        left.set()

    server = stage.serve(on_open=lambda _: events.append("open"), on_close=on_close)
    client = stage.connect(server)
    client.send(control(), WAIT_S)
    client.receive(WAIT_S)
    assert events == ["open"]
    assert len(server.connections) == 1
    client.close()
    client.close()
    assert client.closed
    assert left.wait(WAIT_S)
    assert events == ["open", "close"]
    assert server.connections == ()
    for call in (lambda: client.send(control(), WAIT_S), lambda: client.receive(WAIT_S)):
        with pytest.raises(ChannelClosed):
            call()


def test_a_server_that_closes(stage: Stage) -> None:
    server = stage.serve()
    client = stage.connect(server)
    client.send(control(), WAIT_S)
    client.receive(WAIT_S)
    reader_ended = threading.Event()

    def read() -> None:
        with pytest.raises(ChannelClosed):
            client.receive(WAIT_S)
        reader_ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    server.close()
    server.close()
    assert reader_ended.wait(WAIT_S)
    reader.join(WAIT_S)
    with pytest.raises(ChannelClosed):
        connect(server.endpoint, SECRET)


def test_a_client_that_does_not_read_is_cut_off(stage: Stage) -> None:
    desk = Desk()
    stage.connect(stage.serve(desk)).send(control(), WAIT_S)
    server_end = desk.server_end()
    with pytest.raises(ChannelTimeout):
        for _ in range(10_000):
            server_end.send(control(bytes(100_000)), BRIEF_S)
    assert server_end.closed
    with pytest.raises(ChannelClosed):
        server_end.send(control(), WAIT_S)


# --- waiting for several ---


def test_wait_readable_names_those_with_a_frame(stage: Stage) -> None:
    desk = Desk()
    server = stage.serve(desk)
    clients = [stage.connect(server) for _ in range(3)]
    assert wait_readable(clients, 0.0) == []
    assert wait_readable(clients, BRIEF_S) == []
    for client in clients:
        client.send(expert_batch(), WAIT_S)
    desk.wait(3)
    position = 1
    answered = desk.got[position][1]
    answered.send(reply_to(desk.got[position][0], rows()), WAIT_S)
    (ready,) = wait_readable(clients, WAIT_S)
    assert ready.receive(0.0 if stage.scheme == "inproc" else WAIT_S).status is Status.OK
    assert wait_readable(clients, 0.0) == []


class Waiter(threading.Thread):
    """wait_readable in a thread of its own."""

    def __init__(self, connections: list[Connection]) -> None:
        super().__init__()
        self._connections = connections
        self._ready: list[Connection] = []
        self.start()

    def run(self) -> None:
        self._ready = wait_readable(self._connections, WAIT_S)

    def ready(self) -> list[Connection]:
        self.join(WAIT_S)
        return self._ready


def test_wait_readable_wakes_at_a_push_and_at_the_end(stage: Stage) -> None:
    desk = Desk()
    server = stage.serve(desk)
    client = stage.connect(server)
    client.send(control(), WAIT_S)
    server_end = desk.server_end()
    waiter = Waiter([client])
    server_end.send(control())
    assert waiter.ready() == [client]
    client.receive(WAIT_S)
    waiter = Waiter([client])
    server.close()
    assert waiter.ready() == [client]
    client.close()
    assert wait_readable([client], WAIT_S) == [client]


def test_wait_readable_mixes_back_ends(tmp_path: Path) -> None:
    stages = [Stage(scheme, tmp_path) for scheme in ("inproc", "unix")]
    desks = [Desk(), Desk()]
    clients = [made.connect(made.serve(desk)) for made, desk in zip(stages, desks, strict=True)]
    for client, desk in zip(clients, desks, strict=True):
        client.send(expert_batch(), WAIT_S)
        desk.wait(1)
    for position in (0, 1):
        waiter = Waiter(clients)
        desks[position].answer(0)
        assert waiter.ready() == [clients[position]]
        clients[position].receive(WAIT_S)
    for made in stages:
        made.close()


def test_a_taken_endpoint_is_refused(stage: Stage) -> None:
    first = stage.serve()
    second = Server(first.endpoint, echo, SECRET)
    with pytest.raises(ChannelError, match="in use"):
        second.start()
    second.close()
    client = stage.connect(first)
    client.send(control(), WAIT_S)
    assert client.receive(WAIT_S).kind is Kind.CONTROL


def test_nobody_there(stage: Stage) -> None:
    endpoint = stage.endpoint().replace(":0", ":1")
    with pytest.raises(ChannelClosed):
        connect(endpoint, SECRET)
