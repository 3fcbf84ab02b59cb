"""Frame <-> bytes: a little-endian header of 76 bytes, then raw sections. Nothing is evaluated.

Payload order: row_ids, expert_ids, weights (4 bytes a pair each), rows, body. The 4-byte sections
come first, so every section starts aligned to its own item size without padding, and a received
tensor is a view of the receive buffer.

The same checks serve sending, receiving and process-local channels: every header field has an upper
bound, every (kind, status) names the sections it carries, and payload_len is their exact sum. All
of that is checked before a byte of payload is allocated.

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

from experts.channel.frame import (
    MAX_DEADLINE_US,
    ONE_ROW_PER_PAIR,
    RESULT_KINDS,
    ROW_DTYPES,
    Frame,
    FrameError,
    FrameLimits,
    Kind,
    Status,
)

Array = npt.NDArray[Any]
MAGIC = b"SHOL"
VERSION = 1

_FIELDS = struct.Struct("<4sBBBBHHIQQQIIIIIIII")
_CRC = struct.Struct("<I")
_HEADER = struct.Struct(_FIELDS.format + "I")
HEADER_BYTES = _HEADER.size

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES, start=1)}  # 0: no rows
_ITEM_BYTES = (0, *(dtype.itemsize for dtype in ROW_DTYPES))
_ROW_ARRAYS = [np.dtype(name) for name in ("V", "f4", "i2", "u1")]  # numpy has no bfloat16
_INTEGERS = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8}
_INT32, _UINT32, _FLOAT32 = np.dtype("i4"), np.dtype("u4"), np.dtype("f4")
_KINDS = {int(kind): kind for kind in Kind}
_STATUSES = {int(status): status for status in Status}

_ROW_IDS, _EXPERT_IDS, _WEIGHTS, _ROWS, _BODY = 1, 2, 4, 8, 16
_PAIRS = _ROW_IDS | _EXPERT_IDS | _WEIGHTS
_FIRST_NEGATIVE = 1 << 31  # as uint32
_FIRST_NOT_FINITE = 0x7F800000  # bits of float32 infinity; NaN and negative numbers are above


def _sections_by_kind() -> dict[int, int]:
    """The sections of every (kind, status) that exists; only BODY may be empty."""
    sections = {
        (Kind.EXPERT_BATCH, Status.OK): _PAIRS | _ROWS,
        (Kind.ROUTE_BATCH, Status.OK): _ROWS,
    }
    for status in Status:
        sections[Kind.CONTROL, status] = _BODY
        for kind in RESULT_KINDS:
            sections[kind, status] = _ROWS if status is Status.OK else _BODY
    sections[Kind.EXPERT_RESULT, Status.NOT_HERE] = _EXPERT_IDS | _BODY
    return {kind << 8 | status: bits for (kind, status), bits in sections.items()}


_SECTIONS = _sections_by_kind()  # by kind << 8 | status
_PAIR_BYTES = {bits: 4 * (bits & _PAIRS).bit_count() for bits in _SECTIONS.values()}


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


def _sections_of(kind: int, status: int) -> int:
    sections = _SECTIONS.get(kind << 8 | status)
    if sections is None:
        raise FrameError("kind_status", (kind, status), "a kind and a status that it may have")
    return sections


def _check_sizes(
    sections: int,
    num_rows: int,
    num_pairs: int,
    width: int,
    dtype: int,
    body_bytes: int,
    limits: FrameLimits,
) -> int:
    """Each size against its limit and its kind. Returns the payload's exact length."""
    if sections & _ROWS:
        if num_rows > limits.max_rows:
            raise FrameError("num_rows", num_rows, f"at most {limits.max_rows}")
        if not 0 < width <= limits.max_width:
            raise FrameError("width", width, f"in 1..{limits.max_width}")
        if not 0 < dtype < len(_ITEM_BYTES):
            raise FrameError("dtype", dtype, f"in 1..{len(ROW_DTYPES)}")
    elif num_rows or width or dtype:
        raise FrameError("num_rows", num_rows, "0, without width and dtype, for this kind")
    if num_pairs > (limits.max_pairs if sections & _PAIRS else 0):
        raise FrameError("num_pairs", num_pairs, f"at most {limits.max_pairs}, 0 without pairs")
    if body_bytes > (limits.max_body_bytes if sections & _BODY else 0):
        raise FrameError("body_bytes", body_bytes, f"at most {limits.max_body_bytes}, 0 if none")
    row_bytes = num_rows * width * _ITEM_BYTES[dtype]
    payload_len = num_pairs * _PAIR_BYTES[sections] + row_bytes + body_bytes
    if payload_len > limits.max_payload_bytes:
        raise FrameError("payload_len", payload_len, f"at most {limits.max_payload_bytes}")
    return payload_len


