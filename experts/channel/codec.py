"""Frame <-> bytes: a little-endian header of 80 bytes, then raw sections. Nothing is evaluated.

Payload order: row_ids, expert_ids, weights (4 bytes a pair each), rows, body. The 4-byte sections
come first, so every section starts aligned to its own item size without padding, and a received
tensor is a view of the receive buffer.

Every header field has an upper bound, every (kind, status) names the sections it carries (rules.py)
and payload_len is their exact sum: all checked before a byte of payload is allocated.

Written for few steps: in a round trip between two processes the caches are cold and each library
call costs two or three times what it costs in a loop.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from experts.channel.frame import Frame, FrameError, FrameLimits, Kind, Status
from experts.channel.rules import (
    EXPERT_IDS,
    ITEM_BYTES,
    PAIR_BYTES,
    PAIRS,
    ROW_IDS,
    ROWS,
    TENSORS,
    WEIGHTS,
    check_flags,
    check_pairs,
    check_sizes,
    sections_of,
)

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"SHOL"
VERSION = 2

_FIELDS = struct.Struct("<4sBBBBHHIQQQIIIIIIIII")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct(_FIELDS.format + "I")
HEADER_BYTES = _HEADER.size

_KINDS = {int(kind): kind for kind in Kind}
_STATUSES = {int(status): status for status in Status}


class Header(NamedTuple):
    """What a checked header says: a frame without its sections, and the sections' sizes."""

    frame: Frame
    sections: int
    num_rows: int
    num_pairs: int
    width: int
    dtype: int
    body_bytes: int
    payload_len: int
    payload_crc: int

    @property
    def row_bytes(self) -> int:
        return self.num_rows * self.width * ITEM_BYTES[self.dtype]


# --- sending ---


class _Sizes(NamedTuple):
    num_rows: int
    num_pairs: int
    width: int
    body_bytes: int
    payload_len: int


def encode(frame: Frame, limits: FrameLimits, placed_bytes: int = 0) -> tuple[list[Any], int]:
    """The buffers to send and their total bytes; tensors are sent from their own memory.

    placed_bytes: of the rows, when they travel another way. The header is the same but for the
    checksum, which is that of the other sections. Raises FrameError when a peer with these limits
    would refuse the frame.
    """
    buffers, dtype, sizes = _inspect(frame, limits, placed_bytes)
    payload_crc = 0
    for buffer in buffers:
        payload_crc = crc32c(buffer, payload_crc)
    fields = _pack(frame, dtype, sizes, payload_crc)
    buffers.insert(0, fields + _CRC.pack(crc32c(fields)))
    return buffers, HEADER_BYTES + sizes.payload_len - placed_bytes


def validate(frame: Frame, limits: FrameLimits) -> None:
    """Raise FrameError unless the frame could be sent and would be accepted by a peer."""
    _, dtype, sizes = _inspect(frame, limits)
    _pack(frame, dtype, sizes, 0)


def _inspect(
    frame: Frame, limits: FrameLimits, placed_bytes: int = 0
) -> tuple[list[Any], int, _Sizes]:
    """The payload's buffers, the rows' dtype code and the sizes, all checked."""
    sections = sections_of(frame.kind, frame.status)
    buffers: list[Any] = []
    num_rows = width = dtype = num_pairs = 0
    if sections & TENSORS:  # as late as here: the directory and an ingress never come by
        from experts.channel import tensors
    if sections & ROWS:
        rows = tensors.checked_rows(frame)
        num_rows, width = rows.shape
        dtype = tensors.DTYPE_CODES[rows.dtype]
    if sections & PAIRS:
        arrays = tensors.pair_arrays(frame, sections)
        num_pairs = len(arrays[0])
        if num_pairs:
            check_pairs(arrays, sections, num_rows)
            buffers += arrays
    _check_absent(frame, sections)
    body_bytes = len(frame.body)
    payload_len = check_sizes(sections, num_rows, num_pairs, width, dtype, body_bytes, limits)
    check_flags(frame.flags, frame.deadline_us)
    if num_rows and not placed_bytes:
        buffers.append(tensors.host_memory(rows))
    if body_bytes:
        buffers.append(frame.body)
    return buffers, dtype, _Sizes(num_rows, num_pairs, width, body_bytes, payload_len)


