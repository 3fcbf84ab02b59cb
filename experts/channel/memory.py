"""Memory in which rows land: what every kind of it promises. That of the host: blocks.py.

A landing (landing.py) is made of one Block. The sender reaches it through an Outlet, one for each
direction of a connection: the same pages mapped (shared_memory.py), the same memory of a GPU opened
(cuda_memory.py) or remote writes (nixl_memory.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Bytes = npt.NDArray[np.uint8]
MIB = 2**20
MAX_DEVICE_LANDING_BYTES = 32 * MIB
"""Memory of a GPU is taken at once, where that of the host is only as it is touched: room for 2340
rows of 7168 bfloat16 values."""


def host_buffer(num_bytes: int) -> Bytes:
    return np.empty(num_bytes, np.uint8)


@dataclass(frozen=True)
class ChannelMemory:
    """Where the frames of one side's connections arrive."""

    landing_bytes: int = 64 * MIB
    """Of each connection's ring (shm, cuda, nixl); larger rows travel in the frame. 0: no rings.
    On a GPU no more than MAX_DEVICE_LANDING_BYTES."""
    min_bytes: int = MIB // 4
    """Rows on the host of fewer bytes travel in the frame of a shm or nixl connection too: up to
    there its few steps cost less than the copy that a ring saves (benchmarks/bench_hop.py)."""
    device: torch.device | None = None
    """Where the rings of cuda and nixl lie. None: nixl uses host memory, cuda sends in frames."""
    allocate: Callable[[int], Bytes] = host_buffer
    """A buffer of so many bytes for what arrives over the socket; pinned ones, where the rows are
    copied to a GPU, make that copy asynchronous. Called by the thread that receives."""


class Mark(Protocol):
    """A moment in the work of a device."""

    def query(self) -> bool:
        """Whether all work before it has been done."""


class Block(Protocol):
    """Memory of this process. Lives as long as it is referred to."""

    num_bytes: int
    address: int
    is_device: bool

    def view(self, offset: int, num_rows: int, width: int, dtype: int, owner: Any) -> Tensor:
        """Rows of this memory, [num_rows, width] of the wire's dtype code; they keep `owner`, which
        gets an array interface, alive."""

    def put(self, offset: int, rows: Tensor) -> None:
        """Copy rows there. When it returns another process may be told."""

    def mark(self) -> Mark | None:
        """Now, for work that may still read this memory; None when such work cannot be."""


class Outlet(Protocol):
    """A way to the peer's ring."""

    num_bytes: int
    accepts_device: bool
    min_bytes: int  # fewer are faster in the frame; 0 where device rows are to stay on the device

    def put(self, offset: int, rows: Tensor, deadline_s: float | None) -> None:
        """Write rows into the ring; when it returns the peer may be told.

        Raises FrameError (rows that cannot be sent, nothing was written), ChannelTimeout or
        ChannelClosed (what was written is not known).
        """

    def close(self) -> None:
        """Let go of the peer's memory and wake who waits in `put`. May be called twice."""