def _check_flags(flags: int, deadline_us: int) -> None:
    if flags & ~ONE_ROW_PER_PAIR:
        raise FrameError("flags", flags, f"a combination of {ONE_ROW_PER_PAIR}")
    if deadline_us > MAX_DEADLINE_US:
        raise FrameError("deadline_us", deadline_us, f"at most {MAX_DEADLINE_US}")


def _largest(array: Array) -> int:
    """Of a one-dimensional array. argmax takes a third of the time that max does."""
    largest: int = array.item(array.argmax())
    return largest


def _check_ids(name: str, ids: Array, bound: int) -> None:
    """ids: int32 [P], P > 0. As uint32 a negative id is a huge one, so one look is enough."""
    largest = _largest(ids.view(_UINT32))
    if largest >= bound:
        raise FrameError(name, f"{largest} as uint32", f"in 0..{bound - 1}")


def _check_weights(weights: Array) -> None:
    """weights: float32 [P], P > 0. Only if a bit pattern is suspicious look at all of them."""
    if _largest(weights.view(_UINT32)) >= _FIRST_NOT_FINITE and not np.isfinite(weights).all():
        raise FrameError("weights", "NaN or infinite", "finite")


def _check_pairs(arrays: list[Array], sections: int, num_rows: int) -> None:
    """arrays: as `_pair_arrays` gives them, P > 0."""
    if sections & _ROW_IDS:
        row_ids, expert_ids, weights = arrays
        _check_ids("row_ids", row_ids, num_rows)
        _check_weights(weights)
    else:
        (expert_ids,) = arrays
    _check_ids("expert_ids", expert_ids, _FIRST_NEGATIVE)


# --- sending ---


class _Sizes(NamedTuple):
    num_rows: int
    num_pairs: int
    width: int
    body_bytes: int
    payload_len: int


def encode(frame: Frame, limits: FrameLimits) -> tuple[list[Any], int]:
    """The buffers to send and their total bytes; tensors are sent from their own memory.

    Raises FrameError when a peer with these limits would refuse the frame.
    """
    buffers, dtype, sizes = _inspect(frame, limits)
    payload_crc = 0
    for buffer in buffers:
        payload_crc = crc32c(buffer, payload_crc)
    fields = _pack(frame, dtype, sizes, payload_crc)
    buffers.insert(0, fields + _CRC.pack(crc32c(fields)))
    return buffers, HEADER_BYTES + sizes.payload_len


def validate(frame: Frame, limits: FrameLimits) -> None:
    """Raise FrameError unless the frame could be sent and would be accepted by a peer."""
    _, dtype, sizes = _inspect(frame, limits)
    _pack(frame, dtype, sizes, 0)


def _inspect(frame: Frame, limits: FrameLimits) -> tuple[list[Any], int, _Sizes]:
    """The payload's buffers, the rows' dtype code and the sizes, all checked."""
    sections = _sections_of(frame.kind, frame.status)
    buffers: list[Any] = []
    num_rows = width = dtype = num_pairs = 0
    if sections & _ROWS:
        rows = _checked_rows(frame)
        num_rows, width = rows.shape
        dtype = _DTYPE_CODES[rows.dtype]
    if sections & _PAIRS:
        arrays = _pair_arrays(frame, sections)
        num_pairs = len(arrays[0])
        if num_pairs:
            _check_pairs(arrays, sections, num_rows)
            buffers += arrays
    _check_absent(frame, sections)
    body_bytes = len(frame.body)
    payload_len = _check_sizes(sections, num_rows, num_pairs, width, dtype, body_bytes, limits)
    _check_flags(frame.flags, frame.deadline_us)
    if num_rows:
        buffers.append(_memory(rows))
    if body_bytes:
        buffers.append(frame.body)
    return buffers, dtype, _Sizes(num_rows, num_pairs, width, body_bytes, payload_len)


def _pack(frame: Frame, dtype: int, sizes: _Sizes, payload_crc: int) -> bytes:
    """The header without its own checksum."""
    try:
        return _FIELDS.pack(
            MAGIC, VERSION, frame.kind, frame.status, frame.flags, frame.layer, dtype,
            frame.attempt, frame.request_id, frame.epoch, frame.deadline_us, *sizes,
            frame.queue_us, frame.compute_us, payload_crc,
        )  # fmt: skip
    except struct.error as error:
        raise FrameError("header", error, "integers that fit their field") from error


def _checked_rows(frame: Frame) -> Tensor:
    rows = frame.rows
    if rows is None or rows.dim() != 2 or rows.dtype not in _DTYPE_CODES:
        raise _refused("rows", rows, "[R, width] float32, bfloat16 or float8_e4m3fn on the CPU")
    return rows


