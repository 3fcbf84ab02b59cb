"""Frame <-> bytes: a little-endian header of 76 bytes, then raw sections. Nothing is evaluated.

Payload order: row_ids, expert_ids, weights (4 bytes a pair each), rows, body. The 4-byte sections
come first, so every section starts aligned to its own item size without padding, and a received
tensor is a view of the receive buffer.

The same checks serve sending, receiving and process-local channels: every header field has an upper
bound, every (kind, status) names the sections it carries, and payload_len is their exact sum. All
of that is checked before a byte of payload is allocated.
"""

import struct
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from crc32c import crc32c
from torch import Tensor

from experts.channel.frame import (
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

_HEADER = struct.Struct("<4sBBBBHHIQQQIIIIIIIII")  # magic, version, Header, header_crc
HEADER_BYTES = _HEADER.size
_CHECKED_BYTES = HEADER_BYTES - 4  # all but the header's own crc

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(ROW_DTYPES, start=1)}
_ITEM_BYTES = (0, *(dtype.itemsize for dtype in ROW_DTYPES))
_ROW_ARRAYS = [np.dtype(name) for name in ("f4", "i2", "u1")]  # item sizes of ROW_DTYPES
_KINDS = {int(kind): kind for kind in Kind}  # a dict: calling an enum takes five times as long
_STATUSES = {int(status): status for status in Status}

_ROW_IDS, _EXPERT_IDS, _WEIGHTS, _ROWS, _BODY = 1, 2, 4, 8, 16


class Header(NamedTuple):
    """The fields between version and header_crc, in wire order."""

    kind: int
    status: int
    flags: int
    layer: int
    dtype: int  # 0 without rows, else 1 + position in ROW_DTYPES
    attempt: int
    request_id: int
    epoch: int
    deadline_us: int
    num_rows: int
    num_pairs: int
    width: int
    body_bytes: int
    payload_len: int
    queue_us: int
    compute_us: int
    payload_crc: int


def _sections_by_kind() -> dict[tuple[int, int], int]:
    """The sections of each (kind, status) that exists; BODY alone may be empty."""
    sections = {
        (Kind.EXPERT_BATCH, Status.OK): _ROW_IDS | _EXPERT_IDS | _WEIGHTS | _ROWS,
        (Kind.ROUTE_BATCH, Status.OK): _ROWS,
    }
    for status in Status:
        sections[Kind.CONTROL, status] = _BODY
        for kind in RESULT_KINDS:
            sections[kind, status] = _ROWS if status is Status.OK else _BODY
    sections[Kind.EXPERT_RESULT, Status.NOT_HERE] = _EXPERT_IDS | _BODY
    return {(int(kind), int(status)): bits for (kind, status), bits in sections.items()}


_SECTIONS = _sections_by_kind()
_PAIR_BYTES = {bits: 4 * (bits & 7).bit_count() for bits in _SECTIONS.values()}


def _sections_of(kind: int, status: int) -> int:
    sections = _SECTIONS.get((kind, status))
    if sections is None:
        raise FrameError("kind_status", (kind, status), "a kind and a status that it may have")
    return sections


def _check_header(header: Header, limits: FrameLimits) -> int:
    """Bounds, and the exact payload length. Returns the sections' bits."""
    for position, (value, bound) in enumerate(zip(header, limits.header_bounds, strict=True)):
        if not 0 <= value <= bound:
            raise FrameError(Header._fields[position], value, f"in 0..{bound}")
    sections = _sections_of(header.kind, header.status)
    if sections & _ROWS:
        if not header.dtype or not header.width:
            raise FrameError("dtype_width", (header.dtype, header.width), "positive")
    elif header.dtype or header.width or header.num_rows:
        raise FrameError("num_rows", header.num_rows, "0, without dtype and width")
    pair_bytes = _PAIR_BYTES[sections]
    if header.num_pairs and not pair_bytes:
        raise FrameError("num_pairs", header.num_pairs, "0 for this kind")
    if header.body_bytes and not sections & _BODY:
        raise FrameError("body_bytes", header.body_bytes, "0 for this kind")
    row_bytes = header.width * _ITEM_BYTES[header.dtype]
    expected = header.num_pairs * pair_bytes + header.num_rows * row_bytes + header.body_bytes
    if header.payload_len != expected:
        raise FrameError("payload_len", header.payload_len, f"{expected}, the sum of its sections")
    return sections


