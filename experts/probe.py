"""Asking a worker that hangs whether it computes again, where no step waits for the answer."""

import torch

from experts.channel.channel import ChannelError, ChannelTimeout, Connection, FrameError, connect
from experts.channel.frame import Frame, FrameLimits, Kind
from experts.channel.memory import ChannelMemory
from experts.health import Quarantine
from experts.hop import Hop

NO_RINGS = ChannelMemory(landing_bytes=0)
LOOK_EVERY_S = 2.0
"""How long the prober sleeps at a time; then it looks whether anybody still wants to know."""


class Probe:
    """One row and one pair of a hop that was not answered, sent again on a connection of its own.

    An answer of whatever status shows that the worker takes batches, computes and writes; a mere
    handshake would not. Letting a caller through instead would cost its step a timeout each time.
    """

    def __init__(self, hop: Hop, endpoint: str, secret: bytes, limits: FrameLimits) -> None:
        sent = hop.frame
        if sent.rows is None or sent.expert_ids is None or sent.weights is None:
            raise ValueError("a hop carries rows and pairs")
        self.worker_id = hop.worker_id
        self._endpoint = endpoint
        self._secret = secret
        self._limits = limits
        self._connection: Connection | None = None
        self._frame = Frame(
            Kind.EXPERT_BATCH,
            layer=sent.layer,
            flags=sent.flags,
            rows=sent.rows[:1].clone(),  # the step may reuse its memory
            row_ids=torch.zeros(1, dtype=torch.int32),
            expert_ids=sent.expert_ids[:1].clone(),
            weights=sent.weights[:1].clone(),
        )

    def run(self, quarantine: Quarantine) -> bool | None:
        """Wait for an answer as long as the worker is suspended: True when it came, False when the
        worker is gone, None when nobody wants to know any more."""
        try:
            while quarantine.is_suspended(self.worker_id):
                try:
                    self._ask()
                    return True
                except ChannelTimeout:
                    continue
            return None
        except (ChannelError, FrameError, ValueError):
            return False
        finally:
            if self._connection is not None:
                self._connection.close()

    def _ask(self) -> None:
        if self._connection is None or self._connection.closed:
            self._connection = connect(
                self._endpoint, self._secret, self._limits, LOOK_EVERY_S, memory=NO_RINGS
            )
            self._connection.send(self._frame, LOOK_EVERY_S)
        self._connection.receive(LOOK_EVERY_S)
