"""What stands before every header on a connection with landing rings: where its rows lie.

60 bytes, little-endian: magic, what, number of released regions, offset and length of the rows in
the receiver's ring, eight slots for regions that are given back, checksum. Always followed by a
frame's header (80 bytes), which is all zeros when no frame follows: both are read in one step.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from crc32c import crc32c

from experts.channel.arena import ALIGN
from experts.channel.codec import HEADER_BYTES
from experts.channel.frame import FrameError

MAX_RELEASED = 8  # in one envelope; more go in further ones
_MAGIC = b"RING"
_FIELDS = struct.Struct("<4sBB2xQQ8I")
_CRC = struct.Struct("<I")
_WHOLE = struct.Struct(_FIELDS.format + "I")
ENVELOPE_BYTES = _WHOLE.size
PREFIX_BYTES = ENVELOPE_BYTES + HEADER_BYTES
_NO_HEADER = bytes(HEADER_BYTES)
_UNUSED = (0,) * MAX_RELEASED


class What(IntEnum):
    """What follows an envelope."""

    INLINE = 1  # a frame with all its sections
    PLACED = 2  # a frame whose rows lie in the receiver's ring
    NOTICE = 3  # nothing: regions are given back
    WANT = 4  # nothing: the sender waits for room, give back what you can


_WHATS = {int(what): what for what in What}


class Envelope(NamedTuple):
    """A checked envelope. `released`: offsets in the ring of the side that receives it."""

    what: What
    offset: int
    length: int
    released: tuple[int, ...]

    @property
    def has_frame(self) -> bool:
        return self.what <= What.PLACED


def pack(what: What, offset: int = 0, length: int = 0, released: Sequence[int] = ()) -> bytes:
    """released: offsets in the peer's ring, at most MAX_RELEASED."""
    slots = [offset // ALIGN for offset in released]
    slots += _UNUSED[len(slots) :]
    fields = _FIELDS.pack(_MAGIC, what, len(released), offset, length, *slots)
    return fields + _CRC.pack(crc32c(fields))


def pack_alone(what: What, released: Sequence[int] = ()) -> bytes:
    """An envelope that no frame follows."""
    return pack(what, released=released) + _NO_HEADER


def unpack(data: bytes | bytearray) -> Envelope:
    """Check the PREFIX_BYTES of an envelope and a header; what the header says is left alone."""
    if data.startswith(PLAIN):
        return _PLAIN_ENVELOPE
    magic, what, count, offset, length, *slots, checksum = _WHOLE.unpack_from(data)
    if magic != _MAGIC:
        raise FrameError("magic", magic, _MAGIC)
    if checksum != crc32c(data[: _FIELDS.size]):
        raise FrameError("envelope_crc", checksum, "the checksum of the envelope")
    if what not in _WHATS:
        raise FrameError("what", what, f"one of {list(_WHATS)}")
    if count > MAX_RELEASED or any(slots[count:]):
        raise FrameError("released", count, f"at most {MAX_RELEASED}, other slots zero")
    if what != What.PLACED and (offset or length):
        raise FrameError("offset", offset, "0, as length, without rows in the ring")
    if what > What.PLACED and data[ENVELOPE_BYTES:] != _NO_HEADER:
        raise FrameError("header", "not zero", "80 zeros when no frame follows")
    return Envelope(_WHATS[what], offset, length, tuple(slot * ALIGN for slot in slots[:count]))


PLAIN = pack(What.INLINE)
"""Before most frames: nothing in the ring, nothing given back. Written and checked as one piece."""
_PLAIN_ENVELOPE = Envelope(What.INLINE, 0, 0, ())
