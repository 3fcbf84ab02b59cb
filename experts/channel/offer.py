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
from typing import Protocol

from experts.channel.arena import ALIGN
from experts.channel.connection import ChannelClosed, ChannelError, ChannelRefused, ChannelTimeout
from experts.channel.counters import ChannelCounters
from experts.channel.endpoint import Endpoint, Memory
from experts.channel.handshake import receive_exactly, send_all
from experts.channel.memory import Block, ChannelMemory, Outlet

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


def check_available(endpoint: Endpoint) -> None:
    """Load what this endpoint needs before anybody waits. Raises ChannelError with the fix."""
    if endpoint.memory is not Memory.NONE:
        from experts.channel import ends  # with torch: seconds that only rings need

        ends.load(endpoint.memory)


def usable_memory(endpoint: Endpoint, sock: socket.socket, memory: ChannelMemory) -> Memory:
    """What this side can say in the handshake; NONE when there would be no use in more."""
    if memory.landing_bytes < ALIGN:
        return Memory.NONE
    if endpoint.memory is Memory.CUDA and not _can_share(memory, sock):
        return Memory.NONE
    return endpoint.memory


def _can_share(memory: ChannelMemory, sock: socket.socket) -> bool:
    """Whether the ring can be on a GPU."""
    if memory.device is None:
        return False
    from torch import cuda  # whoever has a device has torch

    return cuda.is_available() and not _is_own(sock)


def _is_own(sock: socket.socket) -> bool:
    """Whether the other end of a unix socket is this process: it cannot open its own handles."""
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(credentials[:4], "little") == os.getpid()


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