def _check_values(header: Header, sections: int, pairs: list[Array]) -> None:
    """pairs: the row_ids, expert_ids and weights that are there, each [P] with P > 0."""
    if sections & _ROW_IDS:
        largest = int(pairs[0].view(np.uint32).max())  # a negative id becomes a huge one
        if largest >= header.num_rows:
            raise FrameError("row_ids", f"up to {largest}", f"in 0..{header.num_rows - 1}")
        if not np.isfinite(pairs[2]).all():
            raise FrameError("weights", "NaN or infinite", "finite")
    smallest = int(pairs[1 if sections & _ROW_IDS else 0].min())
    if smallest < 0:
        raise FrameError("expert_ids", smallest, ">= 0")


def _pair_array(name: str, tensor: Tensor | None, dtype: torch.dtype, num_pairs: int) -> Array:
    if tensor is None or tensor.dtype is not dtype or tensor.shape != (num_pairs,):
        found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise FrameError(name, found, f"{dtype} [{num_pairs}]")
    return _numpy(name, tensor)


def _numpy(name: str, tensor: Tensor) -> Array:
    """The tensor's memory; bfloat16 and float8 have no numpy dtype, so they show as integers."""
    if not tensor.is_cpu or tensor.requires_grad:
        raise FrameError(name, tensor.device, "on the CPU, without gradient")
    if tensor.dtype is torch.bfloat16:
        tensor = tensor.view(torch.int16)
    elif tensor.dtype is torch.float8_e4m3fn:
        tensor = tensor.view(torch.uint8)
    array: Array = tensor.contiguous().numpy()
    return array


def _arrays(frame: Frame, sections: int) -> list[Array]:
    """The frame's tensors as arrays in payload order; refuses what its kind may not carry."""
    arrays: list[Array] = []
    num_pairs = 0 if frame.expert_ids is None else frame.expert_ids.numel()
    if sections & _ROW_IDS:
        arrays.append(_pair_array("row_ids", frame.row_ids, torch.int32, num_pairs))
    if sections & _EXPERT_IDS:
        arrays.append(_pair_array("expert_ids", frame.expert_ids, torch.int32, num_pairs))
    if sections & _WEIGHTS:
        arrays.append(_pair_array("weights", frame.weights, torch.float32, num_pairs))
    if sections & _ROWS:
        rows = frame.rows
        if rows is None or rows.dim() != 2 or rows.dtype not in _DTYPE_CODES:
            found = "missing" if rows is None else f"{rows.dtype} {tuple(rows.shape)}"
            raise FrameError("rows", found, "[R, width] float32, bfloat16 or float8_e4m3fn")
        arrays.append(_numpy("rows", rows))
    tensors = (frame.row_ids, frame.expert_ids, frame.weights, frame.rows)
    if sum(tensor is not None for tensor in tensors) != len(arrays):
        raise FrameError("sections", "more tensors", f"those of {frame.kind!r} {frame.status!r}")
    return arrays


def _inspect(frame: Frame, limits: FrameLimits) -> tuple[Header, list[Array]]:
    sections = _sections_of(frame.kind, frame.status)
    arrays = _arrays(frame, sections)
    num_rows, width, dtype = 0, 0, 0
    if frame.rows is not None:
        num_rows, width = frame.rows.shape
        dtype = _DTYPE_CODES[frame.rows.dtype]
    num_pairs = 0 if frame.expert_ids is None else len(frame.expert_ids)
    body_bytes = len(frame.body)
    payload_len = body_bytes + sum([array.nbytes for array in arrays])
    header = Header(
        frame.kind, frame.status, frame.flags, frame.layer, dtype, frame.attempt,
        frame.request_id, frame.epoch, frame.deadline_us, num_rows, num_pairs, width,
        body_bytes, payload_len, frame.queue_us, frame.compute_us, 0,
    )  # fmt: skip
    _check_header(header, limits)
    if num_pairs:
        _check_values(header, sections, arrays)
    return header, arrays


