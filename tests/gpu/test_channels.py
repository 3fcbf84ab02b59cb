"""Landing rings: rows that are views of them, room, falling back, processes that die."""

from __future__ import annotations

import gc
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.channel.blocks import HostBlock
from experts.channel.channel import (
    ChannelClosed,
    ChannelCounters,
    ChannelError,
    ChannelMemory,
    ChannelTimeout,
    Connection,
    FrameError,
    Server,
    connect,
    wait_readable,
)
from experts.channel.endpoint import Memory
from experts.channel.ends import ShmEnd
from experts.channel.frame import Frame, Kind, Status, reply_to
from experts.channel.memory import Outlet
from tests.experts.frames import SECRET, control, rows, same_frame

WAIT_S = 60.0
BRIEF_S = 0.03
MIB = 2**20
WIDTH = 1024  # of float32: 4 KiB a row


def batch(num_rows: int, first: float = 0.0) -> Frame:
    """Rows of 4 KiB with values that name their place."""
    values = torch.arange(num_rows * WIDTH, dtype=torch.float32).reshape(num_rows, WIDTH)
    return Frame(Kind.ROUTE_BATCH, request_id=int(first), rows=values + first)


def echo(frame: Frame, _: Connection) -> Frame:
    return reply_to(frame, frame.rows)


class Rings:
    """Servers and clients of a kind of ring, with little memory."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.scheme = scheme
        self._folder = folder
        self._opened: list[Server | Connection] = []

    def endpoint(self) -> str:
        if self.scheme == "nixl":
            return "nixl:127.0.0.1:0"
        return f"{self.scheme}:{self._folder}/{len(self._opened)}"

    def serve(self, handler: Any = echo, num_bytes: int = MIB, credits: int = 32) -> Server:
        memory = ChannelMemory(num_bytes, 16_384)
        server = Server(
            self.endpoint(), handler, SECRET, credits=credits, name="rings", memory=memory
        )
        server.start()
        self._opened.append(server)
        return server

    def connect(
        self, server: Server, num_bytes: int = MIB, counters: ChannelCounters | None = None
    ) -> Any:
        memory = ChannelMemory(num_bytes, 16_384)
        client = connect(
            server.endpoint, SECRET, timeout_s=WAIT_S, counters=counters, memory=memory
        )
        self._opened.append(client)
        return client

    def close(self) -> None:
        for opened in reversed(self._opened):
            opened.close()


@pytest.fixture(params=["shm", "nixl"])
def rings(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rings]:
    made = Rings(request.param, tmp_path)
    yield made
    made.close()


def region_of(connection: Any) -> range:
    """The addresses of the connection's own ring."""
    block = connection._end.block
    return range(block.address, block.address + block.num_bytes)


def num_regions(connection: Any) -> int:
    count: int = connection._landing.num_regions
    return count


def test_rows_land_in_the_ring_and_are_not_copied(rings: Rings) -> None:
    seen: list[int] = []

    def handler(frame: Frame, connection: Connection) -> Frame:
        assert frame.rows is not None
        seen.append(frame.rows.data_ptr() - region_of(connection)[0])
        return reply_to(frame, frame.rows)

    server, counters = rings.serve(handler), ChannelCounters()
    client = rings.connect(server, counters=counters)
    assert not client.accepts_device
    for number in range(3):
        client.send(batch(16, number), WAIT_S)
        answer = client.receive(WAIT_S)
        assert answer.rows is not None and answer.rows.data_ptr() in region_of(client)
        assert torch.equal(answer.rows, batch(16, number).rows)  # type: ignore[arg-type]
    # The first region is used again as soon as it is free: the frame that follows says so.
    assert sorted(set(seen)) in ([0], [0, 65536])
    assert counters.placed_bytes_out == counters.placed_bytes_in == 3 * 65536
    assert server.counters.placed_bytes_in == 3 * 65536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_dtype_odd_widths_and_strides(rings: Rings, dtype: torch.dtype) -> None:
    client = rings.connect(rings.serve())
    odd = rows(317, 331, dtype)
    for sent in (odd, odd.t(), odd[::2], odd[:, 5:200]):
        frame = Frame(Kind.ROUTE_BATCH, rows=sent)
        client.send(frame, WAIT_S)
        same_frame(client.receive(WAIT_S), reply_to(frame, sent.contiguous()))
    assert client._counters.placed_bytes_in > 0


