"""Workers die, hang, refuse, lie or lack an expert: the answer stays right, the wait bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.channel.channel import Connection
from experts.channel.frame import Frame, Status, reply_to
from experts.checkpoint import Checkpoint
from router.errors import ExpertsFailed, ExpertsUnavailable
from router.worker import RouterWorker
from tests.router.pool import NewPool, Pool, every_expert, some_rows, spread

LAYER = 2


def healthy_result(pool: Pool, x: torch.Tensor) -> torch.Tensor:
    return pool.router(deterministic=True).forward(LAYER, x)


@pytest.mark.parametrize("scheme", ["inproc", "unix"])
def test_a_dead_worker_with_replicas_changes_nothing(
    scheme: str, new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    held = spread(checkpoint, 3, replicas=2)
    pool = new_pool(checkpoint, held, socket_folder if scheme == "unix" else None)
    router = pool.router(deterministic=True)
    x = some_rows(16, checkpoint)
    before = router.forward(LAYER, x)
    pool.kill("w1")
    assert torch.equal(router.forward(LAYER, x), before)


def test_a_worker_that_dies_in_the_middle_of_an_exchange(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    """It reads the batch, then its connection ends without an answer."""

    def die(frame: Frame, connection: Connection) -> None:
        connection.close()

    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"b": everything}, socket_folder)
    x = some_rows(8, checkpoint)
    right = healthy_result(pool, x)
    pool.add_impostor("a", everything, die)
    pool.publish()
    router = pool.router(deterministic=True)
    assert all(torch.equal(router.forward(LAYER, x), right) for _ in range(3))
    assert sum(c.resent_pairs for c in router.counters) > 0


@pytest.mark.parametrize(
    "status", [Status.OVERLOADED, Status.DRAINING, Status.DEADLINE, Status.FAILED]
)
def test_pairs_of_a_worker_that_refuses_go_to_another(
    status: Status, new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"b": everything})
    x = some_rows(8, checkpoint)
    right = healthy_result(pool, x)
    pool.add_impostor("a", everything, lambda frame, _: reply_to(frame, status=status, text="no"))
    pool.publish()
    assert torch.equal(pool.router(deterministic=True).forward(LAYER, x), right)


def wrong_shape(frame: Frame, _: Connection) -> Frame:
    return reply_to(frame, torch.zeros(1, 3))


def wrong_layer(frame: Frame, _: Connection) -> Frame:
    reply = reply_to(frame, frame.rows)
    reply.layer += 1
    return reply


def wrong_dtype(frame: Frame, _: Connection) -> Frame:
    assert frame.rows is not None
    return reply_to(frame, frame.rows.bfloat16())


def infinite(frame: Frame, _: Connection) -> Frame:
    assert frame.rows is not None
    assert frame.expert_ids is not None
    return reply_to(frame, torch.full((len(frame.expert_ids), frame.rows.shape[1]), torch.inf))


@pytest.mark.parametrize("answer", [wrong_shape, wrong_layer, wrong_dtype, infinite])
def test_answers_that_cannot_be_right_are_not_used(
    answer: Callable[[Frame, Connection], Frame],
    new_pool: NewPool,
    checkpoint: Checkpoint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"b": everything})
    x = some_rows(8, checkpoint)
    right = healthy_result(pool, x)
    pool.add_impostor("a", everything, answer)
    pool.publish()
    router = pool.router(deterministic=True)
    assert torch.equal(router.forward(LAYER, x), right)
    health = router._own_lane.client.health
    assert len(health.quarantine) == 1  # proven: another holder could
    (told,) = caplog.messages
    why = "answer is not finite" if answer is infinite else "answer broke the protocol"
    assert told.startswith(f"expert worker a is left alone: {why}")


def test_when_every_holder_fails_the_error_says_so_at_once(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    """The rows or the weights are at fault, not the worker: it is not put in quarantine."""
    pool = new_pool(checkpoint, {})
    everything = set(every_expert(checkpoint))
    pool.add_impostor(
        "a", everything, lambda frame, _: reply_to(frame, status=Status.FAILED, text="out of luck")
    )
    pool.publish()
    router = pool.router()
    with pytest.raises(ExpertsFailed, match="out of luck") as caught:
        router.forward(LAYER, some_rows(1, checkpoint))
    assert caught.value.layer == LAYER
    assert len(router._own_lane.client.health.quarantine) == 0


def test_a_stale_table_sends_to_the_other_holder(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    """Worker a claims all experts and holds none of this layer: NOT_HERE, then worker b."""
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"a": everything, "b": everything})
    x = some_rows(8, checkpoint)
    right = healthy_result(pool, x)
    pool.workers["a"].unload([key for key in everything if key[0] == LAYER])
    assert torch.equal(pool.router(deterministic=True).forward(LAYER, x), right)
    assert pool.workers["a"].counters.not_here == 1


def in_thread(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


def test_without_holder_it_waits_for_a_snapshot_that_has_one(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"a": everything})
    x = some_rows(4, checkpoint)
    right = healthy_result(pool, x)
    some = {key for key in everything if key[1] % 2}
    pool.claims["a"] = some
    pool.publish()
    router = pool.router(deterministic=True)
    pending = router.begin(LAYER, x)  # the other half of the pairs is with nobody
    pool.add("b", everything - some)
    thread = in_thread(pool.publish)
    assert torch.equal(router.finish(pending), right)
    thread.join()


def test_not_here_with_one_holder_waits_for_the_next_snapshot(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"a": everything})
    x = some_rows(4, checkpoint)
    right = healthy_result(pool, x)
    pool.workers["a"].unload([key for key in everything if key[0] == LAYER])
    router = pool.router(deterministic=True, stale_table_retry_s=1000.0)
    pending = router.begin(LAYER, x)
    pool.add("b", everything)
    thread = in_thread(pool.publish)
    assert torch.equal(router.finish(pending), right)
    thread.join()


def test_not_here_that_no_snapshot_corrects_is_asked_again(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    """The answer came a moment before the worker had loaded the expert."""
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"a": everything})
    x = some_rows(4, checkpoint)
    right = healthy_result(pool, x)
    layer_keys = [key for key in everything if key[0] == LAYER]
    pool.workers["a"].unload(layer_keys)
    router = pool.router(deterministic=True, stale_table_retry_s=0.001)
    pending = router.begin(LAYER, x)
    pool.workers["a"].load(layer_keys)
    assert torch.equal(router.finish(pending), right)


def test_the_deadline_ends_the_wait_for_a_holder(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = new_pool(checkpoint, {"a": {(1, 0)}})
    router = pool.router(deadline_s=0.05)
    with pytest.raises(ExpertsUnavailable) as caught:
        router.forward(LAYER, some_rows(1, checkpoint))
    assert caught.value.layer == LAYER
    assert len(caught.value.experts) == 6
    assert caught.value.waited_s >= 0.05
    assert str(caught.value).startswith("layer 2, experts ")


def test_a_longer_limit_than_the_own_is_not_taken(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    router = new_pool(checkpoint, {"a": {(1, 0)}}).router(deadline_s=0.05)
    with pytest.raises(ExpertsUnavailable) as caught:
        router.forward(LAYER, some_rows(1, checkpoint), deadline_s=1000.0)
    assert 0.05 <= caught.value.waited_s < 900.0


class Clock:
    """The time of a router, of which a test can skip some."""

    def __init__(self, router: RouterWorker) -> None:
        self.skipped_s = 0.0
        lane = router._own_lane
        lane._now = lane.client._now = lambda: time.monotonic() + self.skipped_s


@pytest.mark.parametrize("dies", ["before it is dropped", "after it is dropped"])
def test_waiting_for_a_holder_is_no_busy_loop(
    dies: str, new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    """The end of a dead worker's quarantine is no reason to look again and again."""
    pool = new_pool(checkpoint, {}, socket_folder)
    pool.add_impostor("a", set(every_expert(checkpoint)), Silent())
    pool.publish()
    router = pool.router()
    clock = Clock(router)
    pending = router.begin(LAYER, some_rows(1, checkpoint))
    if dies == "before it is dropped":
        pool._servers[0].close()
    pool.forget("a")
    thread = threading.Timer(0.1, pool._servers[0].close)
    thread.start()

    def wait_newer(generation: int, timeout_s: float) -> bool:
        clock.skipped_s += timeout_s
        return False

    pool.board.wait_newer = wait_newer  # type: ignore[method-assign]
    with pytest.raises(ExpertsUnavailable):
        router.finish(pending)
    thread.join()
    assert 1 <= router._own_lane.counters.waits <= 3


