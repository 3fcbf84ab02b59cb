"""What MoE clients tell of their hops, and how a merged batch's time is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experts.channel.frame import Frame, Kind
from experts.checkpoint import Checkpoint
from router.batcher import MicroBatch
from router.times import LayerHop, Wait
from tests.router.pool import NewPool, some_rows, spread

LAYER = 2


class Kept:
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Frame] = []

    def post(self, frame: Frame) -> None:
        self.sent.append(frame)


def test_parts_of_an_answer() -> None:
    reply = Frame(Kind.EXPERT_RESULT, queue_us=200, compute_us=300)
    assert Wait.of("w0", reply, 1e-3) == ("w0", 1e-3, *map(pytest.approx, (2e-4, 3e-4, 5e-4)))
    assert Wait.of("w0", reply, 1e-4).wire_s == 0.0, "clocks differ"


def test_merged_micro_batches_pay_by_their_rows(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 2))
    router = pool.router()
    senders = [Kept(), Kept()]
    items: list[Any] = []
    row = some_rows(1, checkpoint)  # all go to the same experts
    for sender, num_rows in zip(senders, (1, 15), strict=True):
        frame = Frame(Kind.ROUTE_BATCH, layer=LAYER, rows=row.repeat(num_rows, 1))
        items.append(MicroBatch(frame, frame.rows, sender))  # type: ignore[arg-type]
    router._serve(router._own_lane, items)
    small, large = (sender.sent[0].expert_us for sender in senders)
    busy_us = 1e6 * sum(worker.counters.busy_s for worker in pool.workers.values())
    assert small + large == pytest.approx(busy_us, abs=3)
    assert large == pytest.approx(15 * small, abs=16)  # each is rounded


def test_a_router_tells_the_time_of_its_hops(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 2))
    router = pool.router()
    log: list[LayerHop] = []
    router.forward(LAYER, some_rows(3, checkpoint))
    before = router.hop_times
    router.log_hops(log)
    router.forward(LAYER, some_rows(3, checkpoint))
    router.log_hops(None)
    router.forward(LAYER, some_rows(3, checkpoint))
    (hop,) = log
    after = router.hop_times
    assert 0 < before.expert_s < before.hop_s, "inline experts compute in the caller's thread"
    assert before.hop_s < after.hop_s
    assert hop.layer == LAYER and hop.longest is not None
    assert hop.longest.worker_id in ("w0", "w1")
    parts = hop.longest.queue_s + hop.longest.compute_s + hop.longest.wire_s
    assert parts == pytest.approx(hop.longest.took_s)
    assert 0 < hop.longest.took_s <= hop.ended_s - hop.begun_s


def test_hops_are_counted_by_their_parts(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 2))
    router = pool.router()
    for _ in range(5):
        router.forward(LAYER, some_rows(16, checkpoint))
    (counters,) = router.hop_counters
    assert counters.answers == 10
    hops = counters.histograms()
    for histogram in hops:
        assert sum(histogram.counts) == 10
    parts_s = hops.queue.total + hops.compute.total + hops.wire.total
    assert parts_s == pytest.approx(hops.total.total, rel=0.05)


def test_no_rows_take_no_expert(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 1)).router()
    router.forward(LAYER, torch.zeros(0, checkpoint.config.hidden_size))
    assert router.hop_times.expert_s == 0.0
