"""The handshake: both sides prove the secret, and a stranger gets nothing for anything."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from experts.channel.channel import (
    ChannelClosed,
    ChannelError,
    ChannelRefused,
    ChannelTimeout,
    FrameLimits,
    Server,
    connect,
)
from experts.channel.codec import VERSION
from experts.channel.frame import DEFAULT_LIMITS, Kind, reply_to
from experts.channel.handshake import Terms, join_handshake, serve_handshake
from experts.channel.server import MAX_HALF_OPEN
from tests.experts.frames import SECRET, control

WAIT_S = 60.0
BRIEF_S = 0.05
HELLO_BYTES = 40  # magic 4, version 1, padding 3, challenge 32
REPLY_BYTES = HELLO_BYTES + 28 + 32  # terms: five limits, credits, memory; proof
TERMS = Terms(FrameLimits(1, 2, 3, 4, 5), credits=7, memory=2)
CLIENT_TERMS = Terms(DEFAULT_LIMITS, credits=0, memory=1)
Sockets = tuple[socket.socket, socket.socket]


class Side(threading.Thread):
    """One side of a handshake in a thread; `outcome()` is what it returned or raised."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        super().__init__()
        self._call = lambda: function(*arguments)
        self._result: Any = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except ChannelError as error:
            self._result = error

    def outcome(self) -> Any:
        self.join(WAIT_S)
        return self._result


@pytest.fixture
def ends() -> Iterator[Sockets]:
    server_end, client_end = socket.socketpair()
    with server_end, client_end:
        yield server_end, client_end


def serve(sock: socket.socket, secret: bytes = SECRET, timeout_s: float = WAIT_S) -> Side:
    return Side(serve_handshake, sock, secret, TERMS, timeout_s)


def join(sock: socket.socket, secret: bytes = SECRET, timeout_s: float = WAIT_S) -> Side:
    return Side(join_handshake, sock, secret, CLIENT_TERMS, timeout_s)


def hello(version: int) -> bytes:
    """A server's first words, with a challenge of zeros."""
    return b"SHOL" + bytes([version, 0, 0, 0]) + bytes(32)


def receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    sock.settimeout(WAIT_S)
    data = sock.recv(num_bytes, socket.MSG_WAITALL)
    assert len(data) == num_bytes
    return data


def test_each_side_learns_the_others_terms(ends: Sockets) -> None:
    server, client = serve(ends[0]), join(ends[1])
    assert client.outcome() == TERMS
    assert server.outcome() == CLIENT_TERMS
    assert ends[0].gettimeout() is None and ends[1].gettimeout() is None


def test_a_client_with_another_secret_is_refused(ends: Sockets) -> None:
    server, client = serve(ends[0]), join(ends[1], b"another")
    assert isinstance(server.outcome(), ChannelRefused)
    ends[0].close()
    assert isinstance(client.outcome(), ChannelRefused)


def test_a_client_refuses_a_server_that_does_not_know_the_secret(ends: Sockets) -> None:
    client = join(ends[1])
    ends[0].sendall(hello(VERSION))
    answer = receive_exactly(ends[0], REPLY_BYTES)
    ends[0].sendall(answer)  # reflects the client's own proof
    assert str(client.outcome()) == "server does not know the secret"


def test_a_replayed_handshake_is_refused(ends: Sockets) -> None:
    server = serve(ends[0])
    hello = receive_exactly(ends[1], HELLO_BYTES)
    recorder, recorded_client = socket.socketpair()
    with recorder, recorded_client:
        client = join(recorded_client)
        recorder.sendall(hello)
        answer = receive_exactly(recorder, REPLY_BYTES)
        ends[1].sendall(answer)
        assert isinstance(server.outcome(), Terms)  # the recorded answer was a right one
        recorder.close()
        client.outcome()
    receive_exactly(ends[1], REPLY_BYTES)
    again = serve(ends[0])
    receive_exactly(ends[1], HELLO_BYTES)
    ends[1].sendall(answer)
    assert str(again.outcome()) == "client does not know the secret"


