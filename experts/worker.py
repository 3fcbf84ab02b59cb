"""An expert worker: a pool of slots, and the grouped SwiGLU over whatever rows arrive.

It knows nothing of placement: it is told which (layer, expert) to hold and answers for those.
Experts travel by their logical name, so a sender with an old table gets NOT_HERE, never the
answer of another expert. An expert has no state between calls: a batch may be sent twice.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.channel.channel import ChannelCounters, Connection, Server
from experts.channel.frame import (
    DEFAULT_LIMITS,
    FINITE,
    ONE_ROW_PER_PAIR,
    Frame,
    FrameLimits,
    Kind,
    Status,
    reply_to,
)
from experts.channel.tensors import rows_finite
from experts.checkpoint import Checkpoint
from experts.compute import Compute, PairBatch, merge, open_compute
from experts.device import ComputeDevice, host_device
from experts.errors import CheckpointError
from experts.load import WINDOW_S, LoadCounter
from experts.placement.space import ExpertKey
from experts.staging import channel_memory
from experts.turns import Turns
from experts.weights import load_expert

logger = logging.getLogger(__name__)

MAX_WAITING = 64  # batches; more are refused, their senders have other holders or try again
REPORT_EVERY_S = 1.0
CLOSE_TIMEOUT_S = 5.0
_U32 = 0xFFFF_FFFF
_NUM_NAMES = 8  # of experts in an error


class ExpertsNotLoaded(Exception):
    """Experts that could not be read, each with its reason; str() is one line."""

    def __init__(self, failed: Mapping[ExpertKey, Exception]) -> None:
        super().__init__(failed)
        self.failed = failed

    def __str__(self) -> str:
        names = [f"{expert} of layer {layer}" for layer, expert in sorted(self.failed)]
        more = f" and {len(names) - _NUM_NAMES} more" if len(names) > _NUM_NAMES else ""
        shown = ", ".join(names[:_NUM_NAMES])
        first = self.failed[min(self.failed)]
        return f"could not load expert {shown}{more}: {type(first).__name__}: {first}"


@dataclass(slots=True)
class WorkerCounters:
    """Since the start. Rows are token rows, pairs (row, expert); busy_s is time spent computing."""

    batches: int = 0
    merged_batches: int = 0  # computed together with an earlier one
    rows: int = 0
    pairs: int = 0
    not_here: int = 0
    refused: int = 0
    busy_s: float = 0.0
    queue_us: int = 0  # that batches waited for their turn, all together
    queue_us_buckets: list[int] = field(default_factory=lambda: [0] * 33)
    """Batches by the bit length of the microseconds that they waited for their turn."""


@dataclass(slots=True, eq=False)
class _Batch:
    """A request and, after its turn, the reply."""

    request: Frame
    rows: Tensor  # [T, d]
    row_ids: Tensor  # [P] int32
    expert_ids: Tensor  # [P] int32
    weights: Tensor  # [P] float32
    reply: Frame | None = None
    slot_ids: Tensor | None = None  # [P] int32, once they are known to be here
    num_pairs: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_pairs = len(self.expert_ids)

    def pairs(self, first_row: int) -> PairBatch:
        """To be computed with `first_row` rows of others before its own."""
        if self.slot_ids is None:
            raise RuntimeError("a batch without slots cannot be computed")
        row_ids = self.row_ids + first_row if first_row else self.row_ids
        per_pair = bool(self.request.flags & ONE_ROW_PER_PAIR)
        return PairBatch(
            self.request.layer,
            self.rows,
            row_ids,
            self.expert_ids,
            self.slot_ids,
            self.weights,
            per_pair,
        )


class ExpertWorker:
    """Holds experts of one checkpoint. Thread-safe: every connection has its own thread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        worker_id: str,
        num_slots: int,
        *,
        max_batch_rows: int = 4096,
        load_window_s: float = WINDOW_S,
        emulated_pairs_per_s: float | None = None,
        limits: FrameLimits = DEFAULT_LIMITS,
        device: ComputeDevice | None = None,
    ) -> None:
        """`device`: where to compute, None = the CPU kernels; its memory for the slots is taken at
        once. `emulated_pairs_per_s`: sleep after each batch to be as slow as such a device."""
        config = checkpoint.config
        self.worker_id = worker_id
        self.num_slots = num_slots
        self.epoch = 0  # of the newest assignment that was carried out
        self.counters = WorkerCounters()
        self.channel_counters = ChannelCounters()
        self.load_counter = LoadCounter(config.moe_layers, config.n_routed_experts, load_window_s)
        self._checkpoint = checkpoint
        self._width = config.hidden_size
        self._limits = limits
        self._emulated_pairs_per_s = emulated_pairs_per_s
        device = device or host_device()
        self._memory = channel_memory(device)
        self._compute: Compute = open_compute(checkpoint, num_slots, device)
        self._free_slots = list(range(num_slots))
        self._slot_of: dict[ExpertKey, int] = {}
        self._slots_of_layer: dict[int, npt.NDArray[np.int32]] = {  # [E], -1 = not here
            layer: np.full(config.n_routed_experts, -1, np.int32) for layer in config.moe_layers
        }
        self._load_lock = threading.Lock()
        self._turns = Turns[_Batch](self._answer, max_batch_rows)
        self._draining = False
        self._server: Server | None = None

    # --- life ---

    def start(self, endpoint: str, secret: bytes) -> str:
        """Serve until `close`; returns the endpoint with the port it got. Raises ChannelError.

        Compiles the kernels first: the first batch would time out while they are.
        """
        self._compute.warm_up()
        self._server = Server(
            endpoint,
            self.handle,
            secret,
            self._limits,
            name=f"experts-{self.worker_id}",
            counters=self.channel_counters,
            memory=self._memory,
        )
        self._server.start()
        return self._server.endpoint

    def close(self) -> None:
        """Compute what is queued, within CLOSE_TIMEOUT_S, then stop serving; senders see the
        connection end and go to other holders."""
        self.drain()
        self._turns.wait_idle(CLOSE_TIMEOUT_S)
        if self._server is not None:
            self._server.close()

    def wait_quiet(self, quiet_s: float = 0.1, timeout_s: float = 2.0) -> None:
        """Return when no batch has come for `quiet_s`: senders have heard that others hold it."""
        until_s = time.monotonic() + timeout_s
        seen = -1
        while self.counters.batches != seen and time.monotonic() < until_s:
            seen = self.counters.batches
            time.sleep(quiet_s)

    @property
    def num_waiting(self) -> int:
        """Batches that wait for their turn."""
        return self._turns.num_waiting

    def drain(self) -> None:
        """Refuse new batches with DRAINING; those in the queue are still computed."""
        self._draining = True

    # --- holding experts ---

    @property
    def holds(self) -> frozenset[ExpertKey]:
        """(layer, expert) that can be computed now."""
        return frozenset(self._slot_of.copy())

    def hold(
        self,
        experts: Collection[ExpertKey],
        epoch: int = 0,
        report: Callable[[Iterable[ExpertKey]], None] | None = None,
    ) -> None:
        """Hold exactly these: drop the others, load what is missing.

        `report(holds)` is called about once a second while loading and at the end. One that cannot
        be read holds up no other: ExpertsNotLoaded comes after the last report. Raises ValueError
        when they do not fit in the slots.
        """
        failed: dict[ExpertKey, Exception] = {}
        with self._load_lock:
            wished = set(experts)
            if len(wished) > self.num_slots:
                raise ValueError(f"{len(wished)} experts do not fit in {self.num_slots} slots")
            self._unload(self._slot_of.keys() - wished)
            reported_s = time.monotonic()
            for key in sorted(wished - self._slot_of.keys()):
                try:
                    self._load(key)
                except (CheckpointError, OSError) as error:
                    failed[key] = error
                if report is not None and time.monotonic() - reported_s > REPORT_EVERY_S:
                    report(self.holds)
                    reported_s = time.monotonic()
            if not failed:
                self.epoch = epoch
        if report is not None:
            report(self.holds)
        if failed:
            raise ExpertsNotLoaded(failed)

    def _load(self, key: ExpertKey) -> None:
        """The slot is filled before the map names it, so no batch can see it half done."""
        layer, expert = key
        slots = self._slots_of_layer.get(layer)
        if slots is None or not 0 <= expert < slots.shape[0]:
            raise ValueError(f"the model has no expert {expert} in layer {layer}")
        slot = self._free_slots[-1]
        self._compute.fill(key, slot, load_expert(self._checkpoint, layer, expert))
        self._free_slots.pop()
        self._slot_of[key] = slot
        slots[expert] = slot

    def _unload(self, keys: Collection[ExpertKey]) -> None:
        def clear() -> None:
            for layer, expert in keys:
                slot = self._slot_of.pop((layer, expert))
                self._slots_of_layer[layer][expert] = -1
                self._compute.clear((layer, expert), slot)
                self._free_slots.append(slot)

        if keys:
            self._turns.exclusive(clear)

    # --- answering ---

    def handle(self, frame: Frame, _connection: Connection) -> Frame:
        """Answer an EXPERT_BATCH; anything that cannot be computed gets a status that says why."""
        rows, row_ids, expert_ids = frame.rows, frame.row_ids, frame.expert_ids
        if frame.kind != Kind.EXPERT_BATCH or frame.weights is None:
            return reply_to(frame, status=Status.FAILED, text=f"not a batch: {frame.kind.name}")
        if rows is None or row_ids is None or expert_ids is None:
            return reply_to(frame, status=Status.FAILED, text="a batch without rows or pairs")
        if frame.layer not in self._slots_of_layer or rows.shape[1] != self._width:
            text = f"layer {frame.layer} of width {rows.shape[1]}: this model has no such experts"
            return reply_to(frame, status=Status.FAILED, text=text)
        if self._draining or self._turns.num_waiting >= MAX_WAITING:
            self.counters.refused += 1
            status = Status.DRAINING if self._draining else Status.OVERLOADED
            return reply_to(frame, status=status, text=f"{self.worker_id}: {status.name}")
        batch = _Batch(frame, rows, row_ids, expert_ids, frame.weights)
        kind = (frame.layer, frame.flags, rows.dtype, rows.is_cuda)
        self._turns.run(kind, rows.shape[0], batch)
        if batch.reply is None:
            raise RuntimeError("a batch was computed without an answer")
        return batch.reply

    def _answer(self, batches: list[_Batch]) -> None:
        """Batches of one layer, in one go. Sets their replies."""
        begun_s = time.monotonic()
        ready = [batch for batch in batches if self._find_slots(batch, begun_s)]
        if ready:
            results = self._run(ready)
            self._emulate(ready, begun_s)
            busy_s = time.monotonic() - begun_s
            us_per_pair = 1e6 * busy_s / max(1, sum(batch.num_pairs for batch in ready))
            for batch, rows in zip(ready, results, strict=True):
                batch.reply = _result(batch.request, rows)
                batch.reply.expert_us = min(round(us_per_pair * batch.num_pairs), _U32)
                self._count(batch)
            self.counters.busy_s += busy_s
            self.counters.merged_batches += len(ready) - 1
        compute_us = int((time.monotonic() - begun_s) * 1e6)
        for batch in batches:
            if batch.reply is not None:
                queue_us = int((begun_s - batch.request.received_s) * 1e6)
                batch.reply.queue_us = min(max(0, queue_us), _U32)
                batch.reply.compute_us = min(compute_us, _U32)
                self.counters.queue_us += batch.reply.queue_us
                self.counters.queue_us_buckets[batch.reply.queue_us.bit_length()] += 1

    def _emulate(self, batches: Sequence[_Batch], begun_s: float) -> None:
        if self._emulated_pairs_per_s is not None:
            num_pairs = sum(batch.num_pairs for batch in batches)
            left_s = begun_s + num_pairs / self._emulated_pairs_per_s - time.monotonic()
            time.sleep(max(0.0, left_s))

    def _find_slots(self, batch: _Batch, now_s: float) -> bool:
        """Map experts to slots; False after setting a reply that is not a result."""
        request = batch.request
        left_s = request.remaining_s(now_s)
        if left_s is not None and left_s <= 0:
            batch.reply = reply_to(request, status=Status.DEADLINE, text="waited past its deadline")
            return False
        slots = self._slots_of_layer[request.layer]
        experts = batch.expert_ids.numpy()
        slot_ids = slots.take(experts, mode="clip")
        missing = (slot_ids < 0) | (experts >= slots.shape[0])
        if not missing.any():
            batch.slot_ids = torch.from_numpy(slot_ids)
            return True
        self.counters.not_here += 1
        batch.reply = reply_to(request, status=Status.NOT_HERE)
        batch.reply.expert_ids = torch.from_numpy(np.unique(experts[missing]))
        return False

    def _run(self, batches: Sequence[_Batch]) -> list[Tensor]:
        """Rows of the answer to each batch, in the dtype of its request."""
        if len(batches) == 1:
            return [self._compute.run(batches[0].pairs(0))]
        num_rows = [batch.rows.shape[0] for batch in batches]
        starts = np.cumsum([0, *num_rows[:-1]]).tolist()
        parts = [batch.pairs(start) for batch, start in zip(batches, starts, strict=True)]
        results = self._compute.run(merge(parts))
        sizes = [len(batch.row_ids) for batch in batches] if parts[0].per_pair else num_rows
        ends = np.cumsum(sizes).tolist()
        return [results[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def _count(self, batch: _Batch) -> None:
        self.counters.batches += 1
        self.counters.rows += batch.rows.shape[0]
        self.counters.pairs += batch.num_pairs
        self.load_counter.add(batch.request.layer, batch.expert_ids.numpy())


def _result(request: Frame, rows: Tensor) -> Frame:
    """The reply with these rows. Those on a device are looked at here, where the stream is empty:
    a router would wait for all that its own has to do."""
    if rows.is_cpu:
        return reply_to(request, rows)
    if not rows_finite(rows):
        return reply_to(request, status=Status.FAILED, text="the answer is not finite")
    reply = reply_to(request, rows)
    reply.flags |= FINITE
    return reply
