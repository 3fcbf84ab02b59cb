"""A landing ring: memory of this side that the peer fills, and rows that are views of it.

Frames that arrive hold tensors over the ring itself. Each keeps a Region alive; when the last one
has gone (in any thread, at any time) the region is noted as free, and the peer learns it with the
next envelope. On a device the region is given back only after the work that was queued when the
last tensor went: who reads rows on another stream than the one that is current then, waits for it
first.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from experts.channel.arena import Claims
from experts.channel.codec import Header
from experts.channel.frame import FrameError
from experts.channel.memory import Block, Mark

if TYPE_CHECKING:
    from torch import Tensor


class Region:
    """Keeps one region taken. Tensors refer to it as the owner of their memory."""

    __slots__ = ("__array_interface__", "__cuda_array_interface__", "_block", "_landing", "_offset")

    def __init__(self, landing: Landing, block: Block, offset: int) -> None:
        self.__array_interface__: dict[str, Any]
        self.__cuda_array_interface__: dict[str, Any]
        self._landing = landing
        self._block = block
        self._offset = offset

    def rows(self, header: Header) -> Tensor:
        """The rows of a frame that has arrived, [num_rows, width]."""
        view = self._block.view
        return view(self._offset, header.num_rows, header.width, header.dtype, self)

    def __del__(self) -> None:
        self._landing.note_free(self._offset, self._block.mark())


class Landing:
    """The ring of one connection's incoming direction. Lives until its last tensor has gone."""

    def __init__(self, block: Block | None) -> None:
        """None: there is no ring, and every claim is refused."""
        self._block = block
        self._claims = Claims(0 if block is None else block.num_bytes)
        self._free: deque[tuple[int, Mark | None]] = deque()
        self._lock = threading.Lock()

    @property
    def num_regions(self) -> int:
        """In use, or free and not yet told to the peer."""
        return len(self._claims)

    def claim(self, header: Header, offset: int, length: int) -> Region:
        """The peer says that the rows of this frame lie there. Raises FrameError if not so."""
        if self._block is None:
            raise FrameError("offset", offset, "absent: this side has no ring")
        if length != header.row_bytes:
            raise FrameError("length", length, f"{header.row_bytes}, the bytes of the rows")
        with self._lock:
            self._claims.claim(offset, length)
        return Region(self, self._block, offset)

    def note_free(self, offset: int, mark: Mark | None) -> None:
        """Called when the garbage goes: takes no lock."""
        self._free.append((offset, mark))

    def take_free(self) -> list[int]:
        """The regions to tell the peer about; from now on it may use them."""
        taken: list[int] = []
        while self._free:
            with self._lock:
                if not self._free:
                    break
                offset, mark = self._free[0]
                if mark is not None and not mark.query():
                    break
                self._free.popleft()
                self._claims.release(offset)
            taken.append(offset)
        return taken
