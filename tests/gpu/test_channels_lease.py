"""Memory of a GPU between two ends of a connection, over a driver that notes what it is asked."""

from __future__ import annotations

import ctypes
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experts.channel import cuda_memory, nixl_memory, offer
from experts.channel.channel import ChannelCounters, ChannelMemory
from experts.channel.endpoint import Memory, parse_endpoint
from experts.channel.ends import CudaEnd, make_end
from experts.channel.lease import Lease
from experts.channel.memory import MAX_DEVICE_LANDING_BYTES
from experts.channel.offer import End, exchange, usable_memory

WAIT_S = 60.0
BRIEF_S = 0.05
GPU = torch.device("cuda", 0)


class Driver:
    """Answers 0 to everything, and gives addresses that nobody may touch."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.allocated: list[int] = []
        self.fails = ""

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                return 1
            if name == "cuMemAlloc_v2":
                self.allocated.append(arguments[1].value)
            if name in ("cuMemAlloc_v2", "cuIpcOpenMemHandle_v2"):
                arguments[0]._obj.value = 4096
            return 0

        return call

    def num_held(self) -> int:
        got = self.calls.count("cuMemAlloc_v2") + self.calls.count("cuIpcOpenMemHandle_v2")
        return got - self.calls.count(self.fails) - len(self.of_memory())

    def of_memory(self) -> list[str]:
        return [name for name in self.calls if name in ("cuMemFree_v2", "cuIpcCloseMemHandle")]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    caches = cuda_memory._library, cuda_memory._primary_context
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda _: made)
    yield made
    gc.collect()
    assert until(lambda: made.num_held() == 0)  # threads let go of rings while the driver is there
    for cache in caches:
        cache.cache_clear()


def joined() -> tuple[Any, Any]:
    """Two ends and the ways from each to the other."""
    memory, counters = ChannelMemory(2**20, device=GPU), ChannelCounters()
    ends = [make_end(Memory.CUDA, memory, counters) for _ in range(2)]
    outlets: list[Any] = [None, None]
    socks = socket.socketpair()

    def meet(side: int) -> None:
        outlets[side] = exchange(socks[side], Memory.CUDA, ends[side], counters)

    other = threading.Thread(target=meet, args=(1,))
    other.start()
    meet(0)
    other.join(WAIT_S)
    for sock in socks:
        sock.close()
    return ends, outlets


def until(condition: Any) -> bool:
    deadline_s = time.monotonic() + WAIT_S
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return bool(condition())


def num_descriptors() -> int:
    gc.collect()  # what others left may not go meanwhile
    return len(os.listdir("/proc/self/fd"))


def test_a_ring_is_freed_after_its_peer_has_closed_it(driver: Driver) -> None:
    descriptors = num_descriptors()
    ends, outlets = joined()
    assert outlets[0] is not None and outlets[1] is not None
    block = weakref.ref(ends[0].block)
    ends.pop(0).close()
    time.sleep(BRIEF_S)
    assert block() is not None and driver.of_memory() == []  # the other side may be writing
    outlets.pop(1).close()
    assert until(lambda: driver.of_memory() == ["cuIpcCloseMemHandle", "cuMemFree_v2"])
    outlets.pop().close()  # the other way round: nothing is waited for
    ends.pop().close()
    assert until(lambda: driver.of_memory()[2:] == ["cuIpcCloseMemHandle", "cuMemFree_v2"])
    assert until(lambda: num_descriptors() <= descriptors)


def test_a_copy_under_way_keeps_the_ring_of_the_peer(driver: Driver) -> None:
    ends, outlets = joined()
    copying = outlets[1]._block  # as in BlockOutlet.put
    while ends:
        outlets.pop().close()
        ends.pop().close()
    assert until(lambda: len(driver.of_memory()) == 2)  # the other direction
    time.sleep(BRIEF_S)
    assert len(driver.of_memory()) == 2
    del copying
    assert until(lambda: len(driver.of_memory()) == 4)
    assert driver.of_memory()[2:] == ["cuIpcCloseMemHandle", "cuMemFree_v2"]


def test_a_ring_that_cannot_be_opened_leaves_nothing_behind(driver: Driver) -> None:
    descriptors = num_descriptors()
    driver.fails = "cuIpcOpenMemHandle_v2"
    ends, outlets = joined()
    assert outlets == [None, None]
    while ends:
        ends.pop().close()
    assert until(lambda: driver.of_memory() == ["cuMemFree_v2"] * 2)
    assert until(lambda: num_descriptors() <= descriptors)


def test_a_lease_that_nobody_took_ends_with_its_owner() -> None:
    descriptors = num_descriptors()
    lease = Lease(object())
    lease.close()
    lease.close()
    assert until(lambda: num_descriptors() <= descriptors)


def test_library_and_context_are_looked_up_once(driver: Driver) -> None:
    for _ in range(5):
        with cuda_memory.current_context(GPU):
            pass
    once = ["cuInit", "cuDevicePrimaryCtxRetain"]
    assert driver.calls == once + ["cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"] * 5


def test_rings_on_a_gpu_are_bounded(driver: Driver) -> None:
    for num_bytes in (MAX_DEVICE_LANDING_BYTES // 2, 2 * MAX_DEVICE_LANDING_BYTES):
        memory = ChannelMemory(num_bytes, device=GPU)
        end: End | None = make_end(Memory.CUDA, memory, ChannelCounters())
        assert isinstance(end, CudaEnd)
        assert end.block.num_bytes == min(num_bytes, MAX_DEVICE_LANDING_BYTES)
        end.close()


def test_a_ring_shares_no_page_with_other_memory(driver: Driver) -> None:
    """Who opens a handle gets the driver's whole pages of 2 MiB."""
    for num_bytes in (256, 2 << 20, (4 << 20) + 256):
        end = make_end(Memory.CUDA, ChannelMemory(num_bytes, device=GPU), ChannelCounters())
        assert isinstance(end, CudaEnd)
        assert end.block.num_bytes == num_bytes
        end.close()
    assert driver.allocated == [2 << 20, 2 << 20, 6 << 20]


