"""Experts without a holder are given up where the settings say so: numbers against a reference."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from experts.channel.frame import RENORMALISED, Frame, Kind
from experts.checkpoint import Checkpoint
from router.batcher import MicroBatch
from router.client import RouterClient
from router.combine import renormalise
from router.errors import ExpertsUnavailable
from router.gate import GateSpec, choose
from router.outage import Outage
from router.weights import load_gates
from tests.reference import Reference
from tests.router.pool import SECRET, NewPool, Pool, every_expert, some_rows
from tests.router.test_storm import Routers

LAYER = 2
GIVE_UP = {"on_unavailable": "renormalise", "expert_wait_s": 0.0}


def without(
    checkpoint: Checkpoint, x: torch.Tensor, lost: set[int], layer: int = LAYER
) -> tuple[torch.Tensor, list[int]]:
    """The layer's output for x less the lost experts, their weight given to the others; and the
    rows concerned."""
    reference = Reference(checkpoint.folder)
    ids, weights = choose(x, load_gates(checkpoint)[layer], GateSpec.of(checkpoint.config))
    y, rows = torch.zeros_like(x), []
    for t in range(x.shape[0]):
        kept = [k for k in range(ids.shape[1]) if int(ids[t, k]) not in lost]
        if len(kept) < ids.shape[1]:
            rows.append(t)
        scale = weights[t].sum() / weights[t, kept].sum() if kept else 0.0
        for k in kept:
            name = f"model.layers.{layer}.mlp.experts.{ids[t, k]}"
            y[t] += reference._mlp(name, x[t : t + 1])[0] * float(weights[t, k] * scale)
    return y, rows


def pool_without(new_pool: NewPool, checkpoint: Checkpoint, lost: set[int], **more: object) -> Pool:
    held = {key for key in every_expert(checkpoint) if key[1] not in lost}
    return new_pool(checkpoint, {"a": {k for k in held if k[1] % 2}, "b": held}, **more)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_others_weights_are_scaled(
    deterministic: bool, new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    lost = {0, 3, 4, 9}
    x = some_rows(24, checkpoint)
    y, rows = without(checkpoint, x, lost)
    assert 0 < len(rows) < 24
    router = pool_without(new_pool, checkpoint, lost).router(
        deterministic=deterministic, max_batch_rows=10, **GIVE_UP
    )
    pending = router.begin(LAYER, x)
    torch.testing.assert_close(router.finish(pending), y, rtol=1e-4, atol=1e-5)
    assert pending.renormalised == rows
    assert router.num_renormalised == len(rows)


def test_a_token_that_keeps_no_expert_gets_zeros(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    x = some_rows(1, checkpoint)
    ids, _ = choose(x, load_gates(checkpoint)[LAYER], GateSpec.of(checkpoint.config))
    router = pool_without(new_pool, checkpoint, set(ids[0].tolist())).router(**GIVE_UP)
    assert not router.forward(LAYER, x).any()
    assert router.num_renormalised == 1


def test_two_rows_by_hand() -> None:
    """Row 0 keeps 0.5 of 0.75, row 1 has all, row 2 nothing."""
    weights = np.array([0.5, 0.25, 0.25, 0.5, 0.5, 0.5], np.float32)
    rows, scales = renormalise(3, weights, np.array([4, 1, 5]))
    assert rows.tolist() == [0, 2]
    assert scales.tolist() == [1.5, 0.0]


def test_nothing_is_given_up_before_its_time(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = pool_without(new_pool, checkpoint, {3}).router(
        on_unavailable="renormalise", expert_wait_s=1000.0, deadline_s=0.05
    )
    with pytest.raises(ExpertsUnavailable):
        router.forward(LAYER, some_rows(24, checkpoint))


def test_all_layers_wait_together() -> None:
    """The second layer that lacks experts waits from when the first noticed."""
    outage = Outage()
    assert outage.since(10.0) == 10.0
    assert outage.since(12.0) == 10.0
    outage.end()
    assert outage.since(20.0) == 20.0


def test_a_full_snapshot_ends_the_outage(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = pool_without(new_pool, checkpoint, {3})
    router = pool.router(deterministic=True, **GIVE_UP)
    x = some_rows(24, checkpoint)
    router.forward(LAYER, x)
    assert router._outage._since_s is not None
    pool.add("c", {key for key in every_expert(checkpoint) if key[1] == 3})
    pool.publish()
    num_renormalised = router.num_renormalised
    whole = router.forward(LAYER, x)
    assert router._outage._since_s is None
    assert router.num_renormalised == num_renormalised
    assert torch.equal(
        whole,
        new_pool(checkpoint, {"all": set(every_expert(checkpoint))})
        .router(deterministic=True)
        .forward(LAYER, x),
    )


@pytest.mark.parametrize("successor", ["w0", "w1"], ids=["the same name", "another name"])
def test_an_outage_ends_with_the_replacement_of_the_dead_worker(
    successor: str, new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    """Or the next one, an hour later, would find its time used up."""
    everything = set(every_expert(checkpoint))
    pool, x = new_pool(checkpoint, {"w0": everything}), some_rows(4, checkpoint)
    router = pool.router(on_unavailable="renormalise", expert_wait_s=1000.0)
    right = router.forward(LAYER, x)
    pool.kill("w0")
    pending = router.begin(LAYER, x)
    pool.forget("w0", ready=False)

    def replace() -> None:
        patience = threading.Event()
        while not router._outage.lasts:
            patience.wait(0.005)
        pool.add(successor, everything)
        pool.publish()

    thread = threading.Thread(target=replace)
    thread.start()
    assert torch.equal(router.finish(pending), right)
    thread.join()
    assert not router._outage.lasts


def test_an_exchange_that_lacks_nothing_ends_the_outage(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    """Without a newer snapshot; but not while somebody is left out, or experts are missing."""
    pool, x = new_pool(checkpoint, {"a": set(every_expert(checkpoint))}), some_rows(4, checkpoint)
    router = pool.router()
    quarantine = router._own_lane.client.health.quarantine
    lasts = []
    for disturb in (lambda: pool.publish(ready=False), pool.publish):
        router._outage.since(0.0)
        disturb()
        quarantine.punish("gone", 0.0)  # such as one that failed when it had left
        router.forward(LAYER, x)
        lasts.append(router._outage.lasts)
    pool.add("b", {(LAYER, 0)})
    pool.publish()
    router.forward(LAYER, x)
    router._outage.since(0.0)
    quarantine.suspend("b", 0.0)
    router.forward(LAYER, x)
    lasts.append(router._outage.lasts)
    quarantine.absolve("b")
    router.forward(LAYER, x)
    lasts.append(router._outage.lasts)
    assert lasts == [True, False, True, False]


def test_the_end_of_an_outage_does_not_prolong_a_wait(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    """Exchanges that lack nothing may end it while one still waits for what no table tells of."""
    router = pool_without(new_pool, checkpoint, {3}).router(
        on_unavailable="renormalise", expert_wait_s=10.0
    )
    lane = router._own_lane
    exchange = router.begin(LAYER, some_rows(4, checkpoint)).exchanges[0]
    give_up_s = lane._give_up_s(exchange)
    router._outage.end()
    assert lane._give_up_s(exchange) == give_up_s


def test_a_holder_that_hangs_is_given_up(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    """What others hold of its batch is computed by them, the rest left out."""
    lost, x = {0, 3}, some_rows(24, checkpoint)
    everything = set(every_expert(checkpoint))
    held = {"a": everything, "b": {key for key in everything if key[1] not in lost}}
    pool = new_pool(checkpoint, held, socket_folder)
    pool.workers["a"].stop()
    router = pool.router(hop_timeout_s=0.05, hop_timeout_cold_s=0.05, **GIVE_UP)
    y, rows = without(checkpoint, x, lost)
    torch.testing.assert_close(router.forward(LAYER, x), y, rtol=1e-4, atol=1e-5)
    assert router.num_renormalised == len(rows)


def test_a_deployed_router_says_which_answers_lack_experts(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    pool, x = pool_without(new_pool, checkpoint, {3}), some_rows(24, checkpoint)
    _, rows = without(checkpoint, x, {3})
    routers = Routers(pool, socket_folder, **GIVE_UP)
    routers.add()
    client = RouterClient(routers.board, SECRET, "a")
    whole = [row for row in range(24) if row not in rows]
    client.forward(LAYER, x[whole])
    assert client.num_renormalised == 0
    client.forward(LAYER, x[rows[:1]])
    assert client.num_renormalised == 1
    client.close()


def test_merged_micro_batches_are_told_apart(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool, x = pool_without(new_pool, checkpoint, {3}), some_rows(24, checkpoint)
    _, rows = without(checkpoint, x, {3})
    whole = [row for row in range(24) if row not in rows]
    router, sent = pool.router(**GIVE_UP), []

    class Line:
        def post(self, reply: Frame) -> None:
            sent.append(bool(reply.flags & RENORMALISED))

    items = []
    for part in (x[whole[:2]], x[rows[:2]], x[whole[2:3]]):
        frame = Frame(Kind.ROUTE_BATCH, layer=LAYER, rows=part)
        items.append(MicroBatch(frame, part, Line()))  # type: ignore[arg-type]
    router._serve(router._own_lane, items)
    assert sent == [False, True, False]
