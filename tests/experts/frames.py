"""Builders of frames, and their bytes on the wire."""

from __future__ import annotations

import os
import socket

import numpy as np
import torch
from crc32c import crc32c

from experts.channel.channel import Connection
from experts.channel.codec import HEADER_BYTES, decode, decode_header, encode
from experts.channel.frame import DEFAULT_LIMITS, Frame, FrameLimits, Kind, Status

SECRET = b"a secret of the tests"
DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


def rows(num_rows: int = 4, width: int = 8, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.arange(num_rows * width, dtype=torch.float32) % 13 - 6
    return values.reshape(num_rows, width).to(dtype)


def expert_batch(
    num_rows: int = 4, num_pairs: int = 6, width: int = 8, dtype: torch.dtype = torch.float32
) -> Frame:
    pairs = torch.arange(num_pairs, dtype=torch.int32)
    return Frame(
        Kind.EXPERT_BATCH,
        request_id=2**63,
        attempt=2,
        layer=26,
        epoch=2**40,
        deadline_us=5000,
        rows=rows(num_rows, width, dtype),
        row_ids=pairs % max(1, num_rows),
        expert_ids=pairs + 60,
        weights=pairs / 8,
    )


def control(body: bytes = b'{"type":"ping"}') -> Frame:
    return Frame(Kind.CONTROL, request_id=9, body=body)


def not_here(experts: tuple[int, ...] = (3, 7)) -> Frame:
    ids = torch.tensor(experts, dtype=torch.int32)
    return Frame(Kind.EXPERT_RESULT, status=Status.NOT_HERE, expert_ids=ids)


def wire(frame: Frame) -> bytes:
    """The frame's bytes."""
    buffers, num_bytes = encode(frame, DEFAULT_LIMITS)
    data = b"".join(bytes(memoryview(buffer).cast("B")) for buffer in buffers)
    assert len(data) == num_bytes
    return data


def unwire(data: bytes, limits: FrameLimits = DEFAULT_LIMITS) -> Frame:
    """The frame of such bytes, as a receiver makes it."""
    header = decode_header(data[:HEADER_BYTES], limits)
    payload = np.frombuffer(data[HEADER_BYTES:], np.uint8).copy()
    return decode(header, payload)


def with_header(data: bytes, offset: int, replacement: bytes) -> bytes:
    """The frame with header bytes replaced and the header's checksum made right again."""
    fields = bytearray(data[: HEADER_BYTES - 4])
    fields[offset : offset + len(replacement)] = replacement
    checksum = crc32c(bytes(fields)).to_bytes(4, "little")
    return bytes(fields) + checksum + data[HEADER_BYTES:]


def same_frame(left: Frame, right: Frame) -> None:
    """Asserts equality of everything that travels."""
    for name in ("rows", "row_ids", "expert_ids", "weights"):
        ours, theirs = getattr(left, name), getattr(right, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, name
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    for name in Frame.__slots__:
        if name not in ("rows", "row_ids", "expert_ids", "weights", "received_s"):
            assert getattr(left, name) == getattr(right, name), name


def raw_socket(connection: Connection) -> socket.socket:
    """A second descriptor of an open connection: what a hostile peer with the secret could do."""
    return socket.socket(fileno=os.dup(connection.fileno()))