def _pack(frame: Frame, dtype: int, sizes: _Sizes, payload_crc: int) -> bytes:
    """The header without its own checksum."""
    try:
        return _FIELDS.pack(
            MAGIC, VERSION, frame.kind, frame.status, frame.flags, frame.layer, dtype,
            frame.attempt, frame.request_id, frame.epoch, frame.deadline_us, *sizes,
            frame.queue_us, frame.compute_us, frame.expert_us, payload_crc,
        )  # fmt: skip
    except struct.error as error:
        raise FrameError("header", error, "integers that fit their field") from error


def _check_absent(frame: Frame, sections: int) -> None:
    """A section that the kind does not carry must not be there: it would be lost silently."""
    if (
        (frame.row_ids is not None and not sections & ROW_IDS)
        or (frame.expert_ids is not None and not sections & EXPERT_IDS)
        or (frame.weights is not None and not sections & WEIGHTS)
        or (frame.rows is not None and not sections & ROWS)
    ):
        raise FrameError("sections", "more tensors", f"those of {frame.kind!r} {frame.status!r}")


# --- receiving ---


def decode_header(data: bytes | bytearray, limits: FrameLimits) -> Header:
    """Check the 80 bytes of a header. Only afterwards payload_len bytes may be allocated."""
    (
        magic, version, kind, status, flags, layer, dtype, attempt, request_id, epoch, deadline_us,
        num_rows, num_pairs, width, body_bytes, payload_len, queue_us, compute_us, expert_us,
        payload_crc, header_crc,
    ) = _HEADER.unpack(data)  # fmt: skip
    if magic != MAGIC:
        raise FrameError("magic", magic, MAGIC)
    if version != VERSION:
        raise FrameError("version", version, VERSION)
    if header_crc != crc32c(data[:-4]):
        raise FrameError("header_crc", header_crc, "the checksum of the header")
    sections = sections_of(kind, status)
    check_flags(flags, deadline_us)
    expected = check_sizes(sections, num_rows, num_pairs, width, dtype, body_bytes, limits)
    if payload_len != expected:
        raise FrameError("payload_len", payload_len, f"{expected}, the sum of its sections")
    frame = Frame(
        _KINDS[kind], request_id, attempt, layer, epoch, _STATUSES[status], flags, deadline_us,
        queue_us, compute_us, expert_us,
    )  # fmt: skip
    return Header(
        frame, sections, num_rows, num_pairs, width, dtype, body_bytes, payload_len, payload_crc
    )


def decode(
    header: Header, payload: npt.NDArray[np.uint8], placed_rows: Tensor | None = None
) -> Frame:
    """The frame of a checked header and its payload, uint8 [payload_len]; tensors are views.

    placed_rows: the rows, when they came another way; the payload is shorter by their bytes then.
    """
    frame, sections, num_rows, num_pairs, width, dtype, body_bytes, _, crc = header
    if crc32c(payload) != crc:
        raise FrameError("payload_crc", crc, "the checksum of the payload")
    if sections & TENSORS:
        from experts.channel import tensors
    if sections & PAIRS:
        tensors.set_pairs(frame, sections, num_rows, num_pairs, payload)
    if placed_rows is not None:
        frame.rows = placed_rows
    elif sections & ROWS:
        offset = num_pairs * PAIR_BYTES[sections]
        frame.rows = tensors.rows_at(payload, offset, num_rows, width, dtype)
    if body_bytes:
        frame.body = payload[-body_bytes:].tobytes()
    return frame
