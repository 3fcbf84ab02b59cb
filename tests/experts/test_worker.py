"""An expert worker: computes what it holds, says what it lacks, and loses no expert by moving."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.channel.frame import ONE_ROW_PER_PAIR, Frame, Kind, Status
from experts.checkpoint import Checkpoint
from experts.errors import CheckpointError
from experts.weights import load_expert
from experts.worker import ExpertsNotLoaded, ExpertWorker, _Batch
from tests.reference import Reference

LAYER = 1
NOBODY: Any = None


@pytest.fixture
def folder(checkpoint_dir: Callable[[str], Path]) -> Path:
    return checkpoint_dir("v2-lite")


@pytest.fixture
def worker(folder: Path) -> ExpertWorker:
    """Holds experts 0-7 of layer 1 in 12 slots."""
    made = ExpertWorker(Checkpoint.open(folder), "w0", num_slots=12)
    made.hold([(LAYER, expert) for expert in range(8)])
    return made


def rows(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 128, generator=torch.Generator().manual_seed(num_rows))


def request(
    x: Tensor, pairs: list[tuple[int, int, float]], layer: int = LAYER, flags: int = 0
) -> Frame:
    """pairs: (row, expert, weight)"""
    frame = Frame(
        Kind.EXPERT_BATCH,
        request_id=9,
        attempt=2,
        layer=layer,
        flags=flags,
        rows=x,
        row_ids=torch.tensor([p[0] for p in pairs], dtype=torch.int32),
        expert_ids=torch.tensor([p[1] for p in pairs], dtype=torch.int32),
        weights=torch.tensor([p[2] for p in pairs], dtype=torch.float32),
    )
    frame.received_s = time.monotonic()
    return frame


def test_rows_are_weighted_sums_of_their_experts(worker: ExpertWorker, folder: Path) -> None:
    x = rows(3)
    answer = worker.handle(request(x, [(0, 5, 0.5), (0, 2, 2.0), (2, 5, 1.0)]), NOBODY)
    reference = Reference(folder)
    prefix = f"model.layers.{LAYER}.mlp.experts."
    want = torch.zeros_like(x)
    want[0] = 0.5 * reference._mlp(prefix + "5", x[:1])[0]
    want[0] += 2.0 * reference._mlp(prefix + "2", x[:1])[0]
    want[2] = reference._mlp(prefix + "5", x[2:])[0]
    assert (answer.kind, answer.status) == (Kind.EXPERT_RESULT, Status.OK)
    assert (answer.request_id, answer.attempt, answer.layer) == (9, 2, LAYER)
    assert answer.rows is not None
    torch.testing.assert_close(answer.rows, want)
    assert answer.compute_us > 0


def test_deterministic_gives_one_row_a_pair_in_the_order_asked(worker: ExpertWorker) -> None:
    x = rows(2)
    pairs = [(1, 3, 1.0), (0, 3, 1.0), (1, 0, 2.0)]
    answer = worker.handle(request(x, pairs, flags=ONE_ROW_PER_PAIR), NOBODY)
    assert answer.rows is not None
    assert answer.rows.shape == (3, 128)
    for i, (row, expert, weight) in enumerate(pairs):
        alone = request(x[row : row + 1], [(0, expert, weight)], flags=ONE_ROW_PER_PAIR)
        assert torch.equal(answer.rows[i], worker.handle(alone, NOBODY).rows[0])  # type: ignore[index]


def test_answers_in_the_dtype_of_the_request(worker: ExpertWorker) -> None:
    answer = worker.handle(request(rows(1).bfloat16(), [(0, 0, 1.0)]), NOBODY)
    assert answer.rows is not None
    assert answer.rows.dtype == torch.bfloat16


def test_what_it_lacks_is_named_and_nothing_is_computed(worker: ExpertWorker) -> None:
    pairs = [(0, 3, 1.0), (0, 8, 1.0), (0, 15, 1.0), (0, 8, 1.0)]
    answer = worker.handle(request(rows(1), pairs), NOBODY)
    assert answer.status == Status.NOT_HERE
    assert answer.rows is None
    assert answer.expert_ids is not None
    assert answer.expert_ids.tolist() == [8, 15]
    assert worker.counters.not_here == 1


def test_an_expert_the_model_does_not_have_is_not_here(worker: ExpertWorker) -> None:
    """Not the last expert's answer, as a clipped index would give."""
    worker.hold([(LAYER, 15)])
    answer = worker.handle(request(rows(1), [(0, 16, 1.0)]), NOBODY)
    assert answer.status == Status.NOT_HERE
    assert answer.expert_ids is not None
    assert answer.expert_ids.tolist() == [16]


