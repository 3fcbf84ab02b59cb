"""An expert worker on a device: the answers of one on the host, whatever comes and goes.

The twins run on CPU tensors; the same with the interpreter once, kernels have tests of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.channel.frame import FINITE, ONE_ROW_PER_PAIR, Frame, Kind, Status
from experts.checkpoint import Checkpoint
from experts.compute import PairBatch
from experts.device import ComputeDevice
from experts.device_compute import DeviceCompute, grouped_pairs
from experts.kernels.gpu.grouped_gemm import block_rows_for
from experts.kernels.gpu.permute import SortedPairs
from experts.worker import ExpertWorker, _Batch
from tests.router.played_device import to_device

TWINS = ComputeDevice(torch.device("cpu"), torch.float32, "torch", "test")
TWINS_BF16 = ComputeDevice(torch.device("cpu"), torch.bfloat16, "torch", "test")
INTERPRETER = ComputeDevice(torch.device("cpu"), torch.float32, "triton", "test")
NOBODY: Any = None
Folder = Callable[[str], Path]


def open_worker(
    folder: Path, experts: range, device: ComputeDevice | None, num_slots: int = 12
) -> ExpertWorker:
    """Holds these experts of the first MoE layer; what its slots held before is NaN."""
    checkpoint = Checkpoint.open(folder)
    worker = ExpertWorker(checkpoint, "w0", num_slots, device=device)
    if isinstance(worker._compute, DeviceCompute):
        worker._compute._slots.weights.down.fill_(torch.nan)
    worker.hold([(checkpoint.config.moe_layers[0], expert) for expert in experts])
    return worker


@pytest.fixture
def worker(checkpoint_dir: Folder) -> ExpertWorker:
    """Experts 0-7 of layer 1 of v2-lite (width 128) on the device of the twins."""
    return open_worker(checkpoint_dir("v2-lite"), range(8), TWINS)


def rows(num_rows: int, width: int = 128) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))


def request(
    x: Tensor, pairs: list[tuple[int, int, float]], layer: int = 1, flags: int = 0
) -> Frame:
    """pairs: (row, expert, weight)"""
    row_ids, experts, weights = zip(*pairs, strict=True)
    return Frame(
        Kind.EXPERT_BATCH,
        layer=layer,
        flags=flags,
        rows=x,
        row_ids=torch.tensor(row_ids, dtype=torch.int32),
        expert_ids=torch.tensor(experts, dtype=torch.int32),
        weights=torch.tensor(weights, dtype=torch.float32),
        received_s=time.monotonic(),
    )


def answer(worker: ExpertWorker, frame: Frame) -> Tensor:
    reply = worker.handle(frame, NOBODY)
    assert reply.status == Status.OK, reply.text
    assert reply.rows is not None
    return reply.rows


PAIRS = [(0, 5, 0.5), (0, 2, 2.0), (2, 5, 1.0), (2, 0, -1.0), (3, 7, 0.25)]  # row 1 has none


@pytest.mark.parametrize("flags", [0, ONE_ROW_PER_PAIR])
@pytest.mark.parametrize("preset", ["v2-lite", "v3", "v3fp8", "v3fp8-ragged"])
def test_answers_like_a_worker_on_the_host(preset: str, flags: int, checkpoint_dir: Folder) -> None:
    folder = checkpoint_dir(preset)
    config = Checkpoint.open(folder).config
    layer, x = config.moe_layers[0], rows(4, config.hidden_size)
    host, device = (open_worker(folder, range(8), where) for where in (None, TWINS))
    want, got = (answer(w, request(x, PAIRS, layer, flags)) for w in (host, device))
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) < 1e-5


def test_pairs_may_come_in_any_order(worker: ExpertWorker) -> None:
    """The device adds the pairs of a row where they lie together: they are brought together."""
    x, mixed = rows(4), [PAIRS[i] for i in (3, 0, 4, 1, 2)]
    together, apart = (answer(worker, request(x, pairs)) for pairs in (PAIRS, mixed))
    torch.testing.assert_close(apart, together)
    by_pair = answer(worker, request(x, PAIRS, flags=ONE_ROW_PER_PAIR))
    mixed_by_pair = answer(worker, request(x, mixed, flags=ONE_ROW_PER_PAIR))
    torch.testing.assert_close(mixed_by_pair, by_pair[[3, 0, 4, 1, 2]])


def test_pairs_are_grouped_by_row_in_their_order() -> None:
    ids = torch.tensor([2, 0, 2, 0], dtype=torch.int32)
    experts, weights = torch.arange(4, dtype=torch.int32), torch.arange(4.0)
    batch = PairBatch(1, torch.zeros(4, 8), ids, experts, experts, weights, per_pair=False)
    row_ids, expert_ids, pair_weights, row_starts = grouped_pairs(batch)
    assert row_ids.tolist() == [0, 0, 2, 2]
    assert expert_ids.tolist() == [1, 3, 0, 2]
    assert pair_weights.tolist() == [1.0, 3.0, 0.0, 2.0]
    assert row_starts.tolist() == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_answers_in_the_dtype_of_the_request(worker: ExpertWorker, dtype: torch.dtype) -> None:
    got = answer(worker, request(rows(4).to(dtype), PAIRS))
    assert got.dtype == dtype
    want = answer(worker, request(rows(4).to(dtype).float(), PAIRS))
    assert torch.equal(got.float(), want.to(dtype).float())


def test_a_sum_in_bfloat16_is_rounded_once(checkpoint_dir: Folder) -> None:
    """256 + 1 + 1 is 256 in bfloat16 steps and 258 in float32."""
    worker = open_worker(checkpoint_dir("v2-lite"), range(2), TWINS_BF16)
    x = rows(1).bfloat16()
    (one,) = answer(worker, request(x.float(), [(0, 0, 1.0)]))
    column = int(one.abs().argmax())
    unit = 1.0 / float(one[column])
    pairs = [(0, 0, 256 * unit), (0, 0, unit), (0, 0, unit)]
    assert float(answer(worker, request(x, pairs))[0, column]) == 258


def test_what_it_lacks_is_named_and_a_dropped_expert_leaves_the_device_table(
    worker: ExpertWorker,
) -> None:
    assert isinstance(worker._compute, DeviceCompute)
    table = worker._compute._slot_of
    assert sorted(table[0].tolist()) == [-1] * 8 + sorted(worker._slot_of.values())
    worker.hold([(1, 3), (2, 9)])
    assert [(table == s).nonzero().tolist() for s in worker._slot_of.values()] == [
        [[0, 3]],
        [[1, 9]],
    ]
    assert int((table >= 0).sum()) == 2
    reply = worker.handle(request(rows(1), [(0, 3, 1.0), (0, 5, 1.0)]), NOBODY)
    assert reply.status == Status.NOT_HERE
    assert reply.expert_ids is not None
    assert reply.expert_ids.tolist() == [5]


def test_a_reused_slot_computes_the_new_expert(checkpoint_dir: Folder) -> None:
    worker = open_worker(checkpoint_dir("v2-lite"), range(1), TWINS, num_slots=1)
    answers = []
    for expert in (3, 4, 3):
        worker.hold([(1, expert)])
        answers.append(answer(worker, request(rows(2), [(0, expert, 1.0), (1, expert, 1.0)])))
    assert torch.equal(answers[0], answers[2])
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("flags", [0, ONE_ROW_PER_PAIR])
def test_a_merged_computation_gives_each_sender_its_own_rows(
    worker: ExpertWorker, flags: int
) -> None:
    """With one row a pair bit for bit, whatever it was merged with."""
    requests = [
        request(rows(i), [(i - 1, i % 8, 1.0), (0, 7, 0.5)], flags=flags) for i in (1, 4, 9)
    ]
    alone = [answer(worker, frame) for frame in requests]
    batches = [_Batch(f, f.rows, f.row_ids, f.expert_ids, f.weights) for f in requests]  # type: ignore[arg-type]
    worker._answer(batches)
    assert worker.counters.merged_batches == 2
    for batch, rows_alone in zip(batches, alone, strict=True):
        assert batch.reply is not None
        assert batch.reply.rows is not None
        torch.testing.assert_close(batch.reply.rows, rows_alone)
        assert not flags or torch.equal(batch.reply.rows, rows_alone)


def test_experts_move_while_batches_are_computed(worker: ExpertWorker) -> None:
    """Expert 0 stays; the others come and go. Every answer is right or NOT_HERE."""
    x = rows(1)
    right = [answer(worker, request(x, [(0, expert, 1.0)])) for expert in range(8)]
    done = threading.Event()

    def move() -> None:
        for i in range(100):
            worker.hold([(1, 0), *((1, (i + j) % 7 + 1) for j in range(3))])
        done.set()

    mover = threading.Thread(target=move)
    mover.start()
    lacking = set()
    while not done.is_set():
        for expert in range(8):
            reply = worker.handle(request(x, [(0, expert, 1.0)]), NOBODY)
            if reply.status == Status.NOT_HERE:
                lacking.add(expert)
            else:
                assert torch.equal(reply.rows, right[expert])  # type: ignore[arg-type]
    mover.join()
    assert 0 not in lacking


def test_busy_until_the_answer_is_there(
    worker: ExpertWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queuing the kernels is not the end of the computation."""

    class Slow:
        def __init__(self, x: Tensor) -> None:
            self._x = x

        def wait(self) -> Tensor:
            time.sleep(0.05)
            return self._x

    assert isinstance(worker._compute, DeviceCompute)
    monkeypatch.setattr(worker._compute._staging, "to_host", Slow)
    reply = worker.handle(request(rows(1), [(0, 0, 1.0)]), NOBODY)
    assert worker.counters.busy_s >= 0.05
    assert reply.compute_us >= 50_000


