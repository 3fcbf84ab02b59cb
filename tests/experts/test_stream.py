"""What only sockets have: halves of frames, threads, descriptors, processes that die."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.channel.channel import (
    ChannelClosed,
    ChannelCounters,
    ChannelTimeout,
    Connection,
    Server,
    connect,
    wait_readable,
)
from experts.channel.envelope import What, pack
from experts.channel.frame import Frame, Kind, Status
from tests.experts.frames import (
    SECRET,
    control,
    expert_batch,
    raw_socket,
    rows,
    same_frame,
    wire,
)
from tests.experts.stage import BRIEF_S, WAIT_S, Desk, Stage


@pytest.fixture(params=["unix", "tcp", "shm", "nixl"])
def sockets(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    made = Stage(request.param, tmp_path)
    yield made
    made.close()


def message(stage: Stage, frame: Frame) -> bytes:
    """The frame's bytes on such a connection."""
    return wire(frame) if stage.scheme in ("unix", "tcp") else pack(What.INLINE) + wire(frame)


def test_a_callback_that_fails_on_open_costs_that_connection_only(sockets: Stage) -> None:
    calls: list[int] = []

    def on_open(_: Connection) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not today")

    server = sockets.serve(on_open=on_open)
    with pytest.raises(ChannelClosed):
        sockets.connect(server).receive(WAIT_S)
    second = sockets.connect(server)
    second.send(control(), WAIT_S)
    assert second.receive(WAIT_S).kind is Kind.CONTROL


def test_half_a_frame_waits_for_the_other_half(sockets: Stage) -> None:
    desk = Desk()
    server = sockets.serve(desk)
    client = sockets.connect(server)
    client.send(control(), WAIT_S)
    data = message(sockets, Frame(Kind.EXPERT_RESULT, rows=rows()))
    with raw_socket(desk.server_end()) as raw:
        for cut in (10, 79, 80, 140, 160):
            raw.sendall(data[:cut])
            assert wait_readable([client], WAIT_S) == [client]
            with pytest.raises(ChannelTimeout):
                client.receive(BRIEF_S)
            raw.sendall(data[cut:])
            same_frame(client.receive(WAIT_S), Frame(Kind.EXPERT_RESULT, rows=rows()))


def test_closing_wakes_a_sender_whose_peer_does_not_read(sockets: Stage) -> None:
    entered, release = threading.Event(), threading.Event()

    def handler(frame: Frame, _: Connection) -> None:
        entered.set()
        assert release.wait(WAIT_S)

    client = sockets.connect(sockets.serve(handler))
    ended = threading.Event()

    def send() -> None:
        with pytest.raises(ChannelClosed):
            while True:
                client.send(control(bytes(1_000_000)))
        ended.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert entered.wait(WAIT_S)
    assert not ended.wait(BRIEF_S)
    client.close()
    assert ended.wait(WAIT_S)
    sender.join(WAIT_S)
    release.set()


def test_a_client_that_ignores_its_credits_is_cut_off(sockets: Stage) -> None:
    server = sockets.serve(Desk(), credits=1)
    client = sockets.connect(server)
    with raw_socket(client) as raw:
        raw.sendall(2 * message(sockets, expert_batch()))
        with pytest.raises(ChannelClosed):
            client.receive(WAIT_S)
    assert server.counters.bad_frames == {"credits": 1}


def test_bytes_and_frames_are_counted(sockets: Stage) -> None:
    counters = ChannelCounters()
    server = sockets.serve()
    client = sockets.connect(server, counters)
    client.send(expert_batch(4, 6, 8), WAIT_S)
    client.receive(WAIT_S)
    assert (counters.frames_out, counters.bytes_out) == (1, 80 + 6 * 12 + 4 * 8 * 4)
    assert (counters.frames_in, counters.bytes_in) == (1, 80 + 4 * 8 * 4)
    assert (server.counters.frames_in, server.counters.bytes_in) == (1, 80 + 6 * 12 + 4 * 8 * 4)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_leaks(sockets: Stage) -> None:
    gc.collect()  # what others left may not go meanwhile
    threads, descriptors = set(threading.enumerate()), num_descriptors()
    half = 2 if sockets.scheme == "nixl" else 5  # an agent a connection, at each end
    for _ in range(3):
        server = sockets.serve()
        clients = [sockets.connect(server) for _ in range(2 * half)]
        for client in clients:
            client.send(control(), WAIT_S)
            client.receive(WAIT_S)
        names = {thread.name for thread in threading.enumerate()}
        assert any(name.startswith("stage-") for name in names)
        for client in clients[:half]:
            client.close()
        server.close(WAIT_S)
        for client in clients[half:]:
            client.close()
        assert set(threading.enumerate()) <= threads
    assert num_descriptors() == descriptors


def test_close_does_not_wait_for_ever_for_a_handler(sockets: Stage) -> None:
    entered, release = threading.Event(), threading.Event()

    def handler(frame: Frame, _: Connection) -> None:
        entered.set()
        assert release.wait(WAIT_S)

    server = sockets.serve(handler)
    sockets.connect(server).send(control(), WAIT_S)
    assert entered.wait(WAIT_S)
    server.close(timeout_s=BRIEF_S)
    stuck = [t for t in threading.enumerate() if t.name.startswith("stage-")]
    release.set()
    assert stuck
    for thread in stuck:
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_a_handler_may_close_its_server(sockets: Stage) -> None:
    servers: list[Server] = []
    servers.append(sockets.serve(lambda frame, _: servers[0].close()))
    client = sockets.connect(servers[0])
    client.send(control(), WAIT_S)
    with pytest.raises(ChannelClosed):
        client.receive(WAIT_S)


CHILD = """
import sys
from experts.channel.channel import Server, connect
from experts.channel.envelope import What, pack
from experts.channel.frame import reply_to
theirs, mine, secret = sys.argv[1], sys.argv[2], sys.argv[3].encode()
server = Server(mine, lambda frame, _: reply_to(frame, frame.rows), secret)
server.start()
client = connect(theirs, secret)
print(server.endpoint, flush=True)
sys.stdin.read()
"""


@pytest.mark.chaos
def test_a_killed_process_is_noticed_at_once(sockets: Stage) -> None:
    left = threading.Event()
    ours = sockets.serve(on_close=lambda _: left.set())
    arguments = [sys.executable, "-c", CHILD, ours.endpoint, sockets.endpoint(), SECRET.decode()]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        client = connect(child.stdout.readline().decode().strip(), SECRET, timeout_s=WAIT_S)
        client.send(expert_batch(), WAIT_S)
        assert client.receive(WAIT_S).status is Status.OK
        client.send(expert_batch(), WAIT_S)
        child.kill()
        child.wait()
        with pytest.raises(ChannelClosed):
            while True:
                client.receive(WAIT_S)
        assert left.wait(WAIT_S)
        client.close()