@pytest.mark.parametrize(("layer", "width"), [(0, 128), (9, 128), (LAYER, 64)])
def test_foreign_layers_and_widths_are_refused(
    worker: ExpertWorker, layer: int, width: int
) -> None:
    answer = worker.handle(request(torch.zeros(1, width), [(0, 0, 1.0)], layer), NOBODY)
    assert answer.status == Status.FAILED
    assert answer.text == f"layer {layer} of width {width}: this model has no such experts"


def test_frames_of_other_kinds_are_refused(worker: ExpertWorker) -> None:
    answer = worker.handle(Frame(Kind.ROUTE_BATCH, rows=rows(1)), NOBODY)
    assert answer.text == "not a batch: ROUTE_BATCH"
    assert answer.status == Status.FAILED


def test_a_batch_past_its_deadline_is_not_computed(worker: ExpertWorker) -> None:
    frame = request(rows(1), [(0, 0, 1.0)])
    frame.deadline_us = 1000
    frame.received_s = time.monotonic() - 1.0
    assert worker.handle(frame, NOBODY).status == Status.DEADLINE
    assert worker.counters.batches == 0


def test_a_draining_worker_refuses(worker: ExpertWorker) -> None:
    worker.drain()
    answer = worker.handle(request(rows(1), [(0, 0, 1.0)]), NOBODY)
    assert (answer.status, answer.text) == (Status.DRAINING, "w0: DRAINING")


# --- holding ---


def test_holds_exactly_what_it_was_told_last(worker: ExpertWorker) -> None:
    wished = {(LAYER, 1), (2, 1), (3, 15)}
    reports = []
    worker.hold(wished, epoch=4, report=lambda holds: reports.append(set(holds)))
    assert worker.holds == wished
    assert worker.epoch == 4
    assert reports == [wished]
    assert worker.handle(request(rows(1), [(0, 1, 1.0)], layer=2), NOBODY).status == Status.OK
    assert worker.handle(request(rows(1), [(0, 0, 1.0)]), NOBODY).status == Status.NOT_HERE


def test_a_reused_slot_computes_the_new_expert(folder: Path) -> None:
    worker = ExpertWorker(Checkpoint.open(folder), "w0", num_slots=1)
    x, answers = rows(2), []
    for expert in (3, 4, 3):
        worker.hold([(LAYER, expert)])
        answers.append(worker.handle(request(x, [(0, expert, 1.0)]), NOBODY).rows)
    first, second, third = answers
    assert first is not None
    assert third is not None
    assert torch.equal(first, third)
    assert second is not None
    assert not torch.equal(first, second)


def test_more_experts_than_slots_are_refused_and_nothing_is_dropped(worker: ExpertWorker) -> None:
    before = worker.holds
    with pytest.raises(ValueError, match="13 experts do not fit in 12 slots"):
        worker.hold([(2, expert) for expert in range(13)])
    assert worker.holds == before


@pytest.mark.parametrize("key", [(0, 0), (1, 16), (1, -1), (4, 0)])
def test_experts_the_model_does_not_have_are_refused(
    worker: ExpertWorker, key: tuple[int, int]
) -> None:
    with pytest.raises(ValueError, match=f"no expert {key[1]} in layer {key[0]}"):
        worker.hold([key])