@pytest.mark.parametrize("flags", [0, ONE_ROW_PER_PAIR])
def test_rows_on_a_device_are_only_looked_at_for_bad_numbers(
    worker: ExpertWorker, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without values, alone and merged, pass through the worker; each answer is looked at once
    and says so."""

    class Shapes:
        def run(self, batch: PairBatch) -> Tensor:
            assert batch.rows.is_meta
            num_rows = len(batch.row_ids) if batch.per_pair else batch.rows.shape[0]
            return batch.rows.new_empty(num_rows, batch.rows.shape[1])

    looked_at = []

    def look(rows: Tensor) -> bool:
        looked_at.append(rows.shape[0])
        return True

    monkeypatch.setattr("experts.worker.rows_finite", look)
    worker._compute = Shapes()  # type: ignore[assignment]
    frames = [request(rows(i).to("meta"), [(0, 1, 1.0), (0, 2, 0.5)], flags=flags) for i in (4, 1)]
    assert answer(worker, frames[0]).is_meta
    batches = [_Batch(f, f.rows, f.row_ids, f.expert_ids, f.weights) for f in frames]  # type: ignore[arg-type]
    worker._answer(batches)
    for batch, num_rows in zip(batches, [2, 2] if flags else [4, 1], strict=True):
        assert batch.reply is not None and batch.reply.rows is not None
        assert batch.reply.rows.is_meta
        assert batch.reply.rows.shape == (num_rows, 128)
        assert batch.reply.flags == flags | FINITE
    assert looked_at == ([2, 2, 2] if flags else [4, 4, 1])


def test_a_bad_answer_on_a_device_fails_alone(worker: ExpertWorker) -> None:
    """Of two that were computed together the other one is answered; on the host nobody looks."""
    x = rows(2)
    bad = x.clone()
    bad[1, 5] = torch.inf

    class Echo:
        def run(self, batch: PairBatch) -> Tensor:
            return batch.rows

    worker._compute = Echo()  # type: ignore[assignment]
    for place, flag in ((to_device, FINITE), (Tensor.clone, 0)):
        frames = [request(place(it), [(0, 1, 1.0), (1, 2, 0.5)]) for it in (x, bad)]
        batches = [_Batch(f, f.rows, f.row_ids, f.expert_ids, f.weights) for f in frames]  # type: ignore[arg-type]
        worker._answer(batches)
        good_reply, bad_reply = (batch.reply for batch in batches)
        assert good_reply is not None and bad_reply is not None
        assert (good_reply.status, good_reply.flags) == (Status.OK, flag)
        if flag:
            assert (bad_reply.status, bad_reply.rows) == (Status.FAILED, None)
            assert bad_reply.text == "the answer is not finite"
        else:
            assert (bad_reply.status, bad_reply.flags) == (Status.OK, 0)


def test_warm_up_meets_every_size_of_a_block(
    checkpoint_dir: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of pairs and of experts, a batch's blocks have been computed with before,
    with one row a pair and without."""
    worker = open_worker(checkpoint_dir("v2-lite"), range(0), TWINS_BF16)
    compute, seen = worker._compute, []
    assert isinstance(compute, DeviceCompute)
    sort_pairs = compute._ops.sort_pairs

    def sort(expert_ids: Tensor, num_experts: int, block_rows: int) -> SortedPairs:
        seen.append(block_rows)
        return sort_pairs(expert_ids, num_experts, block_rows)

    monkeypatch.setattr(compute, "_ops", replace(compute._ops, sort_pairs=sort))
    monkeypatch.setattr(ComputeDevice, "is_cuda", True)
    compute.warm_up()
    by_row, by_pair = seen[::2], seen[1::2]
    sizes = [(pairs, here) for pairs in (*range(1, 300), 4096, 32768) for here in (1, 3, 64)]
    for met, deterministic in ((by_row, False), (by_pair, True)):
        possible = {
            block_rows_for(pairs, here, torch.bfloat16, deterministic=deterministic)
            for pairs, here in sizes
        }
        assert set(met) == possible
    assert len(set(by_row)) == 3


def test_the_kernels_themselves(checkpoint_dir: Folder) -> None:
    pytest.importorskip("triton")
    folder = checkpoint_dir("v2-lite")
    host, device = (open_worker(folder, range(8), where) for where in (None, INTERPRETER))
    for flags in (0, ONE_ROW_PER_PAIR):
        want, got = (answer(w, request(rows(4), PAIRS, flags=flags)) for w in (host, device))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
