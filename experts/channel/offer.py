"""After the handshake: each side tells where rows may land, and opens the place of the other.

Only where both said the same kind of memory in the handshake. One message each way, 20 bytes and a
handle: the 64 bytes of a CUDA handle and a descriptor (lease.py), NIXL's metadata, or a descriptor
(SCM_RIGHTS) and no bytes.
A side that cannot make its ring offers NONE, one that cannot open its peer's sends rows in frames:
each direction stands for itself, and the connection works without either.
"""

import logging
import os
import socket
import struct
import time
from dataclasses import replace
from typing import Protocol

import torch

from experts.channel import cuda_memory, shared_memory
from experts.channel.arena import ALIGN
from experts.channel.connection import ChannelClosed, ChannelError, ChannelRefused, ChannelTimeout
from experts.channel.counters import ChannelCounters
from experts.channel.endpoint import Endpoint, Memory
from experts.channel.frame import FrameError
from experts.channel.handshake import receive_exactly, send_all
from experts.channel.lease import Lease
from experts.channel.memory import MAX_DEVICE_LANDING_BYTES, Block, ChannelMemory, Outlet
from experts.channel.nixl_memory import NixlEnd, load_nixl

logger = logging.getLogger(__name__)

EXCHANGE_TIMEOUT_S = 10.0  # the first NIXL agent of a process takes a second
MAX_LANDING_BYTES = 2**36
MAX_HANDLE_BYTES = 65_536
_OFFER = struct.Struct("<4sB3xQI")
_MAGIC = b"LAND"


class End(Protocol):
    """One side's memory of one connection."""

    kind: Memory
    block: Block  # of its own ring

    def offer(self) -> tuple[bytes, list[int]]:
        """What the peer needs to reach the ring; descriptors are closed once they are sent."""

    def open(self, num_bytes: int, handle: bytes, fds: list[int]) -> Outlet:
        """The way to the peer's ring. Raises ChannelError, FrameError or OSError."""

    def close(self) -> None:
        """The connection has ended. Rows that are still looked at keep their memory."""


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


def check_available(endpoint: Endpoint) -> None:
    """Load what this endpoint needs before anybody waits. Raises ChannelError with the fix."""
    if endpoint.memory is Memory.NIXL:
        load_nixl()


def usable_memory(endpoint: Endpoint, sock: socket.socket, memory: ChannelMemory) -> Memory:
    """What this side can say in the handshake; NONE when there would be no use in more."""
    if memory.landing_bytes < ALIGN:
        return Memory.NONE
    if endpoint.memory is Memory.CUDA and (
        memory.device is None or not torch.cuda.is_available() or _is_own(sock)
    ):
        return Memory.NONE
    return endpoint.memory


def _is_own(sock: socket.socket) -> bool:
    """Whether the other end of a unix socket is this process: it cannot open its own handles."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], "little") == os.getpid()


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


def fall_back(counters: ChannelCounters, kind: Memory, reason: str) -> None:
    """Rows of a connection will travel in the frame."""
    if counters.fall_back(kind.name.lower()) == 1:
        logger.warning("rows travel in the frame, not by %s: %s", kind.name.lower(), reason)


def exchange(
    sock: socket.socket, kind: Memory, end: End | None, counters: ChannelCounters
) -> Outlet | None:
    """Tell this side's ring and open the peer's; None when its rows go in the frame.

    Raises ChannelClosed, ChannelTimeout, or ChannelRefused for a peer that breaks the format.
    """
    deadline_s = time.monotonic() + EXCHANGE_TIMEOUT_S
    _send_offer(sock, end, deadline_s)
    num_bytes, handle, fds = _receive_offer(sock, kind, deadline_s)
    try:
        if end is None:
            return None
        if not num_bytes:
            fall_back(counters, kind, "the peer has no ring")
            return None
        return end.open(num_bytes, handle, fds)
    except Exception as error:  # a library's own errors too: the rows go in the frame
        fall_back(counters, kind, f"cannot open the ring of the peer: {error}")
        return None
    finally:
        for fd in fds:
            os.close(fd)
        sock.settimeout(None)


def _send_offer(sock: socket.socket, end: End | None, deadline_s: float) -> None:
    if end is None:
        send_all(sock, _OFFER.pack(_MAGIC, Memory.NONE, 0, 0), deadline_s)
        return
    handle, fds = end.offer()
    data = _OFFER.pack(_MAGIC, end.kind, end.block.num_bytes, len(handle)) + handle
    try:
        sock.settimeout(max(0.001, deadline_s - time.monotonic()))
        if fds:
            sent = socket.send_fds(sock, [data], fds)
            data = data[sent:]
        send_all(sock, data, deadline_s)
    except TimeoutError:
        raise ChannelTimeout("handshake took too long") from None
    except ChannelError:
        raise
    except OSError as error:
        raise ChannelClosed(f"connection lost in the handshake: {error}") from error
    finally:
        for fd in fds:
            os.close(fd)


def _receive_offer(
    sock: socket.socket, kind: Memory, deadline_s: float
) -> tuple[int, bytes, list[int]]:
    """Ring bytes (0: none), handle, descriptors, which the caller closes."""
    fds: list[int] = []
    try:
        head = _receive_with_fds(sock, _OFFER.size, fds, deadline_s)
        magic, theirs, num_bytes, handle_bytes = _OFFER.unpack(head)
        if magic != _MAGIC or theirs not in (Memory.NONE, kind):
            raise ChannelRefused(f"peer offers {magic!r} {theirs}, not memory of kind {kind.name}")
        if num_bytes > MAX_LANDING_BYTES or num_bytes % ALIGN or handle_bytes > MAX_HANDLE_BYTES:
            raise ChannelRefused(f"peer offers {num_bytes} bytes with a handle of {handle_bytes}")
        handle = receive_exactly(sock, handle_bytes, deadline_s)
        return (num_bytes if theirs == kind else 0), handle, fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _receive_with_fds(
    sock: socket.socket, num_bytes: int, fds: list[int], deadline_s: float
) -> bytes:
    """Exactly so many bytes; a descriptor that comes with the first of them is added to `fds`."""
    if sock.family != socket.AF_UNIX:
        return receive_exactly(sock, num_bytes, deadline_s)
    sock.settimeout(max(0.001, deadline_s - time.monotonic()))
    try:
        flags = socket.MSG_CMSG_CLOEXEC
        data, received, _, _ = socket.recv_fds(sock, num_bytes, 1, flags)
    except TimeoutError:
        raise ChannelTimeout("handshake took too long") from None
    except OSError as error:
        raise ChannelClosed(f"connection lost in the handshake: {error}") from error
    fds += received
    if not data:
        raise ChannelClosed("peer closed in the handshake")
    return data + receive_exactly(sock, num_bytes - len(data), deadline_s)
