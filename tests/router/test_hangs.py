"""Workers that are stopped and go on later: one short wait, once, whoever else has the experts."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from experts.channel.memory import ChannelMemory
from experts.checkpoint import Checkpoint
from experts.hop import Fault, Hop
from router.exchange import Pending
from router.lane import Lane
from router.worker import RouterWorker
from tests.router.pool import NewPool, Pool, every_expert, some_rows, spread

LAYER = 2
EAGER = {"quarantine_base_s": 1e-6, "quarantine_max_s": 1e-6}


@pytest.fixture
def x(checkpoint: Checkpoint) -> torch.Tensor:
    return some_rows(8, checkpoint)


@pytest.fixture
def twins(new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path) -> Pool:
    """Two workers that hold every expert."""
    return new_pool(checkpoint, spread(checkpoint, 2, replicas=2), socket_folder)


@pytest.fixture
def another_lane() -> Iterator[Callable[[RouterWorker], Lane]]:
    """Makes a further lane of a router."""
    with contextlib.ExitStack() as stack:

        def make(router: RouterWorker) -> Lane:
            lane = router._new_lane(ChannelMemory())
            stack.callback(lane.client.close)
            return lane

        yield make


def timeouts(lane: Lane) -> int:
    return lane.client.counters.faults[Fault.TIMEOUT]


def hops_to(pending: Pending, worker_id: str) -> list[Hop]:
    return [
        item.hop
        for exchange in pending.exchanges
        for item in exchange.open
        if item.hop.worker_id == worker_id
    ]


def let_time_out(pending: Pending, worker_id: str) -> None:
    """The worker's time is over; the others have as much as they need."""
    for hop in hops_to(pending, worker_id):
        hop.due_s = 0.0


def test_a_worker_that_hangs_costs_all_lanes_together_one_timeout(
    twins: Pool, x: torch.Tensor, another_lane: Callable[[RouterWorker], Lane]
) -> None:
    """However often its quarantine would have been over by then."""
    router = twins.router(deterministic=True, **EAGER)
    right = router.forward(LAYER, x)
    twins.workers["w0"].stop()
    lanes = [router._own_lane, another_lane(router)]
    pending = router.begin(LAYER, x)
    let_time_out(pending, "w0")
    assert torch.equal(router.finish(pending), right)
    for _ in range(50):
        for lane in lanes:
            assert torch.equal(lane.finish(lane.begin(LAYER, x)), right)
    assert [timeouts(lane) for lane in lanes] == [1, 0]
    assert lanes[1].client.counters.faults[Fault.LOST] == 0


def test_a_worker_that_goes_on_is_used_again(twins: Pool, x: torch.Tensor) -> None:
    router, stopped = twins.router(deterministic=True), twins.workers["w0"]
    stopped.stop()
    pending = router.begin(LAYER, x)
    let_time_out(pending, "w0")
    right = router.finish(pending)
    generation = twins.board.generation
    stopped.resume()
    assert twins.board.wait_newer(generation, 60.0)  # the probe was answered
    num_batches = stopped.counters.batches
    assert torch.equal(router.forward(LAYER, x), right)
    assert stopped.counters.batches > num_batches


def test_all_hops_under_way_at_a_worker_that_hangs_are_due_together(
    twins: Pool, x: torch.Tensor
) -> None:
    """Three micro-batches, one wait: the time of each began when it was sent."""
    router = twins.router(deterministic=True, hop_timeout_s=60.0, hop_timeout_cold_s=60.0)
    right = router.forward(LAYER, x)
    twins.workers["w0"].stop()
    pending = [router.begin(LAYER, x) for _ in range(3)]
    hops = [hop for p in pending for hop in hops_to(p, "w0")]
    assert [hop.due_s for hop in hops] == pytest.approx([hop.sent_s + 60.0 for hop in hops])
    for p in pending:
        let_time_out(p, "w0")
    assert all(torch.equal(router.finish(p), right) for p in pending)
    assert timeouts(router._own_lane) == len(hops) == 3


def test_the_only_holder_hangs_and_goes_on(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    x: torch.Tensor,
    another_lane: Callable[[RouterWorker], Lane],
) -> None:
    """One lane waits for its answer, the other does not send and waits for a sign of life."""
    pool = new_pool(checkpoint, spread(checkpoint, 1), socket_folder)
    router = pool.router(deterministic=True)
    right = router.forward(LAYER, x)
    pool.workers["w0"].stop()
    first, second = router._own_lane, another_lane(router)
    pending = first.begin(LAYER, x)
    let_time_out(pending, "w0")
    first.client.gather(hops_to(pending, "w0"))
    other = second.begin(LAYER, x)
    assert other.exchanges[0].open == []
    pool.workers["w0"].resume()
    assert torch.equal(second.finish(other), right)
    assert torch.equal(first.finish(pending), right)


@pytest.mark.parametrize("listed", [True, False])
def test_a_newer_snapshot_ends_the_wait_for_the_only_holder(
    listed: bool, new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path, x: torch.Tensor
) -> None:
    """Dropped from the snapshot, or late already and another holder is there: no further wait."""
    pool = new_pool(checkpoint, spread(checkpoint, 1), socket_folder)
    router = pool.router(deterministic=True)
    right = router.forward(LAYER, x)
    pool.workers["w0"].stop()
    pending = router.begin(LAYER, x)
    for item in pending.exchanges[0].open:
        item.hop.late = listed
    pool.add("new", set(every_expert(checkpoint)))
    thread = threading.Thread(target=pool.publish if listed else lambda: pool.forget("w0"))
    thread.start()
    assert torch.equal(router.finish(pending), right)
    thread.join()


def test_a_hop_that_is_not_late_ignores_news_of_others(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path, x: torch.Tensor
) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 1), socket_folder)
    router = pool.router(deterministic=True)
    pool.workers["w0"].stop()
    pending = router.begin(LAYER, x)
    pool.add("new", set(every_expert(checkpoint)))
    pool.publish()
    threading.Timer(0.1, pool.workers["w0"].resume).start()
    router.finish(pending)
    assert pool.workers["new"].counters.batches == 0
    assert router._own_lane.counters.resent_pairs == 0


def test_a_worker_that_does_not_accept_costs_one_timeout(
    twins: Pool, socket_folder: Path, checkpoint: Checkpoint, x: torch.Tensor
) -> None:
    """A stopped process to which nobody was connected: the handshake is not answered."""
    router = twins.router(deterministic=True, **EAGER)
    right = router.forward(LAYER, x)
    client = router._own_lane.client
    client._connect_timeout_s = 0.05  # the others are connected
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{socket_folder}/deaf")
        listener.listen()
        twins.claims["deaf"] = set(every_expert(checkpoint))
        twins._endpoints["deaf"] = f"unix:{socket_folder}/deaf"
        for name in ("w0", "w1"):  # pairs that it alone holds go there first
            twins.claims[name] = {key for key in twins.claims[name] if key[1] % 2}
        twins.publish()
        pending = router.begin(LAYER, x)
        for name in ("w0", "w1"):
            twins.claims[name] = set(every_expert(checkpoint))
        twins.publish()
        assert torch.equal(router.finish(pending), right)
        for _ in range(20):
            assert torch.equal(router.forward(LAYER, x), right)
        assert client.counters.faults[Fault.LOST] == 1
        assert client.health.quarantine.is_suspended("deaf")