def _refused(name: str, tensor: Tensor | None, limit: str) -> FrameError:
    if tensor is None:
        return FrameError(name, "missing", limit)
    gradient = " that requires grad" if tensor.requires_grad else ""
    found = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{gradient}"
    return FrameError(name, found, limit)


def _memory(rows: Tensor) -> Array:
    """The rows' memory as an array of items of the same size; copied only if not contiguous."""
    if not rows.is_contiguous():
        rows = rows.contiguous()
    try:
        integers = _INTEGERS.get(rows.dtype)
        array: Array = (rows if integers is None else rows.view(integers)).numpy()
    except (RuntimeError, TypeError) as error:
        raise _refused("rows", rows, "on the CPU, without gradient") from error
    return array


def _pair_arrays(frame: Frame, sections: int) -> list[Array]:
    """row_ids, expert_ids, weights or expert_ids alone, each [P]; the tensors' own memory."""
    ids = _pair_array("expert_ids", frame.expert_ids, _INT32)
    if not sections & _ROW_IDS:
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
        (frame.row_ids is not None and not sections & _ROW_IDS)
        or (frame.expert_ids is not None and not sections & _EXPERT_IDS)
        or (frame.weights is not None and not sections & _WEIGHTS)
        or (frame.rows is not None and not sections & _ROWS)
    ):
        raise FrameError("sections", "more tensors", f"those of {frame.kind!r} {frame.status!r}")


# --- receiving ---


def decode_header(data: bytes | bytearray, limits: FrameLimits) -> Header:
    """Check the 76 bytes of a header. Only afterwards payload_len bytes may be allocated."""
    (
        magic, version, kind, status, flags, layer, dtype, attempt, request_id, epoch, deadline_us,
        num_rows, num_pairs, width, body_bytes, payload_len, queue_us, compute_us, payload_crc,
        header_crc,
    ) = _HEADER.unpack(data)  # fmt: skip
    if magic != MAGIC:
        raise FrameError("magic", magic, MAGIC)
    if version != VERSION:
        raise FrameError("version", version, VERSION)
    if header_crc != crc32c(data[:-4]):
        raise FrameError("header_crc", header_crc, "the checksum of the header")
    sections = _sections_of(kind, status)
    _check_flags(flags, deadline_us)
    expected = _check_sizes(sections, num_rows, num_pairs, width, dtype, body_bytes, limits)
    if payload_len != expected:
        raise FrameError("payload_len", payload_len, f"{expected}, the sum of its sections")
    frame = Frame(
        _KINDS[kind], request_id, attempt, layer, epoch, _STATUSES[status], flags, deadline_us,
        queue_us, compute_us,
    )  # fmt: skip
    return Header(
        frame, sections, num_rows, num_pairs, width, dtype, body_bytes, payload_len, payload_crc
    )


def decode(header: Header, payload: npt.NDArray[np.uint8]) -> Frame:
    """The frame of a checked header and its payload, uint8 [payload_len]; tensors are views."""
    frame, sections, num_rows, num_pairs, width, dtype, body_bytes, payload_len, crc = header
    if crc32c(payload) != crc:
        raise FrameError("payload_crc", crc, "the checksum of the payload")
    if sections & _PAIRS:
        _set_pairs(frame, sections, num_rows, num_pairs, payload)
    if sections & _ROWS:
        offset = num_pairs * _PAIR_BYTES[sections]
        array: Array = np.ndarray((num_rows, width), _ROW_ARRAYS[dtype], payload, offset)
        frame.rows = torch.from_numpy(array)
        if dtype > 1:
            frame.rows = frame.rows.view(ROW_DTYPES[dtype - 1])
    if body_bytes:
        frame.body = payload[payload_len - body_bytes :].tobytes()
    return frame


def _set_pairs(
    frame: Frame, sections: int, num_rows: int, num_pairs: int, payload: npt.NDArray[np.uint8]
) -> None:
    arrays: list[Array] = [np.ndarray(num_pairs, _INT32, payload)]
    if sections & _ROW_IDS:
        arrays.append(np.ndarray(num_pairs, _INT32, payload, 4 * num_pairs))
        arrays.append(np.ndarray(num_pairs, _FLOAT32, payload, 8 * num_pairs))
    if num_pairs:
        _check_pairs(arrays, sections, num_rows)
    if sections & _ROW_IDS:
        frame.row_ids, frame.expert_ids, frame.weights = map(torch.from_numpy, arrays)
    else:
        frame.expert_ids = torch.from_numpy(arrays[0])
