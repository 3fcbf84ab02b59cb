"""The connection to one expert worker and what is under way on it."""

from collections import deque
from dataclasses import dataclass, field

from experts.channel.channel import Connection
from experts.hop import Hop

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