def test_changed_terms_are_refused(ends: Sockets) -> None:
    outer, inner = socket.socketpair()
    with outer, inner:
        server, client = serve(ends[0]), join(inner)
        outer.sendall(receive_exactly(ends[1], HELLO_BYTES))
        ends[1].sendall(receive_exactly(outer, REPLY_BYTES))
        answer = bytearray(receive_exactly(ends[1], REPLY_BYTES))
        assert isinstance(server.outcome(), Terms)
        answer[HELLO_BYTES + 20] += 1  # one more credit
        outer.sendall(answer)
        assert str(client.outcome()) == "server does not know the secret"


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n" + bytes(14), "peer does not speak this protocol"),
        (hello(3), "peer speaks protocol version 3, this side 2"),
    ],
)
def test_another_protocol_is_named(ends: Sockets, said: bytes, message: str) -> None:
    client = join(ends[1])
    ends[0].sendall(said)
    assert str(client.outcome()) == message


def test_silence_and_a_trickle_end_in_time(ends: Sockets) -> None:
    for sent in (b"", b"SHOL"):
        server = serve(ends[0], timeout_s=BRIEF_S)
        receive_exactly(ends[1], HELLO_BYTES)
        ends[1].sendall(sent)
        assert isinstance(server.outcome(), ChannelTimeout)
    assert isinstance(join(ends[1], timeout_s=BRIEF_S).outcome(), ChannelTimeout)


def test_a_peer_that_leaves(ends: Sockets) -> None:
    server = serve(ends[0])
    receive_exactly(ends[1], HELLO_BYTES)
    ends[1].close()
    assert isinstance(server.outcome(), ChannelClosed)


# --- through a live server ---


@pytest.fixture(params=["unix", "tcp"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    endpoint = f"unix:{tmp_path}/s" if request.param == "unix" else "tcp:127.0.0.1:0"
    made = Server(endpoint, lambda frame, _: reply_to(frame), SECRET, name="guarded")
    made.start()
    yield made
    made.close()


def assert_serves(server: Server) -> None:
    client = connect(server.endpoint, SECRET, timeout_s=WAIT_S)
    client.send(control(), WAIT_S)
    assert client.receive(WAIT_S).kind is Kind.CONTROL
    client.close()


def stranger(server: Server) -> socket.socket:
    scheme, _, rest = server.endpoint.partition(":")
    if scheme == "tcp":
        host, port = rest.split(":")
        return socket.create_connection((host, int(port)), WAIT_S)
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(rest)
    return sock


def assert_closed_by_server(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionResetError):  # closed with our bytes unread
        assert sock.recv(1) == b""


def test_a_wrong_secret_is_counted(server: Server) -> None:
    with pytest.raises(ChannelRefused):
        connect(server.endpoint, b"another", timeout_s=WAIT_S)
    assert server.counters.auth_failures == 1
    assert server.connections == ()
    assert_serves(server)


def test_a_wrong_secret_is_refused_in_the_process_too() -> None:
    server = Server("inproc:guarded", lambda frame, _: None, SECRET)
    server.start()
    with pytest.raises(ChannelRefused):
        connect("inproc:guarded", b"another")
    assert server.counters.auth_failures == 1
    server.close()


def test_strangers_bytes_close_their_connection_only(server: Server) -> None:
    for data in (b"GET / HTTP/1.1\r\n" + bytes(200), b"SHOL\x07" + bytes(200)):
        with stranger(server) as sock:
            receive_exactly(sock, HELLO_BYTES)
            sock.sendall(data)
            assert_closed_by_server(sock)
    with stranger(server) as sock:
        receive_exactly(sock, HELLO_BYTES)
        sock.sendall(b"SHOL")
        sock.shutdown(socket.SHUT_WR)
        assert_closed_by_server(sock)
    assert server.counters.auth_failures == 2
    assert server.counters.bad_frames == {"handshake": 1}
    assert_serves(server)


def test_silent_strangers_take_a_bounded_number_of_threads(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = partial(serve_handshake, timeout_s=WAIT_S)
    monkeypatch.setattr("experts.channel.server.serve_handshake", patient)
    strangers = [stranger(server) for _ in range(MAX_HALF_OPEN + 8)]
    for sock in strangers[:MAX_HALF_OPEN]:
        receive_exactly(sock, HELLO_BYTES)
    names = [t.name for t in threading.enumerate() if t.name.startswith("guarded-")]
    assert len(names) == MAX_HALF_OPEN + 1  # and the accept loop; the other eight wait
    for sock in strangers:
        sock.close()
    assert_serves(server)


def test_closing_does_not_wait_for_strangers(server: Server) -> None:
    with stranger(server) as sock:
        receive_exactly(sock, HELLO_BYTES)
        server.close(WAIT_S)
        assert_closed_by_server(sock)
    assert not [t for t in threading.enumerate() if t.name.startswith("guarded-")]
