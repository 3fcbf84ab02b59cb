"""The rules of a frame: which sections its kind carries, their sizes, what may be in them.

Shared by both ends and by process-local channels, so that a frame refused by one is refused by all.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from experts.channel.frame import (
    ALL_FLAGS,
    MAX_DEADLINE_US,
    RESULT_KINDS,
    FrameError,
    FrameLimits,
    Kind,
    Status,
)

Array = npt.NDArray[Any]
UINT32 = np.dtype("u4")
ITEM_BYTES = (0, 4, 2, 1)  # by dtype code, of none and of tensors.ROW_DTYPES

# What a payload may hold, in this order.
ROW_IDS, EXPERT_IDS, WEIGHTS, ROWS, BODY = 1, 2, 4, 8, 16
PAIRS = ROW_IDS | EXPERT_IDS | WEIGHTS
TENSORS = PAIRS | ROWS

_FIRST_NEGATIVE = 1 << 31  # as uint32
_FIRST_NOT_FINITE = 0x7F800000  # bits of float32 infinity; NaN and negative numbers are above


def _sections_by_kind() -> dict[int, int]:
    """The sections of every (kind, status) that exists; only BODY may be empty."""
    sections = {
        (Kind.EXPERT_BATCH, Status.OK): PAIRS | ROWS,
        (Kind.ROUTE_BATCH, Status.OK): ROWS,
    }
    for status in Status:
        sections[Kind.CONTROL, status] = BODY
        for kind in RESULT_KINDS:
            sections[kind, status] = ROWS if status is Status.OK else BODY
    sections[Kind.EXPERT_RESULT, Status.NOT_HERE] = EXPERT_IDS | BODY
    return {kind << 8 | status: bits for (kind, status), bits in sections.items()}


SECTIONS = _sections_by_kind()  # by kind << 8 | status
PAIR_BYTES = {bits: 4 * (bits & PAIRS).bit_count() for bits in SECTIONS.values()}


def sections_of(kind: int, status: int) -> int:
    sections = SECTIONS.get(kind << 8 | status)
    if sections is None:
        raise FrameError("kind_status", (kind, status), "a kind and a status that it may have")
    return sections


def check_sizes(
    sections: int,
    num_rows: int,
    num_pairs: int,
    width: int,
    dtype: int,
    body_bytes: int,
    limits: FrameLimits,
) -> int:
    """Each size against its limit and its kind. Returns the payload's exact length."""
    if sections & ROWS:
        if num_rows > limits.max_rows:
            raise FrameError("num_rows", num_rows, f"at most {limits.max_rows}")
        if not 0 < width <= limits.max_width:
            raise FrameError("width", width, f"in 1..{limits.max_width}")
        if not 0 < dtype < len(ITEM_BYTES):
            raise FrameError("dtype", dtype, f"in 1..{len(ITEM_BYTES) - 1}")
    elif num_rows or width or dtype:
        raise FrameError("num_rows", num_rows, "0, without width and dtype, for this kind")
    if num_pairs > (limits.max_pairs if sections & PAIRS else 0):
        raise FrameError("num_pairs", num_pairs, f"at most {limits.max_pairs}, 0 without pairs")
    if body_bytes > (limits.max_body_bytes if sections & BODY else 0):
        raise FrameError("body_bytes", body_bytes, f"at most {limits.max_body_bytes}, 0 if none")
    row_bytes = num_rows * width * ITEM_BYTES[dtype]
    payload_len = num_pairs * PAIR_BYTES[sections] + row_bytes + body_bytes
    if payload_len > limits.max_payload_bytes:
        raise FrameError("payload_len", payload_len, f"at most {limits.max_payload_bytes}")
    return payload_len


def check_flags(flags: int, deadline_us: int) -> None:
    if flags & ~ALL_FLAGS:
        raise FrameError("flags", flags, f"a combination of the bits of {ALL_FLAGS}")
    if deadline_us > MAX_DEADLINE_US:
        raise FrameError("deadline_us", deadline_us, f"at most {MAX_DEADLINE_US}")


def _largest(array: Array) -> int:
    """Of a one-dimensional array. argmax takes a third of the time that max does."""
    largest: int = array.item(array.argmax())
    return largest


def _check_ids(name: str, ids: Array, bound: int) -> None:
    """ids: int32 [P], P > 0. As uint32 a negative id is a huge one, so one look is enough."""
    largest = _largest(ids.view(UINT32))
    if largest >= bound:
        raise FrameError(name, f"{largest} as uint32", f"in 0..{bound - 1}")


def _check_weights(weights: Array) -> None:
    """weights: float32 [P], P > 0. Only if a bit pattern is suspicious look at all of them."""
    if _largest(weights.view(UINT32)) >= _FIRST_NOT_FINITE and not np.isfinite(weights).all():
        raise FrameError("weights", "NaN or infinite", "finite")


def check_pairs(arrays: list[Array], sections: int, num_rows: int) -> None:
    """arrays: as `_pair_arrays` gives them, P > 0."""
    if sections & ROW_IDS:
        row_ids, expert_ids, weights = arrays
        _check_ids("row_ids", row_ids, num_rows)
        _check_weights(weights)
    else:
        (expert_ids,) = arrays
    _check_ids("expert_ids", expert_ids, _FIRST_NEGATIVE)
