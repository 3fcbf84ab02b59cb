"""A router on a device: the answers of one on the host, over pools of host and device workers.

On the twins' device, the CPU, every row counts as one that lies on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.channel.channel import Connection
from experts.channel.codec import HEADER_BYTES
from experts.channel.frame import Frame, Kind, reply_to
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from experts.hop import Fault
from router.batcher import MicroBatch
from router.client import RouterClient
from router.device_compute import DeviceCompute, places_by_pair, places_by_row
from router.errors import NonFiniteInput
from tests.reference import Reference
from tests.router.pool import SECRET, NewPool, Pool, every_expert, expected, some_rows, spread
from tests.router.test_storm import Routers

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
INTERPRETER = ComputeDevice(torch.device("cpu"), torch.float32, "triton", "test")
LAYER = 2
Folder = Callable[[str], Path]


@pytest.fixture
def checkpoint(checkpoint_dir: Folder) -> Checkpoint:
    return Checkpoint.open(checkpoint_dir("v2-lite"))


@pytest.fixture
def new_pool() -> Iterator[NewPool]:
    """Makes pools that are closed at the end of the test."""
    with ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Pool:
            pool = Pool(*args, **kwargs)
            stack.callback(pool.close)
            return pool

        yield make


@pytest.fixture
def socket_folder(tmp_path: Path) -> Path:
    """Where unix sockets may lie: nobody else can write there."""
    tmp_path.chmod(0o700)
    return tmp_path


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    return float((got.float() - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "v3fp8"])
def test_equals_one_expert_at_a_time(
    preset: str, deterministic: bool, new_pool: NewPool, checkpoint_dir: Folder
) -> None:
    """On two workers of the host and one of the device; in chunks of at most 7 rows, and none."""
    folder = checkpoint_dir(preset)
    checkpoint = Checkpoint.open(folder)
    pool = new_pool(checkpoint, spread(checkpoint, 3, replicas=2), devices={"w1": TWINS})
    router = pool.router(TWINS, deterministic=deterministic, max_batch_rows=7)
    assert router.accepts_device
    layer = checkpoint.config.moe_layers[-1]
    x = some_rows(20, checkpoint)
    y, want = router.forward(layer, x), expected(Reference(folder), layer, x)
    assert y.dtype == torch.float32
    assert close(y, want, 1e-5)
    assert router.forward(layer, x[:0]).shape == (0, checkpoint.config.hidden_size)


def test_deterministic_bits_do_not_depend_on_batch_and_placement(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    x, answers = some_rows(33, checkpoint), []
    for num_workers in (1, 3):
        devices = {f"w{i}": TWINS for i in range(num_workers)}
        pool = new_pool(checkpoint, spread(checkpoint, num_workers), devices=devices)
        for max_rows in (512, 5):
            router = pool.router(TWINS, deterministic=True, max_batch_rows=max_rows)
            answers.append(router.forward(LAYER, x))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_workers_of_both_kinds_answer_alike(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    """Replicas of the same experts on the host and on a device, rows in bfloat16 all the way."""
    everything = set(every_expert(checkpoint))
    device = ComputeDevice(torch.device("cpu"), torch.bfloat16, "torch", "test")
    pool = new_pool(checkpoint, {"host": everything, "gpu": everything}, devices={"gpu": device})
    x, router = some_rows(12, checkpoint).bfloat16(), pool.router()
    want = expected(Reference(checkpoint.folder), LAYER, x.float())
    for _ in range(2):
        assert close(router.forward(LAYER, x), want, 2e-2)
    alone = {}
    for gone, left in (("gpu", "host"), ("host", "gpu")):
        claims, pool.claims[gone] = pool.claims[gone], set()
        pool.publish()
        alone[left] = router.forward(LAYER, x)
        pool.claims[gone] = claims
    assert close(alone["gpu"], alone["host"], 2e-2)
    assert all(pool.workers[name].counters.batches for name in ("host", "gpu"))
    assert not torch.equal(alone["gpu"], alone["host"])  # each did compute


@pytest.mark.parametrize("where", [None, TWINS], ids=["host", "device"])
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_rows_travel_in_the_dtype_they_came_in(
    where: ComputeDevice | None,
    dtype: torch.dtype,
    itemsize: int,
    new_pool: NewPool,
    checkpoint: Checkpoint,
    socket_folder: Path,
) -> None:
    """There and back: one row a visit, 12 bytes a pair there, one header a frame."""
    pool = new_pool(checkpoint, spread(checkpoint, 3), socket_folder)
    router = pool.router(where)
    router.forward(LAYER, some_rows(10, checkpoint).to(dtype))
    counters, workers = router.counters[0], list(pool.workers.values())
    pool.close()  # joins the servers' threads: they count what they sent after sending
    frames = sum(worker.counters.batches for worker in workers)
    row_bytes = itemsize * checkpoint.config.hidden_size * counters.visits
    received = sum(worker.channel_counters.bytes_in for worker in workers)
    sent = sum(worker.channel_counters.bytes_out for worker in workers)
    assert received == frames * HEADER_BYTES + 12 * counters.pairs + row_bytes
    assert sent == frames * HEADER_BYTES + row_bytes


def test_bfloat16_through_a_deployed_router(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 2), socket_folder, devices={"w0": TWINS})
    routers = Routers(pool, socket_folder, deterministic=False, device=TWINS)
    routers.add()
    client = RouterClient(routers.board, SECRET)
    x = some_rows(6, checkpoint).bfloat16()
    y = client.forward(LAYER, x)
    client.close()
    assert y.dtype == torch.bfloat16
    assert close(y, expected(Reference(checkpoint.folder), LAYER, x.float()), 1e-2)
    ((router, _),) = routers._running.values()
    row_bytes = 2 * 6 * checkpoint.config.hidden_size
    assert router.channel_counters.bytes_in == HEADER_BYTES + row_bytes


def test_dtypes_that_wait_together_are_not_mixed(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    """A float32 row must not be rounded because of its neighbour, nor a bfloat16 row gain bits:
    fp8 rows visit the experts as bfloat16."""
    router, x = new_pool(checkpoint, spread(checkpoint, 2)).router(), some_rows(3, checkpoint)
    answers: dict[int, Frame] = {}

    class Recorder:
        def post(self, frame: Frame) -> None:
            answers[frame.request_id] = frame

    dtypes = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float32]
    items = [
        MicroBatch(frame, frame.rows, Recorder())  # type: ignore[arg-type]
        for frame in (
            Frame(Kind.ROUTE_BATCH, request_id=i, layer=LAYER, rows=x.to(dtype))
            for i, dtype in enumerate(dtypes)
        )
    ]
    router._serve(router._own_lane, items)
    for i, dtype in enumerate(dtypes):
        sent = x.to(dtype)
        alone = router.forward(LAYER, sent.bfloat16() if sent.itemsize == 1 else sent)
        rows = answers[i].rows
        assert rows is not None
        assert rows.dtype == dtype
        assert close(rows.float(), alone.to(dtype).float(), 1e-6)


def test_a_row_that_is_not_finite_is_named(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 2)).router(TWINS)
    x = some_rows(4, checkpoint).bfloat16()
    router.forward(LAYER, x)
    x[2, 7] = torch.nan
    with pytest.raises(NonFiniteInput, match="row 2"):
        router.forward(LAYER, x)


def test_rows_of_a_lost_worker_are_picked_again(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pool = new_pool(checkpoint, spread(checkpoint, 3, replicas=2), devices={"w2": TWINS})
    router, x = pool.router(TWINS), some_rows(9, checkpoint)
    want = expected(Reference(checkpoint.folder), LAYER, x)
    pool.kill("w1")  # the board still names it
    assert close(router.forward(LAYER, x), want, 1e-5)
    assert router.counters[0].resent_pairs > 0


def test_rows_that_lack_an_expert_are_renormalised(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    held = {"w0": {key for key in every_expert(checkpoint) if key[1] != 3}}
    pool, x = new_pool(checkpoint, held), some_rows(24, checkpoint)
    for deterministic in (False, True):
        settings = {"on_unavailable": "renormalise", "expert_wait_s": 0.0}
        host, device = (
            pool.router(where, deterministic=deterministic, **settings) for where in (None, TWINS)
        )
        want = host.forward(LAYER, x)
        assert close(device.forward(LAYER, x), want, 1e-5)
        assert device.num_renormalised == host.num_renormalised > 0


def test_rows_of_the_host_go_from_where_they_are(
    new_pool: NewPool, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A served router on a GPU: only the gate's copy goes up, nothing is packed or summed there."""
    monkeypatch.setattr(DeviceCompute, "_is_here", lambda self, x: False)
    router, x = new_pool(checkpoint, spread(checkpoint, 1)).router(TWINS), some_rows(5, checkpoint)
    ops = replace(router._compute._ops, pack_rows=None, combine_rows=None)  # type: ignore[attr-defined, arg-type]
    monkeypatch.setattr(router._compute, "_ops", ops)
    pending = router.begin(LAYER, x)
    assert [item.hop.frame.rows is x for item in pending.exchanges[0].open] == [True]
    assert close(router.finish(pending), expected(Reference(checkpoint.folder), LAYER, x), 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_bfloat16_answer_that_is_not_finite_is_asked_of_another(
    bad: float, new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    def spoil(frame: Frame, _connection: Connection) -> Frame:
        assert frame.rows is not None
        rows = frame.rows.clone()
        rows[-1, -1] = bad
        return reply_to(frame, rows)

    everything = set(every_expert(checkpoint))
    pool = new_pool(checkpoint, {"w1": everything})
    pool.add_impostor("w0", everything, spoil)
    pool.publish()
    router, x = pool.router(TWINS), some_rows(4, checkpoint).bfloat16()
    want = expected(Reference(checkpoint.folder), LAYER, x.float())
    assert close(router.forward(LAYER, x), want, 1e-2)
    assert router._own_lane.client.counters.faults[Fault.NOT_FINITE] == 1


def test_warm_up_meets_both_ways_of_the_gate(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The splits of up to 512 rows are programs of their own, those of more are not."""
    compute, seen = DeviceCompute.open(checkpoint, TWINS), []
    gate_logits = compute._ops.gate_logits

    def note(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return gate_logits(x, weight)

    monkeypatch.setattr(compute, "_ops", replace(compute._ops, gate_logits=note))
    monkeypatch.setattr(ComputeDevice, "is_cuda", True)
    compute.warm_up()
    assert min(seen) <= 512 < max(seen)


def test_places_of_the_answers_by_hand() -> None:
    """Row 1 is answered by nobody, row 2 by both; of four pairs the second is missing."""
    first, second = torch.zeros(2, 4), torch.zeros(1, 4)
    by_row = [(np.array([0, 2]), first), (np.array([2]), second)]
    assert places_by_row(3, 2, by_row).tolist() == [[0, -1], [-1, -1], [1, 2]]
    by_pair = [(np.array([0, 3]), first), (np.array([2]), second)]
    assert places_by_pair(2, 2, by_pair).tolist() == [[0, -1], [2, 1]]


def test_the_kernels_themselves(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    pytest.importorskip("triton")
    pool, x = new_pool(checkpoint, spread(checkpoint, 2)), some_rows(5, checkpoint)
    want = pool.router().forward(LAYER, x)
    router = pool.router(INTERPRETER)
    assert isinstance(router._compute, DeviceCompute)
    assert close(router.forward(LAYER, x), want, 1e-5)
