"""One side's memory of a connection with landing rings, of each kind."""

import os
from dataclasses import replace

from experts.channel import cuda_memory, shared_memory
from experts.channel.arena import ALIGN
from experts.channel.connection import ChannelError
from experts.channel.counters import ChannelCounters
from experts.channel.endpoint import Memory
from experts.channel.frame import FrameError
from experts.channel.lease import Lease
from experts.channel.memory import MAX_DEVICE_LANDING_BYTES, Block, ChannelMemory, Outlet
from experts.channel.nixl_memory import NixlEnd, load_nixl
from experts.channel.offer import End, fall_back


class ShmEnd:
    """Shared memory of the host."""

    kind = Memory.SHM

    def __init__(self, memory: ChannelMemory) -> None:
        self.block: Block
        self.block, self._fd = shared_memory.create(memory.landing_bytes)
        self._min_bytes = memory.min_bytes

    def offer(self) -> tuple[bytes, list[int]]:
        fds, self._fd = [self._fd], -1
        return b"", fds

    def open(self, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        if handle or len(fds) != 1:
            raise FrameError("landing", f"{len(handle)} bytes, {len(fds)} fds", "one descriptor")
        return shared_memory.open_peer(fds[0], num_bytes, self._min_bytes)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CudaEnd:
    """Memory of a GPU."""

    kind = Memory.CUDA

    def __init__(self, memory: ChannelMemory) -> None:
        if memory.device is None:
            raise ValueError("a ring of cuda needs a device")
        self._device = memory.device
        self._own = cuda_memory.DeviceBlock(self._device, memory.landing_bytes)
        self.block: Block = self._own
        self._lease = Lease(self._own)

    def offer(self) -> tuple[bytes, list[int]]:
        return self._own.handle(), [self._lease.give()]

    def open(self, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        if len(handle) != cuda_memory.HANDLE_BYTES or len(fds) != 1:
            limit = f"{cuda_memory.HANDLE_BYTES} bytes, one descriptor"
            raise FrameError("landing", f"{len(handle)} bytes, {len(fds)} fds", limit)
        return cuda_memory.open_peer(handle, num_bytes, self._device, fds[0])

    def close(self) -> None:
        """The block goes with its last view, when the peer has closed it too."""
        self._lease.close()


_ENDS: dict[Memory, type[ShmEnd] | type[CudaEnd] | type[NixlEnd]] = {
    Memory.SHM: ShmEnd,
    Memory.CUDA: CudaEnd,
    Memory.NIXL: NixlEnd,
}


def load(kind: Memory) -> None:
    """Make sure that ends of this kind can be made. Raises ChannelError with the fix."""
    if kind is Memory.NIXL:
        load_nixl()


def make_end(kind: Memory, memory: ChannelMemory, counters: ChannelCounters) -> End | None:
    """This side's ring, None when it cannot be made."""
    num_bytes = memory.landing_bytes // ALIGN * ALIGN
    if kind is not Memory.SHM and memory.device is not None:
        num_bytes = min(num_bytes, MAX_DEVICE_LANDING_BYTES)
    try:
        return _ENDS[kind](replace(memory, landing_bytes=num_bytes))
    except (ChannelError, OSError, RuntimeError, ValueError) as error:
        fall_back(counters, kind, f"this side has no ring: {error}")
        return None