class Nixl:
    """NIXL that does nothing, and notes whether the calling thread has a CUDA context."""

    VRAM_SEG, NIXL_WRITE, NIXL_SUCCESS, NIXL_IN_PROG = "VRAM", "WRITE", "SUCCESS", "IN_PROG"
    NIXL_THREAD_SYNC_STRICT = 1

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.with_context: dict[str, bool] = {}

    def nixlAgent(self, *_: Any) -> Any:
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> Any:
            pushed, popped = (
                self.driver.calls.count(f"cuCtx{which}Current_v2") for which in ("Push", "Pop")
            )
            self.with_context[name] = pushed > popped
            return self.NIXL_SUCCESS if name == "postXferReq" else SimpleNamespace()

        return call


def test_nixl_has_a_context_of_the_gpu_in_every_thread(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one UCX finds no way between two GPUs, and sends by TCP."""
    nixl = Nixl(driver)
    monkeypatch.setattr(nixl_memory, "load_nixl", lambda: nixl)
    end = nixl_memory.NixlEnd(ChannelMemory(2**20, device=GPU))
    end.open(2**20, nixl_memory._HANDLE.pack(4096, 1), []).close()
    end.close()
    for name in ("createBackend", "registerMem", "loadRemoteMD", "createXferReq", "postXferReq"):
        assert nixl.with_context[name], name


def test_rows_of_the_host_take_no_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(offer, "_is_own", lambda _: False)
    endpoint = parse_endpoint("cuda:/x")
    with socket.socket(socket.AF_UNIX) as sock:
        assert usable_memory(endpoint, sock, ChannelMemory()) is Memory.NONE
        assert usable_memory(endpoint, sock, ChannelMemory(device=GPU)) is Memory.CUDA
        assert usable_memory(endpoint, sock, ChannelMemory(0, device=GPU)) is Memory.NONE
