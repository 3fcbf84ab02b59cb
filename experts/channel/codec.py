"""Frame <-> bytes: a little-endian header of 80 bytes, then raw sections. Nothing is evaluated.

Payload order: row_ids, expert_ids, weights (4 bytes a pair each), rows, body. The 4-byte sections
come first, so every section starts aligned to its own item size without padding, and a received
tensor is a view of the receive buffer.

Every header field has an upper bound, every (kind, status) names the sections it carries (rules.py)
and payload_len is their exact sum: all checked before a byte of payload is allocated.

Written for few steps: in a round trip between two processes the caches are cold and each library
call costs two or three times what it costs in a loop.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c
from torch import Tensor

from experts.channel.frame import ROW_DTYPES, Frame, FrameError, FrameLimits, Kind, Status
from experts.channel.rules import (
    EXPERT_IDS,
    ITEM_BYTES,
    PAIR_BYTES,
    PAIRS,
    ROW_IDS,
    ROWS,
    WEIGHTS,
    Array,
    check_flags,
    check_pairs,
    check_sizes,
    sections_of,
)

MAGIC = b"SHOL"
VERSION = 2

_FIELDS = struct.Struct("<4sBBBBHHIQQQIIIIIIIII")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct(_FIELDS.format + "I")
HEADER_BYTES = _HEADER.size

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES, start=1)}  # 0: no rows
_ROW_ARRAYS = [np.dtype(name) for name in ("V", "f4", "i2", "u1")]  # numpy has no bfloat16
_INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
_ON_THE_HOST = (
    "on the CPU, without gradient: stage them (experts/staging.py) or use a connection that "
    "accepts_device"
)
_INT32, _FLOAT32 = np.dtype("i4"), np.dtype("f4")
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
    if sections & ROWS:
        rows = _checked_rows(frame)
        num_rows, width = rows.shape
        dtype = _DTYPE_CODES[rows.dtype]
    if sections & PAIRS:
        arrays = _pair_arrays(frame, sections)
        num_pairs = len(arrays[0])
        if num_pairs:
            check_pairs(arrays, sections, num_rows)
            buffers += arrays
    _check_absent(frame, sections)
    body_bytes = len(frame.body)
    payload_len = check_sizes(sections, num_rows, num_pairs, width, dtype, body_bytes, limits)
    check_flags(frame.flags, frame.deadline_us)
    if num_rows and not placed_bytes:
        buffers.append(host_memory(rows))
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


def _checked_rows(frame: Frame) -> Tensor:
    rows = frame.rows
    if rows is None or rows.dim() != 2 or rows.dtype not in _DTYPE_CODES:
        raise _refused("rows", rows, "[R, width] float32, bfloat16 or float8_e4m3fn")
    return rows


def _refused(name: str, tensor: Tensor | None, limit: str) -> FrameError:
    if tensor is None:
        return FrameError(name, "missing", limit)
    gradient = " that requires grad" if tensor.requires_grad else ""
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{gradient}"
    return FrameError(name, found, limit)


def host_memory(rows: Tensor) -> Array:
    """The rows' memory as an array of items of the same size; copied only if not contiguous."""
    if not rows.is_contiguous():
        rows = rows.contiguous()
    try:
        integers = _INTEGERS.get(rows.dtype)
        array: Array = (rows if integers is None else rows.view(integers)).numpy()
    except (RuntimeError, TypeError) as error:
        raise _refused("rows", rows, _ON_THE_HOST) from error
    return array


def _pair_arrays(frame: Frame, sections: int) -> list[Array]:
    """row_ids, expert_ids, weights or expert_ids alone, each [P]; the tensors' own memory."""
    ids = _pair_array("expert_ids", frame.expert_ids, _INT32)
    if not sections & ROW_IDS:
        return [ids]
    row_ids = _pair_array("row_ids", frame.row_ids, _INT32)
    weights = _pair_array("weights", frame.weights, _FLOAT32)
    if not len(row_ids) == len(ids) == len(weights):
        lengths = (len(row_ids), len(ids), len(weights))
        raise FrameError("num_pairs", lengths, "row_ids, expert_ids, weights of one length")
    return [row_ids, ids, weights]


def _pair_array(name: str, tensor: Tensor | None, dtype: np.dtype[Any]) -> Array:
    try:
        array: Array = tensor.numpy()  # type: ignore[union-attr]
    except (AttributeError, RuntimeError, TypeError) as error:
        raise _refused(name, tensor, f"{dtype} [P] on the CPU, without gradient") from error
    if array.dtype is not dtype or array.ndim != 1:
        raise _refused(name, tensor, f"{dtype} [P]")
    return array


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
    if sections & PAIRS:
        _set_pairs(frame, sections, num_rows, num_pairs, payload)
    if placed_rows is not None:
        frame.rows = placed_rows
    elif sections & ROWS:
        offset = num_pairs * PAIR_BYTES[sections]
        array: Array = np.ndarray((num_rows, width), _ROW_ARRAYS[dtype], payload, offset)
        frame.rows = torch.from_numpy(array)
        if dtype > 1:
            frame.rows = frame.rows.view(ROW_DTYPES[dtype - 1])
    if body_bytes:
        frame.body = payload[-body_bytes:].tobytes()
    return frame


def _set_pairs(
    frame: Frame, sections: int, num_rows: int, num_pairs: int, payload: npt.NDArray[np.uint8]
) -> None:
    arrays: list[Array] = [np.ndarray(num_pairs, _INT32, payload)]
    if sections & ROW_IDS:
        arrays.append(np.ndarray(num_pairs, _INT32, payload, 4 * num_pairs))
        arrays.append(np.ndarray(num_pairs, _FLOAT32, payload, 8 * num_pairs))
    if num_pairs:
        check_pairs(arrays, sections, num_rows)
    if sections & ROW_IDS:
        frame.row_ids, frame.expert_ids, frame.weights = map(torch.from_numpy, arrays)
    else:
        frame.expert_ids = torch.from_numpy(arrays[0])