def test_small_empty_and_large_rows_travel_in_the_frame(rings: Rings) -> None:
    counters = ChannelCounters()
    client = rings.connect(rings.serve(), counters=counters)
    for frame in (batch(0), batch(1), batch(257)):  # 0, 4 KiB, 1 MiB + 4 KiB
        client.send(frame, WAIT_S)
        same_frame(client.receive(WAIT_S), reply_to(frame, frame.rows))
    assert (counters.placed_bytes_out, counters.placed_bytes_in) == (0, 0)
    client.send(batch(256), WAIT_S)  # the whole ring
    same_frame(client.receive(WAIT_S), reply_to(batch(256), batch(256).rows))
    assert counters.placed_bytes_out == MIB


def test_a_full_ring_waits_within_the_timeout(rings: Rings) -> None:
    held: list[Frame] = []
    got = threading.Semaphore(0)

    def keep(frame: Frame, _: Connection) -> None:
        held.append(frame)
        got.release()

    client = rings.connect(rings.serve(keep, credits=8))
    for number in range(4):
        client.send(batch(64, number), WAIT_S)  # a quarter of the ring each
        assert got.acquire(timeout=WAIT_S)
    begin_s = time.monotonic()
    with pytest.raises(ChannelTimeout, match="no room for 262144 bytes"):
        client.send(batch(64, 4), 0.1)
    assert 0.1 <= time.monotonic() - begin_s < WAIT_S
    assert client.credits == 4 and not client.closed  # the credit of the fifth came back
    expected = [batch(64, number).rows for number in range(4)]
    assert all(torch.equal(f.rows, e) for f, e in zip(held, expected, strict=True))  # type: ignore[arg-type]
    timer = threading.Timer(0.05, lambda: held.pop(2))  # not in the order of arrival
    timer.start()
    client.send(batch(64, 4), WAIT_S)
    timer.join()
    assert got.acquire(timeout=WAIT_S)
    assert [int(frame.rows[0, 0]) for frame in held] == [0, 1, 3, 4]  # type: ignore[index]


def test_room_is_found_in_a_thread_that_alone_sends_and_receives(rings: Rings) -> None:
    """Both rings full in both directions: the sender itself takes in what gives it room."""
    client = rings.connect(rings.serve(credits=16), num_bytes=MIB)
    for number in range(12):  # a quarter of the ring each: neither side has room for so many
        client.send(batch(64, number), WAIT_S)
    for number in range(12):
        assert wait_readable([client], WAIT_S) == [client]  # also what it has kept meanwhile
        answer = client.receive(WAIT_S)
        assert answer.request_id == number
        assert torch.equal(answer.rows, batch(64, number).rows)
        del answer


def test_pushes_to_a_client_that_only_waits(rings: Rings) -> None:
    """The regions come back when the server asks: wait_readable answers, and names frames only."""
    ends: list[Connection] = []
    server = rings.serve(lambda frame, connection: ends.append(connection))
    client = rings.connect(server)
    client.send(control(), WAIT_S)
    while not ends:
        time.sleep(0.001)
    pushed = Frame(Kind.ROUTE_RESULT, rows=batch(100).rows)  # 400 KiB: two fit, not three
    sender = threading.Thread(target=lambda: [ends[0].send(pushed, WAIT_S) for _ in range(6)])
    sender.start()
    for _ in range(6):
        assert wait_readable([client], WAIT_S) == [client]
        assert torch.equal(client.receive(WAIT_S).rows, pushed.rows)  # type: ignore[arg-type]
    assert wait_readable([client], BRIEF_S) == []
    sender.join(WAIT_S)
    assert not sender.is_alive()


def test_views_keep_their_region_and_outlive_the_connection(rings: Rings) -> None:
    server = rings.serve()
    client = rings.connect(server)
    client.send(batch(32, 7), WAIT_S)
    kept = client.receive(WAIT_S).rows[3:5]  # a view of a view
    assert num_regions(client) == 1
    for number in range(40):  # 5 rings full pass by
        client.send(batch(32, number), WAIT_S)
        assert torch.equal(client.receive(WAIT_S).rows, batch(32, number).rows)  # type: ignore[arg-type]
    assert num_regions(client) == 2
    client.close()
    server.close()
    gc.collect()
    assert torch.equal(kept, batch(32, 7).rows[3:5])  # type: ignore[index]
    kept += 1  # and is ours to write


