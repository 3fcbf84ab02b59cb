"""A peer that knows the secret and lies: about where rows lie, about what it gives or offers."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.channel.channel import ChannelClosed, ChannelMemory, Connection, Server, connect
from experts.channel.codec import encode
from experts.channel.endpoint import Memory
from experts.channel.ends import ShmEnd
from experts.channel.envelope import ENVELOPE_BYTES, PREFIX_BYTES, What, pack, pack_alone, unpack
from experts.channel.frame import DEFAULT_LIMITS, Frame, FrameError, Kind, reply_to
from experts.channel.handshake import Terms, join_handshake
from tests.experts.frames import SECRET, control, raw_socket, wire

WAIT_S = 60.0
RING = 64 * 1024
ROWS = torch.arange(64 * 128, dtype=torch.float32).reshape(64, 128)  # 32 KiB: half of the ring


def placed(offset: int, length: int | None = None, kind: Kind = Kind.ROUTE_BATCH) -> bytes:
    """A frame that says its rows lie there."""
    buffers, _ = encode(Frame(kind, rows=ROWS), DEFAULT_LIMITS, ROWS.nbytes)
    length = ROWS.nbytes if length is None else length
    return pack(What.PLACED, offset, length) + b"".join(bytes(buffer) for buffer in buffers)


def forged(data: bytes, offset: int, replacement: bytes) -> bytes:
    """An envelope with bytes replaced and its checksum made right again."""
    fields = bytearray(data[: ENVELOPE_BYTES - 4])
    fields[offset : offset + len(replacement)] = replacement
    return bytes(fields) + struct.pack("<I", crc32c(bytes(fields))) + data[ENVELOPE_BYTES:]


class Guarded:
    """A server with rings that keeps the rows it gets."""

    def __init__(self, folder: Path) -> None:
        self.kept: list[Frame] = []
        self.got = threading.Semaphore(0)
        memory = ChannelMemory(RING, 16_384)
        self.server = Server(f"shm:{folder}/s", self._keep, SECRET, memory=memory, name="guarded")
        self.server.start()

    def _keep(self, frame: Frame, _: Connection) -> Frame | None:
        if frame.kind is Kind.CONTROL:
            return reply_to(frame)
        self.kept.append(frame)
        self.got.release()
        return None

    def client(self) -> Any:
        memory = ChannelMemory(RING, 16_384)
        return connect(self.server.endpoint, SECRET, timeout_s=WAIT_S, memory=memory)

    def attack(self, data: bytes) -> str:
        """Send bytes on a new connection; the field that ended it, empty if nothing did."""
        before = dict(self.server.counters.bad_frames)
        client = self.client()
        with raw_socket(client) as raw:
            raw.sendall(data + pack(What.INLINE) + wire(control()))
            raw.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ChannelClosed):
            client.receive(WAIT_S)
        client.close()
        after = self.server.counters.bad_frames
        return "".join(field for field in after if after[field] != before.get(field, 0))


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(tmp_path)
    yield made
    made.server.close()


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (placed(0), ""),
        (placed(RING // 2), ""),
        (placed(RING // 2 + 256), "length"),  # over the end
        (placed(RING), "offset"),
        (placed(2**64 - 256), "offset"),
        (placed(8), "offset"),  # not aligned
        (placed(0) + placed(256), "offset"),  # over rows that are still looked at
        (placed(RING // 2) + placed(256), "offset"),
        (placed(0, ROWS.nbytes - 4), "length"),  # not the rows' bytes
        (placed(0, 2**64 - 1), "length"),
        (placed(0, 0), "length"),
        (pack(What.INLINE) + placed(0)[ENVELOPE_BYTES:], "truncated"),  # waits for the rows
        (pack_alone(What.NOTICE, [0]), "released"),  # nothing is out
        (pack_alone(What.WANT, [256, 512]), "released"),
        (pack_alone(What.NOTICE)[:-1] + b"x", "header"),
        (forged(pack_alone(What.NOTICE), 4, b"\x00"), "what"),
        (forged(pack_alone(What.NOTICE), 4, b"\x05"), "what"),
        (forged(pack_alone(What.NOTICE), 5, b"\x09"), "released"),
        (forged(pack_alone(What.NOTICE), 24, b"\x01"), "released"),  # a slot nobody counts
        (forged(pack_alone(What.NOTICE), 8, b"\x01"), "offset"),
        (forged(pack_alone(What.NOTICE), 0, b"SHOL"), "magic"),
        (pack_alone(What.NOTICE)[:59] + b"\x00" + bytes(80), "envelope_crc"),
    ],
)
def test_lies_are_refused_before_memory_is_looked_at(
    guarded: Guarded, data: bytes, field: str
) -> None:
    assert guarded.attack(data) == field
    honest = guarded.client()  # others are served as before
    honest.send(Frame(Kind.ROUTE_BATCH, rows=ROWS), WAIT_S)
    while not (guarded.kept and torch.equal(guarded.kept[-1].rows, ROWS)):  # type: ignore[arg-type]
        assert guarded.got.acquire(timeout=WAIT_S)
    honest.close()


def test_rows_without_a_ring_are_refused(guarded: Guarded) -> None:
    """To a side whose ring could not be made."""
    client = guarded.client()
    client.send(control(), WAIT_S)
    client.receive(WAIT_S)
    client._landing = type(client._landing)(None)
    (server_end,) = guarded.server.connections
    with raw_socket(server_end) as raw:
        raw.sendall(placed(0, kind=Kind.ROUTE_RESULT))
        with pytest.raises(FrameError, match="absent"):
            client.receive(WAIT_S)


def test_a_peer_frees_only_its_own_region_once(guarded: Guarded) -> None:
    client = guarded.client()
    client.send(Frame(Kind.ROUTE_BATCH, rows=ROWS), WAIT_S)
    assert guarded.got.acquire(timeout=WAIT_S)
    (server_end,) = guarded.server.connections  # listed by now
    with raw_socket(server_end) as raw:
        raw.sendall(2 * pack_alone(What.NOTICE, [0]))
        with pytest.raises(FrameError, match="released"):
            client.receive(WAIT_S)
    assert client.closed


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.integers(0, PREFIX_BYTES - 1), st.binary(min_size=1, max_size=12), st.booleans())
def test_mutated_envelopes_and_headers(
    guarded: Guarded, position: int, noise: bytes, right: bool
) -> None:
    """The server ends that connection or serves it; it reads nothing outside its ring either way,
    and it goes on serving others."""
    data = bytearray(placed(0))
    data[position : position + len(noise)] = noise
    mutated = bytes(data)
    if right:
        mutated = forged(mutated, 0, b"RING")
    guarded.attack(mutated[: len(placed(0))])
    for frame in guarded.kept:
        assert frame.rows is not None and frame.rows.nbytes <= RING
    guarded.kept.clear()


@settings(max_examples=200)
@given(st.binary(min_size=PREFIX_BYTES, max_size=PREFIX_BYTES))
def test_random_bytes_are_no_envelope(data: bytes) -> None:
    with pytest.raises(FrameError):
        unpack(data)


slots = st.lists(st.integers(0, 2**32 - 1).map(lambda unit: unit * 256), max_size=8)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), slots)
def test_an_envelope_says_what_was_packed(offset: int, length: int, released: list[int]) -> None:
    found = unpack(pack(What.PLACED, offset, length, released) + bytes(80))
    assert found == (What.PLACED, offset, length, tuple(released))


# --- offers ---

OFFER = struct.Struct("<4sB3xQI")


def sealed(num_bytes: int, seals: int) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def offered_by_hand(guarded: Guarded, data: bytes, fds: list[int]) -> socket.socket:
    """A client that proves the secret and then offers this."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(WAIT_S)
    sock.connect(guarded.server.endpoint.partition(":")[2])
    join_handshake(sock, SECRET, Terms(DEFAULT_LIMITS, 0, Memory.SHM))
    sock.settimeout(WAIT_S)
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)
    _, received, _, _ = socket.recv_fds(sock, OFFER.size, 1)  # the server's own ring
    for fd in received:
        os.close(fd)
    return sock


