"""Who uses which bytes of a landing ring: pure arithmetic, no memory, no locks.

A ring belongs to the side that reads it, and the other side of that one connection fills it. So the
sender decides (Arena) and the receiver checks every decision against its own books (Claims):

    sender     allocate(n) -> offset      put the rows there, notify     free(offset) on release
    receiver                              claim(offset, n): refused unless inside and unused
                                          release(offset) when the last view of the rows is gone

Regions begin at multiples of ALIGN and are released in any order. The lowest gap that fits is taken
first: a ring that is mostly empty uses the same few pages over and over, which stay in the caches.
"""

from bisect import bisect_left, bisect_right, insort

from experts.channel.frame import FrameError

ALIGN = 256
"""Of every region: what copies on a GPU like best, and a cache line of any CPU."""


def aligned(num_bytes: int) -> int:
    """The space that so many bytes take."""
    return -(-num_bytes // ALIGN) * ALIGN


class Arena:
    """The sender's books of its peer's ring."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // ALIGN * ALIGN
        self._gaps = [(0, self.num_bytes)] if self.num_bytes else []  # (begin, end), never touching
        self._ends: dict[int, int] = {}  # of the regions in use, by their begin

    @property
    def free_bytes(self) -> int:
        return sum(end - begin for begin, end in self._gaps)

    def allocate(self, num_bytes: int) -> int | None:
        """The offset of a region of so many bytes, more than 0; None when no gap is wide enough."""
        need = aligned(num_bytes)
        for position, (begin, end) in enumerate(self._gaps):
            if end - begin >= need:
                rest = [(begin + need, end)] if end - begin > need else []
                self._gaps[position : position + 1] = rest
                self._ends[begin] = begin + need
                return begin
        return None

    def has_room(self, num_bytes: int) -> bool:
        """Whether `allocate` would find a gap."""
        need = aligned(num_bytes)
        return any(end - begin >= need for begin, end in self._gaps)

    def free(self, offset: int) -> None:
        """Give a region back. Raises FrameError when there is none at this offset."""
        end = self._ends.pop(offset, None)
        if end is None:
            raise FrameError("released", offset, "the offset of a region in use")
        position = bisect_left(self._gaps, (offset, end))
        first, last = position, position
        if position and self._gaps[position - 1][1] == offset:
            first, offset = position - 1, self._gaps[position - 1][0]
        if position < len(self._gaps) and self._gaps[position][0] == end:
            last, end = position + 1, self._gaps[position][1]
        self._gaps[first:last] = [(offset, end)]


class Claims:
    """The receiver's books of its own ring."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._begins: list[int] = []  # ascending
        self._ends: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._begins)

    def claim(self, offset: int, length: int) -> None:
        """The peer says that rows lie there. Raises FrameError unless that can be true."""
        if offset % ALIGN or offset >= self.num_bytes:
            raise FrameError("offset", offset, f"a multiple of {ALIGN} below {self.num_bytes}")
        if not 0 < length <= self.num_bytes - offset:
            raise FrameError("length", length, f"in 1..{self.num_bytes - offset} at {offset}")
        position = bisect_right(self._begins, offset)
        before = self._ends[self._begins[position - 1]] if position else 0
        after = self._begins[position] if position < len(self._begins) else self.num_bytes
        if before > offset or after < offset + length:
            raise FrameError("offset", f"{offset} + {length}", "apart from the regions in use")
        insort(self._begins, offset)
        self._ends[offset] = offset + length

    def release(self, offset: int) -> None:
        """Nobody looks at the region any more."""
        del self._ends[offset]
        del self._begins[bisect_left(self._begins, offset)]