def test_an_expert_that_cannot_be_read_holds_up_no_other(
    worker: ExpertWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason: Exception = CheckpointError("m.safetensors", "data up to byte 9", "8 bytes")

    def load(checkpoint: Checkpoint, layer: int, expert: int) -> Any:
        if expert in (2, 5):
            raise reason
        return load_expert(checkpoint, layer, expert)

    monkeypatch.setattr("experts.worker.load_expert", load)
    reports: list[set] = []

    def report(holds: Iterable[tuple[int, int]]) -> None:
        reports.append(set(holds))

    wished, there = [(2, e) for e in range(8)], {(2, e) for e in range(8) if e not in (2, 5)}
    with pytest.raises(ExpertsNotLoaded) as caught:
        worker.hold(wished, epoch=4, report=report)
    assert str(caught.value) == (
        "could not load expert 2 of layer 2, 5 of layer 2: CheckpointError: m.safetensors: "
        "expected data up to byte 9, found 8 bytes"
    )
    assert worker.holds == there and reports == [there]
    assert worker.epoch == 0  # not carried out
    reason = OSError("stale handle")
    with pytest.raises(ExpertsNotLoaded, match="OSError: stale handle"):
        worker.hold(wished, epoch=4)
    monkeypatch.undo()
    worker.hold(wished, epoch=4)
    assert worker.holds == set(wished) and worker.epoch == 4


# --- several senders ---


def test_batches_that_wait_are_computed_together_with_the_same_bits(worker: ExpertWorker) -> None:
    requests = [
        request(rows(i), [(i - 1, i % 8, 1.0), (0, 7, 0.5)], flags=ONE_ROW_PER_PAIR)
        for i in range(1, 6)
    ]
    alone = [worker.handle(frame, NOBODY).rows for frame in requests]
    batches_before = worker.counters.batches
    computing, release = threading.Event(), threading.Event()

    def hold_the_turn() -> None:
        computing.set()
        assert release.wait(60)

    holder = threading.Thread(target=worker._turns.exclusive, args=(hold_the_turn,))
    holder.start()
    assert computing.wait(60)
    answers: dict[int, Frame] = {}

    def send(i: int) -> None:
        answers[i] = worker.handle(requests[i], NOBODY)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    release.set()
    for thread in [holder, *threads]:
        thread.join(60)
    assert worker.counters.batches - batches_before == 5
    for i, rows_alone in enumerate(alone):
        assert rows_alone is not None
        assert torch.equal(answers[i].rows, rows_alone)  # type: ignore[arg-type]


@pytest.mark.parametrize("flags", [0, ONE_ROW_PER_PAIR])
def test_a_merged_computation_gives_each_sender_its_own_rows(
    worker: ExpertWorker, flags: int
) -> None:
    requests = [request(rows(i), [(i - 1, i % 8, 1.0), (0, 7, 0.5)], flags=flags) for i in (1, 4)]
    alone = [worker.handle(frame, NOBODY).rows for frame in requests]
    batches = [_Batch(f, f.rows, f.row_ids, f.expert_ids, f.weights) for f in requests]  # type: ignore[arg-type]
    worker._answer(batches)
    assert worker.counters.merged_batches == 1
    for batch, rows_alone in zip(batches, alone, strict=True):
        assert batch.reply is not None
        torch.testing.assert_close(batch.reply.rows, rows_alone)


def test_a_lack_in_a_merged_computation_is_the_sender_s_own(worker: ExpertWorker) -> None:
    requests = [request(rows(1), [(0, expert, 1.0)]) for expert in (12, 3)]
    batches = [_Batch(f, f.rows, f.row_ids, f.expert_ids, f.weights) for f in requests]  # type: ignore[arg-type]
    worker._answer(batches)
    statuses = [batch.reply.status for batch in batches if batch.reply is not None]
    assert statuses == [Status.NOT_HERE, Status.OK]


def test_experts_move_while_batches_are_computed(worker: ExpertWorker) -> None:
    """Expert 0 stays; the others come and go. Every answer is right or NOT_HERE."""
    x, right = rows(1), {}
    for expert in range(8):
        right[expert] = worker.handle(request(x, [(0, expert, 1.0)]), NOBODY).rows
    done = threading.Event()

    def move() -> None:
        for i in range(200):
            worker.hold([(LAYER, 0), *((LAYER, (i + j) % 7 + 1) for j in range(3))])
        done.set()

    mover = threading.Thread(target=move)
    mover.start()
    statuses = set()
    while not done.is_set():
        for expert in range(8):
            answer = worker.handle(request(x, [(0, expert, 1.0)]), NOBODY)
            statuses.add((expert == 0, answer.status))
            if answer.status == Status.OK:
                assert torch.equal(answer.rows, right[expert])  # type: ignore[arg-type]
    mover.join()
    assert (True, Status.NOT_HERE) not in statuses
    assert not {status for _, status in statuses} - {Status.OK, Status.NOT_HERE}


def test_load_and_work_are_counted(worker: ExpertWorker) -> None:
    worker.handle(request(rows(2), [(0, 3, 1.0), (1, 3, 1.0), (1, 0, 1.0)]), NOBODY)
    counters = worker.counters
    assert (counters.batches, counters.rows, counters.pairs) == (1, 2, 3)
    assert counters.busy_s > 0
    assert worker.load_counter.totals()[LAYER][:4] == [1, 0, 0, 2]
    assert sum(counters.queue_us_buckets) == 1


def test_merged_batches_divide_the_time_by_their_pairs(folder: Path) -> None:
    """1 and 3 pairs at 40 a second take 0.1 s together."""
    worker = ExpertWorker(Checkpoint.open(folder), "w0", 4, emulated_pairs_per_s=40.0)
    worker.hold([(LAYER, 0)])
    batches = []
    for num_pairs in (1, 3):
        frame = request(rows(num_pairs), [(row, 0, 1.0) for row in range(num_pairs)])
        assert frame.rows is not None and frame.row_ids is not None
        assert frame.expert_ids is not None and frame.weights is not None
        batches.append(_Batch(frame, frame.rows, frame.row_ids, frame.expert_ids, frame.weights))
    worker._answer(batches)
    small, large = (batch.reply for batch in batches)
    assert small is not None and large is not None
    assert small.compute_us == large.compute_us >= 100_000
    assert large.expert_us == pytest.approx(3 * small.expert_us, abs=2)
    busy_us = 1e6 * worker.counters.busy_s
    assert small.expert_us + large.expert_us == pytest.approx(busy_us, abs=1)


def test_an_emulated_device_takes_its_time(folder: Path) -> None:
    worker = ExpertWorker(Checkpoint.open(folder), "w0", 4, emulated_pairs_per_s=40.0)
    worker.hold([(LAYER, 0), (LAYER, 1)])
    begun_s = time.monotonic()
    worker.handle(request(rows(1), [(0, 0, 1.0), (0, 1, 1.0)]), NOBODY)
    assert time.monotonic() - begun_s >= 2 / 40
    assert worker.counters.busy_s >= 2 / 40


def test_quiet_is_when_no_batch_came_for_a_while(
    worker: ExpertWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch comes in each of the first waits, in the last one none; or there is no end to them,
    but to the time."""
    num_waits, num_busy = 0, 3

    def sleep(seconds: float) -> None:
        nonlocal num_waits
        num_waits += 1
        if num_waits <= num_busy:
            worker.handle(request(rows(1), [(0, 0, 1.0)]), NOBODY)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr("experts.worker.time", clock)
    worker.wait_quiet(timeout_s=math.inf)
    assert (num_waits, worker.counters.batches) == (4, 3)
    num_busy = sys.maxsize
    worker.wait_quiet(timeout_s=0.01)
    assert num_waits - worker.counters.batches == 1
