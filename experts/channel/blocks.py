"""Memory of the host in which rows land, and the way into memory that this process has mapped."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from experts.channel.connection import ChannelClosed
from experts.channel.memory import Block, Bytes, Mark
from experts.channel.tensors import ROW_DTYPES, host_memory

_TYPES = (None, "<f4", "<i2", "|u1")  # numpy knows neither bfloat16 nor float8; by dtype code


class HostBlock:
    """Memory of the host behind any writable buffer, which it keeps alive."""

    is_device = False

    def __init__(self, buffer: Any) -> None:
        self.bytes: Bytes = np.frombuffer(buffer, np.uint8)
        self.num_bytes = self.bytes.size
        self.address = self.bytes.ctypes.data

    def view(self, offset: int, num_rows: int, width: int, dtype: int, owner: Any) -> Tensor:
        """See Block.view."""
        owner.__array_interface__ = {
            "version": 3,
            "shape": (num_rows, width),
            "typestr": _TYPES[dtype],
            "data": (self.address + offset, False),
        }
        rows = torch.from_numpy(np.asarray(owner))
        return rows if dtype == 1 else rows.view(ROW_DTYPES[dtype - 1])

    def put(self, offset: int, rows: Tensor) -> None:
        """See Block.put."""
        source = host_memory(rows)
        np.copyto(np.ndarray(source.shape, source.dtype, self.bytes, offset), source)

    def mark(self) -> Mark | None:
        return None


class BlockOutlet:
    """The way into a block that this process has mapped or opened."""

    def __init__(self, block: Block, min_bytes: int) -> None:
        self.num_bytes = block.num_bytes
        self.accepts_device = block.is_device
        self.min_bytes = min_bytes
        self._block: Block | None = block

    def put(self, offset: int, rows: Tensor, deadline_s: float | None) -> None:
        """See Outlet.put. `deadline_s` is not looked at: copies do not wait for anybody."""
        block = self._block
        if block is None:
            raise ChannelClosed("closed while sending")
        block.put(offset, rows)

    def close(self) -> None:
        """See Outlet.close. A copy that is under way keeps the block until it is done."""
        self._block = None
