"""Hostile bytes: refused, counted, never a crash, a hang or a large allocation."""

from __future__ import annotations

import contextlib
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from crc32c import crc32c
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.channel.channel import (
    ChannelClosed,
    ChannelCounters,
    Connection,
    FrameError,
    FrameLimits,
    Server,
    connect,
)
from experts.channel.codec import HEADER_BYTES, decode_header
from experts.channel.connection import ClientFlow
from experts.channel.frame import DEFAULT_LIMITS, Frame, Kind, Status, reply_to
from experts.channel.stream import StreamConnection
from tests.experts.frames import (
    SECRET,
    control,
    expert_batch,
    not_here,
    raw_socket,
    rows,
    unwire,
    wire,
    with_header,
)

WAIT_S = 60.0
LIMITS = FrameLimits(
    max_payload_bytes=4096, max_rows=16, max_width=64, max_pairs=32, max_body_bytes=256
)
VALID = [
    wire(frame)
    for frame in (
        expert_batch(3, 5, 7),
        control(),
        not_here(),
        Frame(Kind.ROUTE_BATCH, rows=rows(2, 4)),
        Frame(Kind.EXPERT_RESULT, status=Status.FAILED, body=b"no"),
    )
]
valid_frames = st.sampled_from(VALID)
fuzz = settings(
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@fuzz
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_header(data, LIMITS)


@fuzz
@given(valid_frames, st.integers(4, HEADER_BYTES - 5), st.binary(min_size=1, max_size=8))
def test_an_accepted_header_keeps_its_promises(data: bytes, offset: int, noise: bytes) -> None:
    """With right checksums, so that only the fields' own rules can refuse it."""
    noise = noise[: HEADER_BYTES - 4 - offset]
    mutated = with_header(data, offset, noise)[:HEADER_BYTES]
    try:
        header = decode_header(mutated, LIMITS)
    except FrameError:
        return
    assert header.payload_len <= LIMITS.max_payload_bytes
    item_bytes = (0, 4, 2, 1)[header.dtype]
    pair_bytes = {Kind.EXPERT_BATCH: 12, Kind.EXPERT_RESULT: 4}.get(header.frame.kind, 0)
    assert header.payload_len == (
        header.num_pairs * pair_bytes
        + header.num_rows * header.width * item_bytes
        + header.body_bytes
    )
    assert header.num_rows <= LIMITS.max_rows and header.width <= LIMITS.max_width


@fuzz
@given(
    st.lists(st.integers(-1, 3), min_size=5, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=5, max_size=5),
    st.lists(st.floats(width=32), min_size=5, max_size=5),
)
def test_accepted_pairs_are_in_range(
    row_ids: list[int], expert_ids: list[int], weights: list[float]
) -> None:
    """The payload's checksum is made right: a peer with the secret can do that."""
    data = VALID[0]
    pairs = struct.pack("<5i5i5f", *row_ids, *expert_ids, *weights)
    payload = pairs + data[HEADER_BYTES + 60 :]
    checksum = crc32c(payload).to_bytes(4, "little")
    data = with_header(data, HEADER_BYTES - 8, checksum)[:HEADER_BYTES] + payload
    try:
        frame = unwire(data, LIMITS)
    except FrameError as error:
        assert error.field in ("row_ids", "expert_ids", "weights")
        return
    assert frame.row_ids is not None and frame.expert_ids is not None
    assert frame.weights is not None
    assert int(frame.row_ids.min()) >= 0 and int(frame.row_ids.max()) < 3
    assert int(frame.expert_ids.min()) >= 0
    assert frame.weights.isfinite().all()


def test_hostile_sizes_allocate_nothing() -> None:
    """The largest sizes that fit the fields, against the default limits of 128 MiB."""
    hostile = [
        with_header(data, offset, size.to_bytes(4, "little"))[:HEADER_BYTES]
        for data in VALID
        for offset in (40, 44, 48, 52, 56)
        for size in (2**32 - 1, 2**31, 2**20)
    ]
    tracemalloc.start()
    refused = 0
    for header in hostile:
        try:
            decode_header(header, DEFAULT_LIMITS)
        except FrameError:
            refused += 1
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused == len(hostile)
    assert peak_bytes < 64 * 1024


@pytest.mark.parametrize("data", VALID)
def test_a_frame_cut_at_any_byte_ends_the_connection(data: bytes) -> None:
    for length in range(len(data)):
        near, far = socket.socketpair()
        counters = ChannelCounters()
        connection = StreamConnection(
            near, "far", ClientFlow(1), DEFAULT_LIMITS, DEFAULT_LIMITS, counters
        )
        with far:
            far.sendall(data[:length])
        with pytest.raises((ChannelClosed, FrameError)):
            connection.receive(WAIT_S)
        assert connection.closed
        expected = {} if length == 0 else {"truncated": 1}
        if data[5] == Kind.EXPERT_BATCH or data[5] == Kind.ROUTE_BATCH:
            expected = expected if length < HEADER_BYTES else {"direction": 1}
        assert counters.bad_frames == expected


# --- a live server ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path: Path = tmp_path_factory.mktemp("fuzz") / "s"
    made = Server(f"unix:{path}", lambda frame, _: reply_to(frame, frame.rows), SECRET, LIMITS)
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def good_client(server: Server) -> Iterator[Connection]:
    client = connect(server.endpoint, SECRET, timeout_s=WAIT_S)
    yield client
    client.close()


def attack(server: Server, data: bytes) -> None:
    """Send bytes after a right handshake, then end; the server must end the connection too."""
    client = connect(server.endpoint, SECRET, timeout_s=WAIT_S)
    with raw_socket(client) as raw:
        with contextlib.suppress(OSError):  # it may have closed already
            raw.sendall(data)
            raw.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelClosed):
            while True:
                client.receive(WAIT_S)


def assert_serves(client: Connection) -> None:
    client.send(expert_batch(3, 5, 7), WAIT_S)
    answer = client.receive(WAIT_S)
    assert answer.status is Status.OK


@settings(fuzz, max_examples=100)
@given(st.binary(min_size=1, max_size=400))
def test_garbage_ends_one_connection(server: Server, good_client: Connection, data: bytes) -> None:
    before = sum(server.counters.bad_frames.values())
    attack(server, data)
    assert_serves(good_client)
    assert sum(server.counters.bad_frames.values()) == before + 1


@settings(fuzz, max_examples=150)
@given(
    valid_frames,
    st.integers(0, HEADER_BYTES - 5),
    st.binary(min_size=1, max_size=4),
    st.integers(0, 200),
)
def test_mutated_frames_leave_the_server_whole(
    server: Server, good_client: Connection, data: bytes, offset: int, noise: bytes, cut: int
) -> None:
    noise = noise[: HEADER_BYTES - 4 - offset]
    attack(server, with_header(data, offset, noise)[: HEADER_BYTES + cut])
    assert_serves(good_client)
    assert server.counters.handler_errors == 0