def test_a_plan_that_is_thrown_away_probes_nobody(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    """Worker a is slow, b has but half of its experts and may be probed."""
    everything = set(every_expert(checkpoint))
    half = {key for key in everything if key[1] % 2}
    pool = new_pool(checkpoint, {"b": half}, socket_folder)
    pool.add_impostor("a", everything, Silent())
    pool.publish()
    router = pool.router(quarantine_base_s=1000.0, quarantine_max_s=1000.0)
    lane = router._own_lane
    quarantine, now_s = lane.client.health.quarantine, lane.client.health.clock()
    exchange = router.begin(LAYER, some_rows(8, checkpoint)).exchanges[0]
    (item,) = [item for item in exchange.open if item.hop.worker_id == "a"]
    exchange.open.remove(item)
    quarantine.punish("b", now_s - 2000.0)
    lane._hedge(exchange, item)
    assert item in exchange.open
    assert quarantine.admits("b", now_s)


def test_what_another_lane_probes_is_not_sent_too(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    pool = new_pool(checkpoint, {"a": set(every_expert(checkpoint))})
    lane = pool.router(quarantine_base_s=1000.0, quarantine_max_s=1000.0)._own_lane
    quarantine, now_s = lane.client.health.quarantine, lane.client.health.clock()
    exchange = lane.begin(LAYER, some_rows(2, checkpoint)).exchanges[0]
    exchange.open.clear()
    quarantine.punish("a", now_s - 2000.0)
    plan = lane._plan(exchange, exchange.pairs)
    assert len(plan.shares) == 1
    assert quarantine.admits("a", lane.client.health.clock())
    lane._post(exchange, plan, None)
    assert exchange.open == []
    assert exchange.todo.tolist() == list(range(12))


class Silent:
    """Reads batches and answers none until told to; a probe, of one row, never. `asked`: there is
    one that it would answer."""

    def __init__(self) -> None:
        self.held: list[tuple[Frame, Connection]] = []
        self.asked = threading.Event()

    def __call__(self, frame: Frame, connection: Connection) -> None:
        self.held.append((frame, connection))
        if frame.rows is not None and len(frame.rows) > 1:
            self.asked.set()

    def answer_all(self) -> None:
        for frame, connection in self.held:
            assert frame.expert_ids is not None
            assert frame.rows is not None
            if len(frame.rows) > 1:
                rows = torch.full((len(frame.expert_ids), frame.rows.shape[1]), 1e6)
                connection.send(reply_to(frame, rows))


@pytest.fixture
def hung(new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path) -> tuple[Pool, Silent]:
    """Worker a hangs, worker b has all experts as well."""
    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"b": everything}, socket_folder)
    silent = Silent()
    pool.add_impostor("a", everything, silent)
    pool.publish()
    return pool, silent


