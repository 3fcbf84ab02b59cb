"""Frames: what goes out comes in, and what breaks a rule is refused at both ends."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from experts.channel.codec import HEADER_BYTES, decode, decode_header, encode, validate
from experts.channel.frame import (
    DEFAULT_LIMITS,
    MAX_DEADLINE_US,
    ONE_ROW_PER_PAIR,
    RENORMALISED,
    Frame,
    FrameError,
    FrameLimits,
    Kind,
    Status,
    reply_to,
)
from experts.channel.tensors import rows_finite
from tests.experts.frames import (
    DTYPES,
    control,
    expert_batch,
    not_here,
    rows,
    same_frame,
    unwire,
    wire,
    with_header,
)

# Offsets of header fields, counted by hand from the layout in codec.py.
KIND, STATUS, FLAGS, DTYPE, DEADLINE = 5, 6, 7, 10, 32
NUM_ROWS, NUM_PAIRS, WIDTH, BODY_BYTES, PAYLOAD_LEN = 40, 44, 48, 52, 56


def u32(value: int) -> bytes:
    return value.to_bytes(4, "little")


# --- round trips ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "num_pairs", "width"), [(0, 0, 5), (1, 1, 1), (3, 5, 7), (16, 96, 2048)]
)
def test_expert_batch_round_trip(
    num_rows: int, num_pairs: int, width: int, dtype: torch.dtype
) -> None:
    frame = expert_batch(num_rows, num_pairs, width, dtype)
    same_frame(unwire(wire(frame)), frame)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Kind.EXPERT_RESULT, Kind.ROUTE_BATCH, Kind.ROUTE_RESULT])
@pytest.mark.parametrize("num_rows", [0, 1, 17])
def test_rows_only_round_trip(kind: Kind, num_rows: int, dtype: torch.dtype) -> None:
    frame = Frame(
        kind, flags=ONE_ROW_PER_PAIR | RENORMALISED, queue_us=7, compute_us=9, expert_us=8
    )
    frame.rows = rows(num_rows, 9, dtype)
    same_frame(unwire(wire(frame)), frame)


@pytest.mark.parametrize("status", list(Status))
def test_control_and_refusals_round_trip(status: Status) -> None:
    frames = [Frame(Kind.CONTROL, status=status, body=b"{}"), Frame(Kind.CONTROL, status=status)]
    if status is not Status.OK:
        kinds = (Kind.EXPERT_RESULT, Kind.ROUTE_RESULT)
        ids = torch.empty(0, dtype=torch.int32) if status is Status.NOT_HERE else None
        frames += [Frame(kinds[0], status=status, body=b"why", expert_ids=ids)]
        frames += [Frame(kinds[1], status=status, body=b"why")]
    for frame in frames:
        same_frame(unwire(wire(frame)), frame)


def test_not_here_names_the_missing_experts() -> None:
    frame = not_here((0, 255))
    frame.body = b"worker-2 lacks them"
    same_frame(unwire(wire(frame)), frame)


def test_bytes_of_a_small_frame() -> None:
    data = wire(Frame(Kind.CONTROL, request_id=0x0102, body=b"hi"))
    assert HEADER_BYTES == 80
    assert len(data) == 82
    assert data[:8] == b"SHOL\x02\x01\x00\x00"
    assert data[16:24] == b"\x02\x01" + bytes(6)
    assert data[BODY_BYTES : PAYLOAD_LEN + 4] == u32(2) + u32(2)
    assert data[80:] == b"hi"


def test_tensors_are_sent_from_and_received_into_one_memory() -> None:
    frame = expert_batch(dtype=torch.bfloat16)
    buffers, _ = encode(frame, DEFAULT_LIMITS)
    assert frame.rows is not None
    assert buffers[4].__array_interface__["data"][0] == frame.rows.data_ptr()
    data = wire(frame)
    payload = np.frombuffer(data[HEADER_BYTES:], np.uint8).copy()
    received = decode(decode_header(data[:HEADER_BYTES], DEFAULT_LIMITS), payload)
    assert received.rows is not None and received.row_ids is not None
    start = payload.__array_interface__["data"][0]
    assert received.row_ids.data_ptr() == start
    assert received.rows.data_ptr() == start + 3 * 4 * 6


def test_rows_that_are_not_contiguous_arrive_right() -> None:
    frame = expert_batch(width=8)
    frame.rows = rows(4, 16)[:, ::2]
    received = unwire(wire(frame))
    assert received.rows is not None
    assert torch.equal(received.rows, frame.rows)


# --- what a sender refuses ---


def changed(**fields: Any) -> Frame:
    return replace(expert_batch(num_rows=4, num_pairs=6, width=8), **fields)


ids = torch.zeros(6, dtype=torch.int32)
BAD_FRAMES: list[tuple[Frame, str]] = [
    (changed(rows=None), "rows"),
    (changed(rows=rows()[0]), "rows"),
    (changed(rows=rows().to(torch.float16)), "rows"),
    (changed(rows=rows().requires_grad_()), "rows"),
    (changed(rows=rows().to("meta")), "rows"),
    (changed(rows=torch.empty(4, 0)), "width"),
    (changed(row_ids=None), "row_ids"),
    (changed(row_ids=ids.long()), "row_ids"),
    (changed(row_ids=ids.reshape(2, 3)), "row_ids"),
    (changed(row_ids=ids + 4), "row_ids"),
    (changed(row_ids=ids - 1), "row_ids"),
    (changed(row_ids=ids[:5]), "num_pairs"),
    (changed(expert_ids=ids - 1), "expert_ids"),
    (changed(expert_ids=ids.to("meta")), "expert_ids"),
    (changed(weights=torch.full((6,), math.nan)), "weights"),
    (changed(weights=torch.tensor([1, 1, -math.inf, 1, 1, 1])), "weights"),
    (changed(weights=torch.zeros(6, dtype=torch.float64)), "weights"),
    (changed(body=b"x"), "body_bytes"),
    (changed(status=Status.FAILED), "kind_status"),
    (changed(flags=8), "flags"),
    (changed(deadline_us=MAX_DEADLINE_US + 1), "deadline_us"),
    (changed(deadline_us=-1), "header"),
    (changed(request_id=2**64), "header"),
    (changed(layer=-1), "header"),
    (changed(epoch=1.5), "header"),
    (Frame(Kind.CONTROL, rows=rows()), "sections"),
    (Frame(Kind.CONTROL, expert_ids=ids), "sections"),
    (Frame(Kind.ROUTE_BATCH, rows=rows(), weights=torch.ones(1)), "sections"),
    (Frame(Kind.EXPERT_RESULT, rows=rows(), expert_ids=ids), "sections"),
    (Frame(Kind.EXPERT_RESULT, status=Status.FAILED, rows=rows()), "sections"),
    (Frame(Kind.EXPERT_RESULT), "rows"),
    (not_here((-1,)), "expert_ids"),
]


@pytest.mark.parametrize(("frame", "field"), BAD_FRAMES)
def test_a_sender_refuses(frame: Frame, field: str) -> None:
    for check in (validate, encode):
        with pytest.raises(FrameError) as caught:
            check(frame, DEFAULT_LIMITS)
        assert caught.value.field == field
        assert "\n" not in str(caught.value)


def test_negative_weights_are_allowed() -> None:
    frame = changed(weights=torch.tensor([-1.0, -0.0, 3e38, 1e-40, 0.0, -3e38]))
    same_frame(unwire(wire(frame)), frame)


LIMITS = FrameLimits(
    max_payload_bytes=1000, max_rows=4, max_width=8, max_pairs=6, max_body_bytes=100
)


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        (expert_batch(5, 6, 8), "num_rows"),
        (expert_batch(4, 7, 8), "num_pairs"),
        (expert_batch(4, 6, 9), "width"),
        (control(bytes(101)), "body_bytes"),
    ],
)
def test_limits_hold_at_both_ends(frame: Frame, field: str) -> None:
    data = wire(frame)
    for check in (lambda: encode(frame, LIMITS), lambda: unwire(data, LIMITS)):
        with pytest.raises(FrameError) as caught:
            check()
        assert caught.value.field == field
    validate(expert_batch(4, 6, 8), LIMITS)


def test_the_payload_limit_holds_where_each_section_fits() -> None:
    limits = replace(LIMITS, max_payload_bytes=199)  # 6 pairs of 12 bytes, 4 rows of 32: 200
    data = wire(expert_batch(4, 6, 8))
    for check in (lambda: encode(expert_batch(4, 6, 8), limits), lambda: unwire(data, limits)):
        with pytest.raises(FrameError) as caught:
            check()
        assert (caught.value.field, caught.value.value) == ("payload_len", 200)


# --- what a receiver refuses ---


@pytest.mark.parametrize(
    ("offset", "replacement", "field"),
    [
        (0, b"HTTP", "magic"),
        (4, b"\x01", "version"),
        (KIND, b"\x00", "kind_status"),
        (KIND, b"\xff", "kind_status"),
        (KIND, b"\x01", "num_rows"),  # a control frame with rows
        (KIND, b"\x04", "num_pairs"),  # a route batch with pairs
        (STATUS, b"\x01", "kind_status"),
        (STATUS, b"\x06", "kind_status"),
        (FLAGS, b"\x09", "flags"),
        (DTYPE, b"\x00", "dtype"),
        (DTYPE, b"\x04", "dtype"),
        (DTYPE, b"\x02", "payload_len"),
        (DEADLINE, b"\xff" * 8, "deadline_us"),
        (NUM_ROWS, u32(5), "payload_len"),
        (NUM_ROWS, u32(2**32 - 1), "num_rows"),
        (NUM_PAIRS, u32(7), "payload_len"),
        (NUM_PAIRS, u32(2**32 - 1), "num_pairs"),
        (WIDTH, u32(0), "width"),
        (WIDTH, u32(2**32 - 1), "width"),
        (BODY_BYTES, u32(1), "body_bytes"),
        (PAYLOAD_LEN, u32(0), "payload_len"),
        (PAYLOAD_LEN, u32(2**32 - 1), "payload_len"),
    ],
)
def test_a_receiver_refuses_a_header(offset: int, replacement: bytes, field: str) -> None:
    data = with_header(wire(expert_batch(4, 6, 8)), offset, replacement)
    with pytest.raises(FrameError) as caught:
        decode_header(data[:HEADER_BYTES], DEFAULT_LIMITS)
    assert caught.value.field == field


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    data = wire(expert_batch(2, 3, 4))
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 0x10
        with pytest.raises(FrameError):
            unwire(bytes(flipped))


# --- helpers ---


def test_a_reply_has_the_identity_of_its_request_and_one_line_of_text() -> None:
    request = expert_batch()
    reply = reply_to(request, status=Status.FAILED, text="first\nsecond")
    assert reply.kind is Kind.EXPERT_RESULT
    for name in ("request_id", "attempt", "layer", "epoch", "flags"):
        assert getattr(reply, name) == getattr(request, name)
    assert reply.text == "first"
    assert len(reply_to(request, status=Status.FAILED, text="x" * 5000).body) == 300
    validate(reply, DEFAULT_LIMITS)
    assert reply_to(control()).kind is Kind.CONTROL


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_finite(dtype: torch.dtype) -> None:
    good = rows(3, 5, dtype)
    bad = [math.nan, -math.nan]
    if dtype is not torch.float8_e4m3fn:  # which has no infinity
        good[0, 0] = -torch.finfo(dtype).max
        bad += [math.inf, -math.inf]
    assert rows_finite(good)
    assert rows_finite(good[:0])
    for value in bad:
        broken = good.to(torch.float32)
        broken[2, 4] = value
        assert not rows_finite(broken.to(dtype))


def test_a_deadline_counts_from_the_arrival() -> None:
    frame = control()
    assert frame.remaining_s(5.0) is None
    frame.deadline_us, frame.received_s = 2_000_000, 10.0
    assert frame.remaining_s(11.5) == 0.5
    assert frame.remaining_s(13.0) == -1.0