def validate(frame: Frame, limits: FrameLimits) -> None:
    """Raise FrameError unless the frame could be sent and would be accepted by a peer."""
    _inspect(frame, limits)


def encode(frame: Frame, limits: FrameLimits) -> tuple[list[Any], int]:
    """The buffers to send, without a copy of any contiguous tensor, and their length in bytes."""
    header, arrays = _inspect(frame, limits)
    buffers: list[Any] = [array for array in arrays if array.nbytes]
    if frame.body:
        buffers.append(frame.body)
    payload_crc = 0
    for buffer in buffers:
        payload_crc = crc32c(buffer, payload_crc)
    packed = bytearray(_HEADER.pack(MAGIC, VERSION, *header[:-1], payload_crc, 0))
    packed[_CHECKED_BYTES:] = crc32c(memoryview(packed)[:_CHECKED_BYTES]).to_bytes(4, "little")
    buffers.insert(0, packed)
    return buffers, HEADER_BYTES + header.payload_len


def decode_header(data: bytes | bytearray, limits: FrameLimits) -> Header:
    """Check the 76 bytes of a header. Afterwards payload_len may be allocated."""
    magic, version, *fields, header_crc = _HEADER.unpack(data)
    if magic != MAGIC:
        raise FrameError("magic", magic, MAGIC)
    if version != VERSION:
        raise FrameError("version", version, VERSION)
    if header_crc != crc32c(memoryview(data)[:_CHECKED_BYTES]):
        raise FrameError("header_crc", header_crc, "the checksum of the header")
    header = Header._make(fields)
    _check_header(header, limits)
    return header


def decode(header: Header, payload: npt.NDArray[np.uint8]) -> Frame:
    """The frame of a checked header and its payload, uint8 [payload_len]; tensors are views."""
    if crc32c(payload) != header.payload_crc:
        raise FrameError("payload_crc", header.payload_crc, "the checksum of the payload")
    sections = _SECTIONS[header.kind, header.status]
    frame = Frame(
        _KINDS[header.kind],
        header.request_id,
        header.attempt,
        header.layer,
        header.epoch,
        _STATUSES[header.status],
        header.flags,
        header.deadline_us,
        header.queue_us,
        header.compute_us,
    )
    rows_start = _PAIR_BYTES[sections] * header.num_pairs
    rows_end = header.payload_len - header.body_bytes
    if sections & _EXPERT_IDS:
        _set_pairs(frame, header, sections, payload[:rows_start])
    if sections & _ROWS:
        shape = (header.num_rows, header.width)
        array = payload[rows_start:rows_end].view(_ROW_ARRAYS[header.dtype - 1]).reshape(shape)
        frame.rows = torch.from_numpy(array).view(ROW_DTYPES[header.dtype - 1])
    if header.body_bytes:
        frame.body = payload[rows_end:].tobytes()
    return frame


def _set_pairs(frame: Frame, header: Header, sections: int, data: Array) -> None:
    """data: uint8, row_ids then expert_ids then weights, or expert_ids alone."""
    integers = data.view(np.int32).reshape(_PAIR_BYTES[sections] // 4, header.num_pairs)
    if sections & _ROW_IDS:
        pairs = [integers[0], integers[1], integers[2].view(np.float32)]
    else:
        pairs = [integers[0]]
    if header.num_pairs:
        _check_values(header, sections, pairs)
    tensors = [torch.from_numpy(array) for array in pairs]
    frame.expert_ids = tensors[0]
    if sections & _ROW_IDS:
        frame.row_ids, frame.expert_ids, frame.weights = tensors
