"""A router: called in the same process (`begin`, `finish`), or served to attention workers.

Served, each connection's thread only receives and queues; `lanes` threads take what waits, merged
by layer, and answer. So several micro-batches of one connection are under way at a time, and a
batch that waits for a lost expert holds up one lane only.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch
from torch import Tensor

from experts.channel.channel import ChannelCounters, ChannelError, Connection, Server
from experts.channel.frame import (
    DEFAULT_LIMITS,
    RENORMALISED,
    Frame,
    FrameLimits,
    Kind,
    Status,
    reply_to,
)
from experts.channel.memory import ChannelMemory
from experts.channel.outbox import Outbox
from experts.checkpoint import Checkpoint
from experts.client import ExpertClient
from experts.device import ComputeDevice, host_device
from experts.health import HopTimer, Quarantine, WorkerHealth
from experts.hop_counters import HopCounters
from experts.snapshots import SnapshotBoard
from router.batcher import Batcher, MicroBatch
from router.compute import RouterCompute, open_compute
from router.config import RouterConfig
from router.errors import ExpertsUnavailable, RouterError
from router.exchange import ExchangeCounters, Pending
from router.lane import Lane
from router.outage import Outage
from router.times import NO_WAIT, HopTimes, LayerHop

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0  # an attention worker that reads nothing for so long is cut off
_U32 = 0xFFFF_FFFF


class RouterWorker:
    """Routes the MoE layers of one model. `begin` and `finish` belong to one thread at a time."""

    def __init__(
        self,
        compute: RouterCompute,
        board: SnapshotBoard,
        client_factory: Callable[[ChannelMemory], ExpertClient],
        config: RouterConfig | None = None,
        limits: FrameLimits = DEFAULT_LIMITS,
        name: str = "router",
    ) -> None:
        self.config = config or RouterConfig()
        self.channel_counters = ChannelCounters()
        self._compute = compute
        self._limits = limits
        self._name = name
        self._board = board
        self._client_factory = client_factory
        self._outage = Outage()
        compute.warm_up()  # the first token would wait some seconds for them
        self._own_lane = self._new_lane(compute.memory)
        self._batcher = Batcher(self.config.max_batch_rows, self.config.max_waiting)
        self._lanes: list[Lane] = []
        self._threads: list[threading.Thread] = []
        self._draining = False
        self._server: Server | None = None
        self._outboxes: dict[Connection, Outbox] = {}

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        board: SnapshotBoard,
        secret: bytes,
        config: RouterConfig | None = None,
        limits: FrameLimits = DEFAULT_LIMITS,
        name: str = "router",
        device: ComputeDevice | None = None,
    ) -> Self:
        """The router of a checkpoint: reads its gates. Raises CheckpointError.

        device: where to compute, None = the CPU kernels.
        """
        settings = config or RouterConfig()
        health = WorkerHealth(
            Quarantine(settings.quarantine_base_s, settings.quarantine_max_s),
            HopTimer(
                settings.hop_timeout_s, settings.hop_timeout_factor, settings.hop_timeout_cold_s
            ),
        )
        new_client = partial(
            ExpertClient, board, secret, health, limits, settings.connect_timeout_s
        )
        compute = open_compute(checkpoint, device or host_device())
        return cls(compute, board, new_client, settings, limits, name)

    def _new_lane(self, memory: ChannelMemory) -> Lane:
        client = self._client_factory(memory)
        return Lane(self._compute, client, self._board, self.config, self._limits, self._outage)

    # --- in the same process ---

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Pending:
        """Send x [T, d] to the experts of a layer. See Lane.begin."""
        return self._own_lane.begin(layer, x, deadline_s)

    def finish(self, pending: Pending) -> Tensor:
        """The routed experts' output, [T, d] float32, where x lies. Raises RouterError."""
        return self._own_lane.finish(pending)

    @property
    def accepts_device(self) -> bool:
        """See MoeClient."""
        return self._compute.accepts_device

    @property
    def num_renormalised(self) -> int:
        """See MoeClient."""
        return self._own_lane.counters.renormalised_tokens

    @property
    def hop_times(self) -> HopTimes:
        """See MoeClient."""
        counters = self._own_lane.counters
        return HopTimes(counters.hop_s, counters.expert_s)

    def log_hops(self, log: list[LayerHop] | None) -> None:
        """See MoeClient."""
        self._own_lane.hop_log = log

    def forward(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Tensor:
        """begin and finish."""
        return self.finish(self.begin(layer, x, deadline_s))

    # --- served ---

    def start(self, endpoint: str, secret: bytes) -> str:
        """Serve until `close`; returns the endpoint with the port it got. Raises ChannelError."""
        self._server = Server(
            endpoint,
            self.handle,
            secret,
            self._limits,
            name=self._name,
            on_open=self._connection_opened,
            on_close=self._connection_lost,
            counters=self.channel_counters,
        )
        self._server.start()
        for i in range(self.config.lanes):
            lane = self._new_lane(ChannelMemory())  # what is routed for others lies on the host
            thread = threading.Thread(
                target=self._run_lane, args=(lane,), name=f"{self._name}-lane-{i}", daemon=True
            )
            self._lanes.append(lane)
            self._threads.append(thread)
            thread.start()
        return self._server.endpoint

    def close(self) -> None:
        """Answer what the lanes have, within CLOSE_TIMEOUT_S, then stop serving; senders see the
        connection end and go to another router."""
        self.drain()
        for item in self._batcher.close():
            self._answer(item, reply_to(item.frame, status=Status.DRAINING, text="router closes"))
        until_s = time.monotonic() + CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        if self._server is not None:
            self._server.close()
        self._own_lane.client.close()

    def drain(self) -> None:
        """Refuse new micro-batches with DRAINING; those that wait are still served."""
        self._draining = True

    @property
    def num_waiting(self) -> int:
        """Micro-batches that no lane has taken yet."""
        return len(self._batcher)

    @property
    def hop_counters(self) -> list[HopCounters]:
        """Of every lane."""
        return [lane.client.counters for lane in (self._own_lane, *self._lanes)]

    @property
    def counters(self) -> list[ExchangeCounters]:
        """Of every lane."""
        return [lane.counters for lane in (self._own_lane, *self._lanes)]

    def handle(self, frame: Frame, connection: Connection) -> Frame | None:
        """Queue a ROUTE_BATCH; a lane answers it. Returns only refusals."""
        if frame.kind != Kind.ROUTE_BATCH or frame.rows is None:
            return reply_to(frame, status=Status.FAILED, text=f"not a batch: {frame.kind.name}")
        if frame.layer not in self._compute.layers or frame.rows.shape[1] != self._compute.width:
            text = f"layer {frame.layer}, width {frame.rows.shape[1]}: not of this model"
            return reply_to(frame, status=Status.FAILED, text=text)
        if self._draining:
            return reply_to(frame, status=Status.DRAINING, text="router drains")
        outbox = self._outboxes.get(connection)
        if outbox is None:  # it has ended
            return None
        if not self._batcher.put(MicroBatch(frame, frame.rows, outbox)):
            return reply_to(frame, status=Status.OVERLOADED, text="too many micro-batches wait")
        return None

    def _connection_opened(self, connection: Connection) -> None:
        self._outboxes[connection] = Outbox(connection, ANSWER_TIMEOUT_S)

    def _connection_lost(self, connection: Connection) -> None:
        del self._outboxes[connection]

    def _run_lane(self, lane: Lane) -> None:
        while items := self._batcher.take():
            try:
                self._serve(lane, items)
            except Exception:  # a fault of one batch must not end the lane
                logger.exception("%s: lane failed", self._name)
        lane.client.close()

    def _serve(self, lane: Lane, items: Sequence[MicroBatch]) -> None:
        """Compute micro-batches of one layer together and answer each in its dtype.

        Those of another dtype, or on another device, go by themselves: a row's answer must not
        depend on what it was merged with.
        """
        others = [item for item in items if _kind(item) != _kind(items[0])]
        if others:
            self._serve(lane, [item for item in items if _kind(item) == _kind(items[0])])
            self._serve(lane, others)
            return
        begun_s = time.monotonic()
        log: list[LayerHop] = []
        lane.hop_log = log
        left_s = [self._left_s(item, begun_s) for item in items]
        try:
            x = torch.cat([item.rows for item in items]) if len(items) > 1 else items[0].rows
            pending = lane.begin(items[0].layer, _sendable(x), min(left_s))
            y = lane.finish(pending)
        except Exception as error:
            if len(items) > 1:  # one of them may be at fault: each by itself
                for item in items:
                    self._serve(lane, [item])
                return
            self._answer(items[0], _refusal(items[0], error))
            return
        longest = (log[0].longest if log else None) or NO_WAIT
        us_per_row = pending.expert_us / max(1, x.shape[0])
        renormalised = pending.renormalised
        end = 0
        for item in items:
            end += item.num_rows
            rows = y[end - item.num_rows : end].to(item.rows.dtype)
            reply = reply_to(item.frame, rows)
            if any(end - item.num_rows <= row < end for row in renormalised):
                reply.flags |= RENORMALISED
            waited_s = max(0.0, begun_s - item.frame.received_s) + longest.queue_s
            reply.queue_us = min(int(waited_s * 1e6), _U32)
            reply.compute_us = min(round(longest.compute_s * 1e6), _U32)
            reply.expert_us = min(round(us_per_row * item.num_rows), _U32)
            self._answer(item, reply)

    def _left_s(self, item: MicroBatch, now_s: float) -> float:
        left_s = item.frame.remaining_s(now_s)
        return self.config.deadline_s if left_s is None else max(0.0, left_s)

    def _answer(self, item: MicroBatch, reply: Frame) -> None:
        try:
            item.outbox.post(reply)
        except ChannelError as error:  # the sender is gone: it asks another router
            logger.debug("%s: answer not sent: %s", self._name, error)


def _kind(item: MicroBatch) -> tuple[torch.dtype, torch.device]:
    return item.rows.dtype, item.rows.device


def _sendable(x: Tensor) -> Tensor:
    """As it is; fp8 as bfloat16, which has all its values, for answers need more bits than that."""
    return x.bfloat16() if x.dtype is torch.float8_e4m3fn else x


def _refusal(item: MicroBatch, error: Exception) -> Frame:
    if isinstance(error, ExpertsUnavailable):
        return reply_to(item.frame, status=Status.DEADLINE, text=str(error))
    if not isinstance(error, RouterError):
        logger.error("layer %d failed", item.layer, exc_info=error)
    return reply_to(item.frame, status=Status.FAILED, text=f"{type(error).__name__}: {error}")
