"""Rows that stay on the device where a connection takes them. The device is played by the CPU."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from experts.channel.channel import Connection
from experts.channel.frame import FINITE, Frame, Kind, Status, reply_to
from experts.channel.tensors import rows_finite
from experts.checkpoint import Checkpoint
from experts.client import ExpertClient
from experts.health import HopTimer, Quarantine, WorkerHealth
from experts.hop import Fault, Hop, check_reply
from router.config import RouterConfig
from router.errors import NonFiniteInput
from router.gate import GateSpec, choose
from router.lane import Lane
from router.weights import load_device_gates, load_gates
from tests.reference import Reference
from tests.router.played_device import (
    TWINS,
    OnDevice,
    PlayedCompute,
    PlayedConnection,
    to_device,
    to_host,
)
from tests.router.pool import SECRET, NewPool, Pool, every_expert, expected, some_rows, spread

LAYER = 2


class Route:
    """A lane over a pool, with the books of its device and of its connections."""

    def __init__(self, pool: Pool, **settings: Any) -> None:
        gates = load_device_gates(pool.checkpoint, TWINS)
        self.compute = PlayedCompute(gates, GateSpec.of(pool.checkpoint.config))
        timer = HopTimer(60.0, 8.0, 60.0)
        health = WorkerHealth(Quarantine(0.2, 5.0), timer)
        self.client = ExpertClient(pool.board, SECRET, health, connect_timeout_s=60.0)
        config = RouterConfig(deadline_s=60.0, **settings)
        self.lane = Lane(self.compute, self.client, pool.board, config)

    def forward(self, x: Tensor) -> Tensor:
        """x on the host; its answer comes back there too."""
        y = self.lane.finish(self.lane.begin(LAYER, to_device(x)))
        assert isinstance(y, OnDevice)
        return to_host(y)

    def play(self, *worker_ids: str) -> list[PlayedConnection]:
        """From now on the connections to these take rows on the device."""
        lines = [self.client._lines[worker_id] for worker_id in worker_ids]
        played = [PlayedConnection(line.connection) for line in lines]
        for line, connection in zip(lines, played, strict=True):
            line.connection = connection
        return played

    def moved(self) -> tuple[list[int], list[int]]:
        """Rows of each copy since the last call, to the host and to the device."""
        return self.compute.staging.take(self.compute.width)


@pytest.fixture
def new_route() -> Iterator[Callable[..., Route]]:
    routes: list[Route] = []

    def make(*args: Any, **settings: Any) -> Route:
        routes.append(Route(*args, **settings))
        return routes[-1]

    yield make
    for route in routes:
        route.client.close()


@pytest.fixture
def pool(new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path) -> Pool:
    """Three workers over unix sockets; each expert has two holders."""
    return new_pool(checkpoint, spread(checkpoint, 3, replicas=2), socket_folder)


@pytest.fixture
def x(checkpoint: Checkpoint) -> Tensor:
    return some_rows(9, checkpoint)


@pytest.fixture
def want(x: Tensor, checkpoint: Checkpoint) -> Tensor:
    return expected(Reference(checkpoint.folder), LAYER, x)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("playing", [(), ("w1",), ("w0", "w2"), ("w0", "w1", "w2")])
def test_only_rows_for_the_others_are_staged(
    playing: tuple[str, ...], deterministic: bool, pool: Pool, x: Tensor, want: Tensor,
    new_route: Callable[..., Route],
) -> None:  # fmt: skip
    """One pass picks for all, one copy brings down what goes by the host; answers of one worker by
    the device and of another by the host are summed; the bits are those of the host's way."""
    route = new_route(pool, deterministic=deterministic)
    by_host = route.forward(x)  # opens the connections
    route.play(*playing)
    route.moved()
    route.compute.num_packs = 0
    pending = route.lane.begin(LAYER, to_device(x))
    hops = [item.hop for item in pending.exchanges[0].open]
    assert {hop.worker_id for hop in hops} == {"w0", "w1", "w2"}
    for hop in hops:
        assert isinstance(hop.frame.rows, OnDevice) == (hop.worker_id in playing)
        assert hop.frame.rows is not None and hop.frame.rows.is_contiguous()
    staged = [hop for hop in hops if hop.worker_id not in playing]
    y = to_host(route.lane.finish(pending))
    down, up = route.moved()
    assert down == ([sum(hop.num_rows for hop in staged)] if staged else [])
    assert sorted(up) == sorted(hop.reply_shape[0] for hop in staged)
    assert route.compute.num_packs == 1
    assert torch.equal(y, by_host)
    assert near(y, want)


