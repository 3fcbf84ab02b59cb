"""What travels on a channel: one header and the sections that its kind allows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes three seconds of a core: those who only send JSON do without it
    from torch import Tensor

MAX_DEADLINE_US = 24 * 3600 * 1_000_000
ONE_ROW_PER_PAIR = 1  # flag: the result has one row a pair, not one summed row a token
RENORMALISED = 2  # flag of a ROUTE_RESULT: some expert was left out, the others' weights scaled
FINITE = 4  # flag of an EXPERT_RESULT: the worker has seen that all of its numbers are finite
ALL_FLAGS = ONE_ROW_PER_PAIR | RENORMALISED | FINITE
MAX_ERROR_CHARS = 300


class Kind(IntEnum):
    """What a frame is. BATCH kinds go to a server and take a credit, RESULT kinds give it back."""

    CONTROL = 1
    EXPERT_BATCH = 2
    EXPERT_RESULT = 3
    ROUTE_BATCH = 4
    ROUTE_RESULT = 5


class Status(IntEnum):
    """How a result ended. Only CONTROL and RESULT kinds may carry something else than OK."""

    OK = 0
    NOT_HERE = 1
    DEADLINE = 2
    OVERLOADED = 3
    DRAINING = 4
    FAILED = 5


BATCH_KINDS = (Kind.EXPERT_BATCH, Kind.ROUTE_BATCH)
RESULT_KINDS = (Kind.EXPERT_RESULT, Kind.ROUTE_RESULT)
RESULT_OF = {
    Kind.CONTROL: Kind.CONTROL,
    Kind.EXPERT_BATCH: Kind.EXPERT_RESULT,
    Kind.ROUTE_BATCH: Kind.ROUTE_RESULT,
}


class FrameError(ValueError):
    """A frame broke a rule. `field` is a fixed word, fit for a counter's label."""

    def __init__(self, field: str, value: object, limit: object) -> None:
        super().__init__(f"frame refused: {field} is {value}, must be {limit}")
        self.field = field
        self.value = value
        self.limit = limit


@dataclass(frozen=True)
class FrameLimits:
    """The largest frame that one side accepts; told to the peer in the handshake.

    The defaults hold a deterministic result (one float32 row a pair) of 512 tokens, k = 8 and
    width 7168: 117 MB. Memory is touched only as data arrives.
    """

    max_payload_bytes: int = 128 * 2**20
    max_rows: int = 65_536
    max_width: int = 32_768
    max_pairs: int = 524_288
    max_body_bytes: int = 8 * 2**20

    def smaller(self, other: FrameLimits) -> FrameLimits:
        """Field by field the smaller of two limits."""
        return FrameLimits(
            min(self.max_payload_bytes, other.max_payload_bytes),
            min(self.max_rows, other.max_rows),
            min(self.max_width, other.max_width),
            min(self.max_pairs, other.max_pairs),
            min(self.max_body_bytes, other.max_body_bytes),
        )


DEFAULT_LIMITS = FrameLimits()


@dataclass(slots=True, eq=False)
class Frame:
    """One message. Tensors live on the CPU, but rows may be on a GPU where a connection
    accepts_device; those of a received frame are views of its own buffer or of a landing ring.

    rows [R, width] of a dtype in tensors.ROW_DTYPES; row_ids, expert_ids int32 [P]; weights
    float32 [P]. EXPERT_BATCH: rows [T, width] and P pairs; row_ids in [0, T); expert_ids are
    logical, the worker maps them to its slots. EXPERT_RESULT: rows [T, width], pre-weighted and
    summed in float32, or [P, width] in the order of the pairs when `flags` has ONE_ROW_PER_PAIR.
    NOT_HERE: no rows, expert_ids are the missing ones. ROUTE_BATCH, ROUTE_RESULT: rows [T, width].
    CONTROL: body only (JSON). A result with any other status: no rows, body is one line of UTF-8
    text.
    """

    kind: Kind
    request_id: int = 0
    attempt: int = 0
    layer: int = 0
    epoch: int = 0
    status: Status = Status.OK
    flags: int = 0
    deadline_us: int = 0  # time left when sent, 0 = none; relative, so that no clocks need to agree
    queue_us: int = 0  # of a result: how long the batch waited; of a router's: at experts too
    compute_us: int = 0  # and how long experts computed it, with others' rows if it was merged
    expert_us: int = 0  # its own share of what expert workers computed
    rows: Tensor | None = None
    row_ids: Tensor | None = None
    expert_ids: Tensor | None = None
    weights: Tensor | None = None
    body: bytes = b""
    received_s: float = 0.0  # time.monotonic() when it had fully arrived; not on the wire

    def remaining_s(self, now_s: float) -> float | None:
        """Seconds left at `now_s` (monotonic) of a received frame's deadline, None without one."""
        if not self.deadline_us:
            return None
        return self.received_s + self.deadline_us / 1e6 - now_s

    @property
    def text(self) -> str:
        """The body of a result that is not OK, for logs."""
        return self.body.decode("utf-8", "replace")


def reply_to(
    request: Frame, rows: Tensor | None = None, status: Status = Status.OK, text: str = ""
) -> Frame:
    """The answer to a batch or control frame: same identity; `text` is cut to one line."""
    line = text.split("\n", 1)[0][:MAX_ERROR_CHARS]
    return Frame(
        kind=RESULT_OF[request.kind],
        request_id=request.request_id,
        attempt=request.attempt,
        layer=request.layer,
        epoch=request.epoch,
        status=status,
        flags=request.flags,
        rows=rows,
        body=line.encode("utf-8", "replace"),
    )