def test_heavy_traffic_of_random_sizes_released_in_any_order(rings: Rings) -> None:
    """Four threads send; rows are kept at both ends, and dropped in random order. Three times
    360 KiB at most, so that one of the four gaps between them in 3 MiB always has room for more."""
    kept: list[Frame] = []
    rng = random.Random(5)

    def handler(frame: Frame, _: Connection) -> Frame:
        kept.append(frame)
        while len(kept) > 3 or (kept and rng.random() < 0.5):
            kept.pop(rng.randrange(len(kept)))
        return reply_to(frame, frame.rows)

    client = rings.connect(rings.serve(handler, 3 * MIB), 3 * MIB)
    sizes = [random.Random(number).choice((1, 3, 9, 20, 33, 64, 90)) for number in range(200)]

    def send(first: int) -> None:
        for number in range(first, 200, 4):
            client.send(batch(sizes[number], number), WAIT_S)

    threads = [threading.Thread(target=send, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    answers: list[Frame] = []
    seen: set[int] = set()
    while len(seen) < 200:
        answers.append(client.receive(WAIT_S))
        if len(answers) > 3:
            seen.add(check(answers.pop(rng.randrange(len(answers))), sizes))
        if len(seen) + len(answers) == 200:
            seen |= {check(answer, sizes) for answer in answers}
    for thread in threads:
        thread.join(WAIT_S)
    answers.clear()
    kept.clear()
    client.send(batch(768), WAIT_S)  # nothing was lost: the whole ring can be had
    same_frame(client.receive(WAIT_S), reply_to(batch(768), batch(768).rows))


def check(answer: Frame, sizes: list[int]) -> int:
    number = answer.request_id
    assert torch.equal(answer.rows, batch(sizes[number], number).rows)  # type: ignore[arg-type]
    return number


# --- falling back ---


def test_sides_that_do_not_agree_use_frames(tmp_path: Path, caplog: Any) -> None:
    """A server with rings, clients without any, and the other way round: counted, logged once."""
    made = Rings("shm", tmp_path)
    server = made.serve()
    ours = ChannelCounters()
    with caplog.at_level(logging.WARNING, "experts.channel"):
        clients = [made.connect(server, 0, ours) for _ in range(3)]
        path = server.endpoint.partition(":")[2]
        clients.append(connect(f"unix:{path}", SECRET, timeout_s=WAIT_S))
        for client in clients:
            client.send(batch(64, 3), WAIT_S)
            same_frame(client.receive(WAIT_S), reply_to(batch(64, 3), batch(64, 3).rows))
    clients[-1].close()
    assert ours.fall_backs == {"shm": 3} and server.counters.fall_backs == {"shm": 4}
    assert ours.placed_bytes_out == server.counters.placed_bytes_out == 0
    assert len(caplog.messages) == 2  # one of each side
    made.close()


def test_a_ring_that_cannot_be_opened_costs_its_direction_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Rings("shm", tmp_path)
    server, ours = made.serve(), ChannelCounters()
    opened = ShmEnd.open

    def open_some(end: ShmEnd, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        if threading.current_thread().name.startswith("rings-"):
            raise OSError("no more mappings")
        return opened(end, num_bytes, handle, fds)

    monkeypatch.setattr(ShmEnd, "open", open_some)
    client = made.connect(server, counters=ours)
    client.send(batch(64, 3), WAIT_S)
    same_frame(client.receive(WAIT_S), reply_to(batch(64, 3), batch(64, 3).rows))
    assert (ours.placed_bytes_out, ours.placed_bytes_in) == (262144, 0)
    assert server.counters.fall_backs == {"shm": 1} and not ours.fall_backs
    made.close()


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_side_without_memory_for_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    made = Rings("shm", tmp_path)
    server, ours = made.serve(), ChannelCounters()
    create = ShmEnd.__init__

    def fail(end: ShmEnd, memory: ChannelMemory) -> None:
        in_server = threading.current_thread().name.startswith("rings-")
        if in_server == (side == "server"):
            raise OSError("out of memory")
        create(end, memory)

    monkeypatch.setattr(ShmEnd, "__init__", fail)
    client = made.connect(server, counters=ours)
    client.send(batch(64, 3), WAIT_S)
    same_frame(client.receive(WAIT_S), reply_to(batch(64, 3), batch(64, 3).rows))
    assert ours.fall_backs == {"shm": 1} and server.counters.fall_backs == {"shm": 1}
    made.close()


def test_a_cuda_endpoint_without_a_gpu_uses_frames(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made = Rings("cuda", tmp_path)
    server = made.serve()
    client = made.connect(server)
    assert not client.accepts_device
    client.send(batch(64), WAIT_S)
    same_frame(client.receive(WAIT_S), reply_to(batch(64), batch(64).rows))
    assert server.counters.fall_backs == {"cuda": 1}
    made.close()


def test_nixl_that_is_not_installed_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    for call in (
        lambda: connect("nixl:127.0.0.1:1", SECRET),
        lambda: Server("nixl:127.0.0.1:0", echo, SECRET).start(),
    ):
        with pytest.raises(ChannelError, match=r"pip install 'shoal-serve\[nixl\]'"):
            call()


class DeviceOutlet:
    """Takes rows "on a device": the meta device here, which needs no GPU."""

    num_bytes, accepts_device, min_bytes = MIB, True, 0

    def __init__(self) -> None:
        self.put_shapes: list[tuple[int, ...]] = []

    def put(self, offset: int, rows: torch.Tensor, deadline_s: float | None) -> None:
        self.put_shapes.append(tuple(rows.shape))

    def close(self) -> None:
        """Nothing to let go."""


def test_rows_on_a_device_need_a_connection_that_accepts_them(tmp_path: Path) -> None:
    for scheme in ("inproc", "unix", "tcp", "shm"):
        made = Rings(scheme, tmp_path)
        server = Server(
            {"inproc": "inproc:x", "tcp": "tcp:127.0.0.1:0"}.get(scheme, made.endpoint()),
            echo,
            SECRET,
        )
        server.start()
        client = connect(server.endpoint, SECRET, timeout_s=WAIT_S)
        assert not client.accepts_device
        on_device = Frame(Kind.ROUTE_BATCH, rows=torch.empty(64, WIDTH, device="meta"))
        with pytest.raises(FrameError, match=r"stage them \(experts/staging.py\)"):
            client.send(on_device, WAIT_S)
        client.send(control(), WAIT_S)  # still usable, nothing was sent
        assert client.receive(WAIT_S).kind is Kind.CONTROL
        assert client.credits == 32
        client.close()
        server.close()


def test_rows_on_a_device_are_not_moved_to_the_host(tmp_path: Path) -> None:
    """The shared part of cuda and nixl with a device: what is put, and what goes in the frame."""
    made = Rings("shm", tmp_path)
    frames: list[Frame] = []
    client = made.connect(made.serve(lambda frame, _: frames.append(frame)))
    outlet = DeviceOutlet()
    client._outlet = outlet
    assert client.accepts_device
    client.send(Frame(Kind.ROUTE_BATCH, rows=torch.empty(3, WIDTH, device="meta")), WAIT_S)
    client.send(batch(64, 1), WAIT_S)  # rows on the host: in the frame
    assert outlet.put_shapes == [(3, WIDTH)]
    while len(frames) < 2:
        time.sleep(0.001)
    assert frames[0].rows is not None and frames[0].rows.shape == (3, WIDTH)
    same_frame(frames[1], batch(64, 1))
    made.close()


def test_a_buffer_of_the_callers_choice(tmp_path: Path) -> None:
    """What a process with CUDA does to receive into pinned memory."""
    made: list[np.ndarray[Any, Any]] = []

    def allocate(num_bytes: int) -> np.ndarray[Any, Any]:
        made.append(np.zeros(num_bytes, np.uint8))
        return made[-1]

    server = Server(f"unix:{tmp_path}/s", echo, SECRET)
    server.start()
    memory = ChannelMemory(allocate=allocate)
    client = connect(server.endpoint, SECRET, timeout_s=WAIT_S, memory=memory)
    client.send(batch(2), WAIT_S)
    answer = client.receive(WAIT_S).rows
    assert answer is not None and answer.data_ptr() == made[-1].ctypes.data
    client.close()
    server.close()


def test_marks_hold_a_region_until_the_device_is_done() -> None:
    """A kernel may still read what Python has dropped."""
    from experts.channel.codec import decode_header
    from experts.channel.frame import DEFAULT_LIMITS
    from experts.channel.landing import Landing
    from tests.experts.frames import wire

    class Mark:
        done = False

        def query(self) -> bool:
            return self.done

    marks: list[Mark] = []

    class Slow(HostBlock):
        is_device = True

        def mark(self) -> Mark:
            marks.append(Mark())
            return marks[-1]

    landing = Landing(Slow(bytearray(4096)))
    header = decode_header(wire(Frame(Kind.ROUTE_BATCH, rows=rows(2, 64)))[:80], DEFAULT_LIMITS)
    views = [landing.claim(header, at, 512).rows(header) for at in (0, 512)]
    views.pop(0)
    views.pop(0)
    assert landing.take_free() == [] and landing.num_regions == 2
    marks[0].done = True
    assert landing.take_free() == [0]
    marks[1].done = True
    assert landing.take_free() == [512] and landing.num_regions == 0


# --- processes that die ---

CHILD = """
import sys, torch
from experts.channel.channel import ChannelMemory, connect
from experts.channel.frame import Frame, Kind
memory = ChannelMemory(2**20, 16384)
client = connect(sys.argv[1], sys.argv[2].encode(), timeout_s=60, memory=memory)
held = []
frame = Frame(Kind.ROUTE_BATCH, rows=torch.ones(64, 1024))
client.send(frame, 60)
held.append(client.receive(60))
print("ready", flush=True)
if sys.argv[3] == "leave":
    sys.exit(0)
while True:
    client.send(frame, 60)
    client.receive(60)
"""


def start_child(server: Server, how: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", CHILD, server.endpoint, SECRET.decode(), how]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def shared_files(pid: int) -> list[str]:
    """What the process left in shared memory; files of others come and go meanwhile."""
    return [name for name in os.listdir("/dev/shm") if str(pid) in name]


@pytest.mark.chaos
def test_a_killed_peer_leaves_nothing_behind(rings: Rings) -> None:
    """SIGKILL amid traffic, the survivor holding rows, sending and receiving."""
    rings.connect(rings.serve())
    rings.close()  # what libraries open once is not a leak
    gc.collect()
    descriptors, threads = num_descriptors(), set(threading.enumerate())
    held: list[torch.Tensor] = []
    pushers: list[threading.Thread] = []
    outcomes: list[str] = []

    def handler(frame: Frame, connection: Connection) -> Frame:
        assert frame.rows is not None
        if not held:
            held.append(frame.rows[1])
            pushers.append(threading.Thread(target=push, args=(connection,)))
            pushers[0].start()
        return reply_to(frame, frame.rows)

    def push(connection: Connection) -> None:
        try:
            while True:
                connection.send(control(bytes(10)), WAIT_S)
                connection.send(Frame(Kind.CONTROL, body=bytes(5000)), WAIT_S)
        except ChannelError as error:
            outcomes.append(type(error).__name__)

    server = rings.serve(handler)
    with start_child(server, "stay") as child:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        child.kill()
        pushers[0].join(WAIT_S)
    assert outcomes == ["ChannelClosed"]
    server.close(WAIT_S)
    assert float(held[0].sum()) == WIDTH
    held.clear()
    gc.collect()
    assert num_descriptors() <= descriptors
    assert not shared_files(child.pid)
    assert set(threading.enumerate()) <= threads


@pytest.mark.chaos
def test_a_process_may_leave_with_nixl_at_work(tmp_path: Path) -> None:
    rings = Rings("nixl", tmp_path)
    server = rings.serve()
    with start_child(server, "leave") as child:
        output, errors = child.communicate(timeout=600)
        assert child.returncode == 0
        assert output == b"ready\n"  # no library speaks up
        assert errors == b""
    rings.close()


def test_both_sides_say_what_they_can(tmp_path: Path) -> None:
    assert [memory.name for memory in Memory] == ["NONE", "SHM", "CUDA", "NIXL"]
    made = Rings("shm", tmp_path)
    client = made.connect(made.serve(), 3 * 256 + 17)  # rounded down to regions
    assert len(region_of(client)) == 768
    assert client.send(batch(64), WAIT_S) is None
    assert client.receive(WAIT_S).status is Status.OK
    with pytest.raises(ChannelClosed):
        client.close()
        client.receive(WAIT_S)
    made.close()
