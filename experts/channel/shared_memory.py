"""Host memory that two processes share: a memfd of the receiver, passed over the unix socket.

The size is sealed before the descriptor leaves (memfd_create(2), fcntl(2) F_ADD_SEALS): a side that
could shrink the file would kill the other one with SIGBUS. What is in the ring its peer may change
at any time, so nothing that says how memory is read lies there: sizes, ids and weights are in the
frame. Nothing has a name: when both processes are gone, however they end, the memory is.
"""

import fcntl
import mmap
import os

from experts.channel.arena import ALIGN
from experts.channel.blocks import BlockOutlet, HostBlock
from experts.channel.frame import FrameError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(num_bytes: int) -> tuple[HostBlock, int]:
    """Memory of this side and its descriptor, which the caller closes."""
    fd = os.memfd_create("shoal-landing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return HostBlock(mmap.mmap(fd, num_bytes)), fd
    except BaseException:
        os.close(fd)
        raise


def open_peer(fd: int, num_bytes: int, min_bytes: int) -> BlockOutlet:
    """The peer's memory; the caller closes `fd`. Raises FrameError unless it is what it must be."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError as error:
        raise FrameError("landing", error, "a memfd") from error
    if seals & _SEALS != _SEALS:
        raise FrameError("landing", f"seals {seals:x}", "sealed: its size may not change")
    size = os.fstat(fd).st_size
    if size != num_bytes or size % ALIGN:
        raise FrameError("landing", f"{size} bytes", f"{num_bytes}, a multiple of {ALIGN}")
    return BlockOutlet(HostBlock(mmap.mmap(fd, num_bytes)), min_bytes)