@pytest.mark.parametrize(
    "data",
    [
        OFFER.pack(b"LAMP", Memory.SHM, 4096, 0),
        OFFER.pack(b"LAND", Memory.NIXL, 4096, 0),
        OFFER.pack(b"LAND", 9, 4096, 0),
        OFFER.pack(b"LAND", Memory.SHM, 2**63, 0),
        OFFER.pack(b"LAND", Memory.SHM, 4097, 0),
        OFFER.pack(b"LAND", Memory.SHM, 4096, 65537),
    ],
)
def test_offers_out_of_bounds_end_the_connection(
    guarded: Guarded, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "experts.channel")  # a record keeps its error, and so the ring
    gc.collect()  # what others left may not go meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    with (
        offered_by_hand(guarded, data, [sealed(4096, 7)]) as sock,
        contextlib.suppress(ConnectionResetError),
    ):
        assert sock.recv(1) == b""
    assert guarded.server.counters.auth_failures == 1
    for thread in threading.enumerate():
        if thread.name.startswith("guarded-unix"):
            thread.join(WAIT_S)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


SHRINK, GROW, SEAL = fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL


@pytest.mark.parametrize("case", ["grows", "shrinks", "smaller", "no memfd", "none", "handle"])
def test_memory_that_could_hurt_is_not_mapped(guarded: Guarded, case: str) -> None:
    """Its sender gets its answers in frames."""
    data = OFFER.pack(b"LAND", Memory.SHM, 65536, 0)
    seals = {"grows": SHRINK | SEAL, "shrinks": GROW | SEAL}.get(case, SHRINK | GROW | SEAL)
    fds = [sealed(4096 if case == "smaller" else 65536, seals)]
    if case == "no memfd":
        fds += [os.open("/dev/null", os.O_RDWR)]
        os.close(fds.pop(0))
    if case == "none":
        os.close(fds.pop())
    if case == "handle":
        data = OFFER.pack(b"LAND", Memory.SHM, 65536, 3) + b"abc"
    with offered_by_hand(guarded, data, fds) as sock:
        sock.sendall(pack(What.INLINE) + wire(control()))
        answer = sock.recv(PREFIX_BYTES, socket.MSG_WAITALL)
        assert unpack(answer).what is What.INLINE
    assert guarded.server.counters.fall_backs == {"shm": 1}


def test_a_ring_cannot_be_resized() -> None:
    """SIGBUS would follow, for whoever touches what is gone."""
    end = ShmEnd(ChannelMemory(4096))
    _, (fd,) = end.offer()
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)
    end.close()
