"""How long the way to the routed experts and back takes: what every MoE client tells."""

from collections.abc import Iterable
from typing import NamedTuple, Self

from experts.channel.frame import Frame


class HopTimes(NamedTuple):
    """Seconds since a client's start."""

    hop_s: float = 0.0
    """That its caller spent in `begin` and `finish`: to gate, send, wait and add up."""
    expert_s: float = 0.0
    """That expert workers computed for its rows."""


class Wait(NamedTuple):
    """For one answer, by an expert worker or, if one is deployed, by a router: then queue is that
    of both, compute the expert worker's, wire the rest. Seconds."""

    worker_id: str
    took_s: float
    queue_s: float
    compute_s: float
    wire_s: float

    @classmethod
    def of(cls, worker_id: str, reply: Frame, took_s: float) -> Self:
        queue_s, compute_s = reply.queue_us * 1e-6, reply.compute_us * 1e-6
        return cls(worker_id, took_s, queue_s, compute_s, max(0.0, took_s - queue_s - compute_s))


NO_WAIT = Wait("", 0.0, 0.0, 0.0, 0.0)


class LayerHop(NamedTuple):
    """One layer's way to the experts and back, for traces. Times on time.monotonic()."""

    layer: int
    begun_s: float
    ended_s: float
    longest: Wait | None
    """The answer that took longest; None if no expert was there."""

    @classmethod
    def of(cls, layer: int, begun_s: float, ended_s: float, waits: Iterable[Wait | None]) -> Self:
        """waits: for its parts, None for those without an answer."""
        answered = (wait for wait in waits if wait is not None)
        longest = max(answered, key=lambda wait: wait.took_s, default=None)
        return cls(layer, begun_s, ended_s, longest)
