"""One batch to one expert worker and its answer, or why there is none."""

from dataclasses import dataclass, field
from enum import Enum

import torch

from experts.channel.frame import FINITE, ONE_ROW_PER_PAIR, Frame, Kind, Status
from experts.channel.tensors import rows_finite
from experts.kernels.finite import all_finite


class Fault(Enum):
    """Why a hop has no answer that can be used."""

    LOST = "connection lost"
    TIMEOUT = "no answer in time"
    MALFORMED = "answer broke the protocol"
    NOT_HERE = "worker lacks an expert"
    OVERLOADED = "worker is overloaded"
    DRAINING = "worker is draining"
    DEADLINE = "worker dropped it, too late"
    FAILED = "worker failed"
    NOT_FINITE = "answer is not finite"


_FAULT_OF = {
    Status.OVERLOADED: Fault.OVERLOADED,
    Status.DRAINING: Fault.DRAINING,
    Status.DEADLINE: Fault.DEADLINE,
    Status.FAILED: Fault.FAILED,
}


@dataclass(slots=True, eq=False)
class Hop:
    """One EXPERT_BATCH to one worker. After `gather` exactly one of reply and fault is set.

    A hop whose fault is TIMEOUT is still in flight: `wait_again` or `abandon` it.
    """

    worker_id: str
    frame: Frame
    deadline_s: float  # on the health clock: nobody wants the answer later
    due_s: float = 0.0  # when to stop waiting for this worker
    sent_s: float = 0.0
    took_s: float = 0.0  # from then to the reply
    reply: Frame | None = None
    fault: Fault | None = None
    detail: str = ""
    missing: list[int] = field(default_factory=list)  # NOT_HERE: the experts the worker lacks
    late: bool = False  # it has timed out before
    abandoned: bool = False
    num_rows: int = field(init=False)
    reply_shape: tuple[int, int] = field(init=False)  # one row a token, or one a pair
    num_bytes: int = field(init=False)  # of the rows, there and back
    on_device: bool = field(init=False)  # the rows to send

    def __post_init__(self) -> None:
        rows, pairs = self.frame.rows, self.frame.expert_ids
        if rows is None or pairs is None:
            raise ValueError("a hop carries rows and pairs")
        self.num_rows, width = rows.shape
        num_reply_rows = len(pairs) if self.frame.flags & ONE_ROW_PER_PAIR else self.num_rows
        self.reply_shape = (num_reply_rows, width)
        self.num_bytes = (self.num_rows + num_reply_rows) * width * rows.itemsize
        self.on_device = not rows.is_cpu

    @property
    def settled(self) -> bool:
        return self.reply is not None or self.fault is not None

    def stage(self) -> None:
        """Bring rows on a device to the host, which every connection takes."""
        if self.on_device and self.frame.rows is not None:
            self.frame.rows = self.frame.rows.cpu()
            self.on_device = False

    def fail(self, fault: Fault, detail: str = "") -> None:
        self.fault, self.detail = fault, detail


def check_reply(hop: Hop, frame: Frame) -> Fault | None:
    """What is wrong with an answer to this hop, None when its rows can be added. Sets missing."""
    if frame.kind != Kind.EXPERT_RESULT or frame.layer != hop.frame.layer:
        return Fault.MALFORMED
    if frame.status == Status.NOT_HERE:
        hop.missing = _missing(hop, frame)
        return Fault.NOT_HERE if hop.missing else Fault.MALFORMED
    if frame.status != Status.OK:
        return _FAULT_OF.get(frame.status, Fault.MALFORMED)
    rows, sent = frame.rows, hop.frame.rows
    if rows is None or sent is None or rows.dtype != sent.dtype or rows.shape != hop.reply_shape:
        return Fault.MALFORMED
    if frame.flags & FINITE:
        return None
    is_plain = rows.is_cpu and rows.dtype is torch.float32 and rows.is_contiguous()
    finite = all_finite(rows.numpy()) if is_plain else rows_finite(rows)
    return None if finite else Fault.NOT_FINITE


def _missing(hop: Hop, frame: Frame) -> list[int]:
    """The experts of this hop that the worker says it lacks."""
    asked, named = hop.frame.expert_ids, frame.expert_ids
    if asked is None or named is None:
        return []
    return sorted(set(asked.tolist()) & set(named.tolist()))
