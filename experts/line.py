"""The connection to one expert worker and what is under way on it."""

from collections import deque
from dataclasses import dataclass, field

from experts.channel.channel import Connection
from experts.channel.frame import Frame
from experts.hop import Fault, Hop, parts_of
from experts.metrics import Histogram

PIPELINE_BYTES = 64 * 1024
"""Unanswered bytes of a connection up to which a further batch is sent.

A worker does not read while it writes an answer. With more in flight than the socket buffers hold,
both sides could wait for the other to read.
"""


@dataclass(slots=True, eq=False)
class Line:
    """One connection; its thread alone uses it."""

    worker_id: str
    endpoint: str
    connection: Connection
    in_flight: dict[int, Hop] = field(default_factory=dict)  # by request id
    queued: deque[Hop] = field(default_factory=deque)
    num_bytes: int = 0  # of the hops in flight
    hung: bool = False  # a hop timed out and was abandoned; no sign of life since

    @property
    def idle(self) -> bool:
        """Nobody waits for an answer."""
        return not self.queued and all(hop.abandoned for hop in self.in_flight.values())

    def has_room(self, hop: Hop) -> bool:
        return not self.in_flight or self.num_bytes + hop.num_bytes <= PIPELINE_BYTES


HOP_BOUNDS_S = (*(m * 10.0**e for e in range(-5, 1) for m in (1.0, 2.5, 5.0)), 10.0)


def _histogram() -> Histogram:
    return Histogram(HOP_BOUNDS_S)


@dataclass(slots=True)
class HopCounters:
    """Since the start of this client. Times in seconds, of answers that can be used: in the
    worker's queue, computed, the rest, all."""

    answers: int = 0
    late_answers: int = 0
    connects: int = 0
    faults: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(Fault, 0))
    queue: Histogram = field(default_factory=_histogram)
    compute: Histogram = field(default_factory=_histogram)
    wire: Histogram = field(default_factory=_histogram)
    total: Histogram = field(default_factory=_histogram)

    def count_answer(self, reply: Frame, took_s: float) -> None:
        """Of one that can be used."""
        queue_s, compute_s, wire_s = parts_of(reply, took_s)
        self.answers += 1
        self.queue.observe(queue_s)
        self.compute.observe(compute_s)
        self.wire.observe(wire_s)
        self.total.observe(took_s)
