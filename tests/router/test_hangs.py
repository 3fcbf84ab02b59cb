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
from experts.hop import Fault
from router.lane import Lane
from router.worker import RouterWorker
from tests.router.pool import NewPool, Pool, every_expert, some_rows, spread

LAYER = 2
BRIEF = {"deterministic": True, "hop_timeout_s": 0.05, "hop_timeout_cold_s": 0.05}
PATIENT = {"deterministic": True, "hop_timeout_s": 1000.0, "hop_timeout_cold_s": 1000.0}


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


def test_a_worker_that_hangs_costs_all_lanes_together_one_timeout(
    twins: Pool, x: torch.Tensor, another_lane: Callable[[RouterWorker], Lane]
) -> None:
    """However often its quarantine would have been over by then."""
    router = twins.router(**BRIEF, quarantine_base_s=1e-6, quarantine_max_s=1e-6)
    right = router.forward(LAYER, x)
    twins.workers["w0"].stop()
    lanes = [router._own_lane, another_lane(router)]
    for _ in range(50):
        for lane in lanes:
            assert torch.equal(lane.finish(lane.begin(LAYER, x)), right)
    assert [timeouts(lane) for lane in lanes] == [1, 0]
    assert lanes[1].client.counters.faults[Fault.LOST] == 0


def test_a_worker_that_goes_on_is_used_again(twins: Pool, x: torch.Tensor) -> None:
    router, stopped = twins.router(**BRIEF), twins.workers["w0"]
    stopped.stop()
    right = router.forward(LAYER, x)
    generation = twins.board.generation
    stopped.resume()
    assert twins.board.wait_newer(generation, 20.0)  # the probe was answered
    num_batches = stopped.counters.batches
    assert torch.equal(router.forward(LAYER, x), right)
    assert stopped.counters.batches > num_batches


def test_all_hops_under_way_at_a_worker_that_hangs_are_due_together(
    twins: Pool, x: torch.Tensor
) -> None:
    """Three micro-batches, one wait."""
    router = twins.router(**BRIEF | {"hop_timeout_cold_s": 0.5})
    right = router.forward(LAYER, x)
    twins.workers["w0"].stop()
    pending = [router.begin(LAYER, x) for _ in range(3)]
    clock = router._own_lane.client.health.clock
    begun_s = clock()
    assert all(torch.equal(router.finish(p), right) for p in pending)
    assert clock() - begun_s < 1.0


def test_the_only_holder_hangs_and_goes_on(
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
    x: torch.Tensor,
    another_lane: Callable[[RouterWorker], Lane],
) -> None:
    """One lane waits for its answer, the other does not send and waits for a sign of life."""
    pool = new_pool(checkpoint, spread(checkpoint, 1), socket_folder)
    router = pool.router(**BRIEF)
    right = router.forward(LAYER, x)
    pool.workers["w0"].stop()
    first, second = router._own_lane, another_lane(router)
    pending = first.begin(LAYER, x)
    first.client.gather([item.hop for item in pending.exchanges[0].open])
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
    right = pool.router(**BRIEF).forward(LAYER, x)
    router = pool.router(**PATIENT)
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
    router = pool.router(**PATIENT)
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
    router = twins.router(**BRIEF, quarantine_base_s=1e-6, quarantine_max_s=1e-6)
    right = router.forward(LAYER, x)
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
        client = router._own_lane.client
        assert client.counters.faults[Fault.LOST] == 1
        assert client.health.quarantine.is_suspended("deaf")