def test_a_worker_that_hangs_is_left_for_another_and_its_late_answer_dropped(
    hung: tuple[Pool, Silent], checkpoint: Checkpoint
) -> None:
    pool, silent = hung
    x = some_rows(8, checkpoint)
    router = pool.router(deterministic=True, hop_timeout_s=0.05, hop_timeout_cold_s=0.05)
    client = router._own_lane.client
    y = router.forward(LAYER, x)
    assert silent.asked.wait(60)
    assert client.health.quarantine.is_suspended("a")
    silent.answer_all()
    while client.counters.late_answers == 0:
        assert torch.equal(router.forward(LAYER, x), y)
    pool.forget("a")
    assert torch.equal(y, healthy_result(pool, x))


def test_a_slow_worker_without_substitute_is_waited_for(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    pool = new_pool(checkpoint, {}, socket_folder)
    silent = Silent()
    pool.add_impostor("a", set(every_expert(checkpoint)), silent)
    pool.publish()
    router = pool.router(deterministic=True, hop_timeout_s=0.001, hop_timeout_cold_s=0.001)
    pending = router.begin(LAYER, some_rows(2, checkpoint))
    assert silent.asked.wait(60)
    client = router._own_lane.client
    waits = []
    patient = client.wait_again

    def wait_again(hop: object) -> None:
        waits.append(hop)
        if len(waits) == 3:
            silent.answer_all()
        patient(hop)  # type: ignore[arg-type]

    client.wait_again = wait_again  # type: ignore[method-assign]
    assert router.finish(pending).unique().tolist() == [6e6]
    assert len(waits) >= 3


def test_the_deadline_ends_the_wait_for_a_slow_worker(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    pool = new_pool(checkpoint, {}, socket_folder)
    silent = Silent()
    pool.add_impostor("a", set(every_expert(checkpoint)), silent)
    pool.publish()
    router = pool.router(hop_timeout_s=0.01, hop_timeout_cold_s=0.01, deadline_s=1000.0)
    clock = Clock(router)
    pending = router.begin(LAYER, some_rows(2, checkpoint))
    assert silent.asked.wait(60)
    clock.skipped_s = 1000.0
    with pytest.raises(ExpertsUnavailable, match="a does not answer"):
        router.finish(pending)