def test_the_first_batch_goes_by_the_host_and_opens_the_connections(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    route = new_route(pool)
    assert not route.client.takes_device_rows("w0")
    assert near(route.forward(x), want)
    assert route.moved()[0] == [route.lane.counters.visits]
    assert not route.client.takes_device_rows("w0")  # a unix socket
    route.play("w0")
    assert route.client.takes_device_rows("w0")


def test_rows_of_the_host_are_not_asked_about(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    """A served router: what came to the host goes from there, on any connection."""
    route = new_route(pool)
    route.forward(x)
    (played,) = route.play("w1")
    route.moved()
    route.compute.num_packs = 0
    y = route.lane.finish(route.lane.begin(LAYER, x))
    assert route.compute.num_packs == 0
    assert [rows.is_cpu for rows in played.sent] == [True]
    assert y.is_cpu and near(y, want)


def test_rows_of_a_lost_worker_are_staged_for_the_next(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    route = new_route(pool)
    route.forward(x)
    (played,) = route.play("w1")
    route.moved()
    pool.kill("w1")
    assert near(route.forward(x), want)
    assert route.client.counters.faults[Fault.LOST] == 1
    assert route.lane.counters.resent_pairs > 0
    assert all(isinstance(rows, OnDevice) for rows in played.sent)
    down, _ = route.moved()  # w0 and w2 at first, then what w1 should have done
    assert len(down) == 2


def test_rows_of_a_worker_that_hangs_are_staged_for_another(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    """Others compute its rows; the probe, which has a connection of its own, finds it alive."""
    route = new_route(pool)
    route.forward(x)
    route.play("w1")
    route.moved()
    pool.workers["w1"].stop()
    pending = route.lane.begin(LAYER, to_device(x))
    (hop,) = (item.hop for item in pending.exchanges[0].open if item.hop.worker_id == "w1")
    hop.due_s = 0.0
    assert near(to_host(route.lane.finish(pending)), want)
    assert route.client.counters.faults[Fault.TIMEOUT] == 1
    assert len(route.moved()[0]) == 2
    quarantine = route.lane._health.quarantine
    assert quarantine.is_suspended("w1")
    seen = pool.board.generation
    pool.workers["w1"].resume()
    assert pool.board.wait_newer(seen, 60.0)
    assert not len(quarantine)  # absolved, not punished


def test_a_connection_that_replaces_another_may_not_take_them(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    route = new_route(pool)
    route.forward(x)
    (played,) = route.play("w1")
    line = route.client._lines["w1"]
    line.hung = True  # the next batch reconnects, after its rows were picked
    pending = route.lane.begin(LAYER, to_device(x))
    (hop,) = (item.hop for item in pending.exchanges[0].open if item.hop.worker_id == "w1")
    assert played.closed and not played.sent
    assert hop.frame.rows is not None and hop.frame.rows.is_cpu
    assert near(to_host(route.lane.finish(pending)), want)
    assert not any(route.client.counters.faults.values())


def test_rows_under_way_are_not_overwritten_by_the_next_batch(
    pool: Pool, x: Tensor, want: Tensor, new_route: Callable[..., Route]
) -> None:
    route = new_route(pool)
    route.forward(x)
    route.play("w0", "w1", "w2")
    first = route.lane.begin(LAYER, to_device(x))
    items = first.exchanges[0].open
    sent = [to_host(x)[item.row_index] for item in items]
    second = route.lane.begin(LAYER, to_device(-2 * x))
    for item, rows in zip(items, sent, strict=True):
        assert item.hop.frame.rows is not None
        assert torch.equal(to_host(item.hop.frame.rows), rows)
    route.lane.finish(second)
    assert near(to_host(route.lane.finish(first)), want)


def test_answers_are_let_go_once_they_are_summed(
    pool: Pool, x: Tensor, new_route: Callable[..., Route]
) -> None:
    """They may be views of a ring, and the caller may keep what `begin` gave it."""
    route = new_route(pool)
    route.forward(x)
    received: list[weakref.ref[Tensor]] = []
    for played in route.play("w0", "w1", "w2"):
        receive = played.receive

        def note(timeout_s: float | None = None, receive: Any = receive) -> Frame:
            frame: Frame = receive(timeout_s)
            assert frame.rows is not None
            received.append(weakref.ref(frame.rows))
            return frame

        played.receive = note  # type: ignore[method-assign]
    gc.disable()  # only counting references
    try:
        pending = route.lane.begin(LAYER, to_device(x))
        route.lane.finish(pending)
        assert [ref() for ref in received] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_one_bad_number_on_the_device_spoils_an_answer(dtype: torch.dtype) -> None:
    pairs = torch.zeros(3, dtype=torch.int32)
    frame = Frame(
        Kind.EXPERT_BATCH, layer=LAYER, rows=to_device(torch.ones(3, 5).to(dtype)),
        row_ids=pairs, expert_ids=pairs, weights=pairs.float(),
    )  # fmt: skip
    hop = Hop("w0", frame, 0.0)
    assert hop.on_device
    good = torch.full((3, 5), -1.5).to(dtype)
    assert check_reply(hop, reply_to(frame, to_device(good))) is None
    assert rows_finite(to_device(good)[:0])
    for bad in (torch.nan, -torch.nan) + (() if dtype.itemsize == 1 else (torch.inf, -torch.inf)):
        broken = good.float()
        broken[2, 4] = bad
        answer = reply_to(frame, to_device(broken.to(dtype)))
        assert check_reply(hop, answer) is Fault.NOT_FINITE
    answer.flags |= FINITE  # its worker has looked: not even a look, which would wait
    assert check_reply(hop, answer) is None


@pytest.mark.parametrize("has_looked", [False, True])
def test_a_bad_answer_on_the_device_is_asked_of_another(
    has_looked: bool, pool: Pool, checkpoint: Checkpoint, x: Tensor, want: Tensor,
    new_route: Callable[..., Route],
) -> None:  # fmt: skip
    """Whether the worker has seen it or the router does."""
    spoilt = False

    def spoil(frame: Frame, _connection: Connection) -> Frame:
        rows = torch.zeros(9, x.shape[1]) if frame.rows is None else frame.rows * 0
        if spoilt and has_looked:
            return reply_to(frame, status=Status.FAILED, text="the answer is not finite")
        return reply_to(frame, rows / 0 if spoilt else rows)

    pool.add_impostor("w3", set(every_expert(checkpoint)), spoil)
    pool.publish()
    route = new_route(pool)
    route.forward(x)
    (played,) = route.play("w3")
    spoilt = True
    assert near(route.forward(x), want)
    assert isinstance(played.sent[0], OnDevice)
    fault = Fault.FAILED if has_looked else Fault.NOT_FINITE
    assert route.client.counters.faults[fault] == 1


def test_what_a_gate_chose_comes_down_in_one_copy(
    pool: Pool, x: Tensor, new_route: Callable[..., Route]
) -> None:
    """ids and weights, and the first bad row: 2 T k + 1 numbers."""
    compute = new_route(pool).compute
    ids, weights = compute.choose(LAYER, to_device(x))
    gates = load_gates(pool.checkpoint)
    want_ids, want_weights = choose(x, gates[LAYER], compute.spec)
    assert ids.dtype == np.int64 and weights.dtype == np.float32
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-5)
    assert compute.staging.down == [(2 * ids.size + 1,)]
    bad = x.clone()
    bad[4, 0] = torch.nan
    with pytest.raises(NonFiniteInput, match="row 4"):
        compute.choose(LAYER, to_device(bad))
