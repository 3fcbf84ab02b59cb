"""Recorded segments: buckets, static buffers, padding; on the CPU a recording calls again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attention.graphs import (
    CudaRecorder,
    EagerGraph,
    EagerRecorder,
    Segment,
    bucket_of,
    bucket_sizes,
    can_record,
)
from attention.runner import build_batch
from attention.scheduler import ScheduledRequest
from experts.device import ComputeDevice
from router.local import LocalMoe
from tests.attention.harness import BLOCK_SIZE, Rig, Sequences
from tests.gpu.device_rig import NUM_BLOCKS, TWINS, device_model
from tests.reference import prompts

RigOf = Callable[[str], Rig]


class CountingRecorder:
    """Counts the segments recorded and replayed."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def record(self, segment: Segment) -> EagerGraph:
        graph = EagerRecorder().record(segment)
        self.num_recorded += 1

        def counted() -> None:
            self.num_replayed += 1
            graph.replay()

        return EagerGraph(counted)


def test_buckets_grow_by_less_than_a_half() -> None:
    assert bucket_sizes(1) == (1,)
    assert bucket_sizes(3) == (1, 2, 3)
    assert bucket_sizes(64) == (1, 2, 4, 8, 16, 24, 32, 48, 64)
    assert bucket_sizes(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert bucket_sizes(512)[-4:] == (192, 256, 384, 512)


def test_the_smallest_bucket_that_holds_a_step() -> None:
    sizes = bucket_sizes(24)
    wanted = {1: 1, 2: 2, 3: 4, 8: 8, 9: 16, 17: 24, 24: 24, 25: None}
    assert {rows: bucket_of(rows, sizes) for rows in wanted} == wanted
    assert bucket_of(1, ()) is None


@pytest.fixture
def pair(rig: RigOf) -> tuple[Sequences, Sequences]:
    """The same prompts but their last 4 tokens, in a model that records and in one that does not;
    deterministic, so that a row has the same bits in every batch."""
    both = []
    for use_graphs in (True, False):
        model = device_model(rig("v3"), deterministic=True, use_graphs=use_graphs)
        both.append(Sequences(model, [ids[:20] for ids in prompts()]))
        both[-1].step({1: 1, 2: 16, 3: 16})
    return both[0], both[1]


def test_a_replay_with_other_contents_is_a_fresh_forward(pair: tuple[Sequences, Sequences]) -> None:
    """Full and padded buckets, several tokens of a sequence, long tables before short ones."""
    recorded, fresh = pair
    addresses = set()
    for chunks in ({2: 1, 3: 1, 1: 1}, {0: 1}, {3: 1, 0: 1, 2: 1, 1: 1}, {3: 3, 1: 2}, {1: 1}):
        hidden = recorded.model.forward(batch_of(recorded, chunks))
        addresses.add(hidden.data_ptr())
        assert torch.equal(hidden, fresh.model.forward(batch_of(fresh, chunks)))
    assert len(addresses) == 1
    assert sorted(recorded.model._recorded) == [1, 4, 8] and not fresh.model._recorded


def batch_of(sequences: Sequences, chunks: dict[int, int]) -> Any:
    items = [ScheduledRequest(sequences.requests[i], size) for i, size in chunks.items()]
    return build_batch(items, [], BLOCK_SIZE)


def test_padding_never_leaks(pair: tuple[Sequences, Sequences]) -> None:
    """Neither out of the rows behind a step, nor out of what an earlier one left, nor into the
    cache."""
    recorded, fresh = pair
    model, chunks = recorded.model, {2: 1, 3: 1, 1: 1}
    model.forward(batch_of(recorded, chunks))
    for buffer in (model._buffers.hidden, model._buffers.x, model._buffers.routed):
        buffer.fill_(torch.nan)
    model._static.batch.block_tables.fill_(NUM_BLOCKS - 1)  # a block of nobody, full of nan
    before = [cache.clone() for cache in model._mla._caches]
    batch = batch_of(recorded, chunks)
    hidden = model.forward(batch)
    assert torch.equal(hidden, fresh.model.forward(batch_of(fresh, chunks)))
    for cache, old in zip(model._mla._caches, before, strict=True):
        now, then = (rows.flatten(0, 1).clone() for rows in (cache, old))
        now[batch.slots] = then[batch.slots] = 0.0
        assert torch.equal(now.nan_to_num(7.0), then.nan_to_num(7.0))


def test_padding_is_what_kernels_skip(pair: tuple[Sequences, Sequences]) -> None:
    recorded, _ = pair
    recorded.model.forward(batch_of(recorded, {2: 1, 3: 2}))
    batch = recorded.model._static.batch  # 8 rows, the largest bucket
    assert batch.context_lens.tolist() == [17, 17, 18, 0, 0, 0, 0, 0]
    assert batch.slots[3:].tolist() == [-1] * 5
    assert batch.seq_ids.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_only_rows_that_exist_go_to_the_experts(pair: tuple[Sequences, Sequences]) -> None:
    """3 tokens in a bucket of 4: padding would cost expert workers what it costs nobody here."""
    recorded, _ = pair
    rows = []
    begin = recorded.model._moe.begin

    def counted(layer: int, x: Tensor, deadline_s: float | None = None) -> Any:
        rows.append(x.shape[0])
        return begin(layer, x, deadline_s)

    recorded.model._moe.begin = counted
    recorded.step({1: 1, 2: 1, 3: 1})
    assert rows == [3] * 3


def test_recording_harms_no_cache(rig: RigOf) -> None:
    """Lazily, in the midst of a sequence, or all at the start: only padding is computed."""
    lazy = Sequences(device_model(rig("v2-lite"), deterministic=True), prompts()[1:2])
    ready = Sequences(device_model(rig("v2-lite"), deterministic=True), prompts()[1:2])
    ready.model.warm_up()
    assert sorted(ready.model._recorded) == [1, 2, 4, 8]
    for cache in ready.model._mla._caches:
        assert cache.isnan().all()
    for size in (3, 1, 1):
        lazy.step({0: size})
        ready.step({0: size})
    assert torch.equal(torch.cat(lazy.logits[0]), torch.cat(ready.logits[0]))


def test_what_is_recorded_once_is_replayed(rig: RigOf) -> None:
    """V2-Lite's preset: 3 hops in 4 layers, so 4 segments between and 3 of shared experts."""
    model = device_model(rig("v2-lite"))
    model._recorder = recorder = CountingRecorder()
    sequences = Sequences(model, prompts())
    sequences.step({2: 30, 3: 9}, naive=[2, 3])
    sequences.step({3: 9})
    assert recorder.num_recorded == 0  # naive, or more tokens than max_num_seqs
    sequences.step({0: 1, 1: 1, 2: 1})
    sequences.step({1: 1, 2: 1, 3: 2})
    assert (recorder.num_recorded, recorder.num_replayed) == (7, 14)
    sequences.step({3: 1})
    assert recorder.num_recorded == 14


def test_with_all_experts_on_the_device_a_step_is_one_graph(rig: RigOf) -> None:
    moe = LocalMoe.open(rig("v2-lite").checkpoint, TWINS, deterministic=True)
    model = device_model(rig("v2-lite"), moe=moe, deterministic=True)
    model._recorder = recorder = CountingRecorder()
    eager = device_model(rig("v2-lite"), moe=moe, deterministic=True, use_graphs=False)
    ours, theirs = (Sequences(each, prompts()[:3]) for each in (model, eager))
    for chunks in ({1: 4, 2: 8}, {0: 1, 1: 1, 2: 1}, {2: 2}):
        ours.step(chunks)
        theirs.step(chunks)
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 2)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert torch.allclose(torch.cat(a), torch.cat(b), rtol=0, atol=1e-5)


def test_twins_on_a_gpu_are_never_recorded(rig: RigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read values back, which no capture survives; that no GPU is here is beside the point."""
    kinds = {
        (name, kernels): can_record(
            ComputeDevice(torch.device(name), torch.float32, kernels, "test")
        )
        for name in ("cpu", "cuda")
        for kernels in ("torch", "triton")
    }
    assert [kind for kind, can in kinds.items() if not can] == [("cuda", "torch")]
    monkeypatch.setattr("attention.device_model.can_record", lambda device: device != TWINS)
    model = device_model(rig("v2-lite"), use_graphs=True)
    model._recorder = recorder = CountingRecorder()
    Sequences(model, prompts()).step({0: 1})
    assert recorder.num_recorded == 0


class VoidCapture:
    """What CUDA does when a capture goes wrong: its end raises as well."""

    ended = 0

    def capture_begin(self, *args: Any, **settings: Any) -> None:
        pass

    def capture_end(self) -> None:
        VoidCapture.ended += 1
        raise RuntimeError("capture invalidated")


def test_the_error_of_a_segment_is_the_one_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    for name, value in (
        ("Stream", lambda device, priority: stream),
        ("stream", nullcontext),
        ("current_stream", lambda device: stream),
        ("graph_pool_handle", lambda: None),
        ("CUDAGraph", VoidCapture),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    recorder, calls = CudaRecorder(torch.device("cuda", 0)), iter((None, ValueError("its own")))

    def segment() -> None:
        if error := next(calls, None):
            raise error

    with pytest.raises(ValueError, match="its own"):
        recorder.record(segment)
    assert VoidCapture.ended == 1
    with pytest.raises(RuntimeError, match="invalidated"):  # nor is a failed end passed over
        recorder.record(segment)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_cuda_graph_reads_what_its_buffers_hold_now() -> None:
    device = torch.device("cuda", 0)
    x, y = torch.ones(8, device=device), torch.zeros(8, device=device)
    recorder = CudaRecorder(device)
    graphs = [recorder.record(lambda k=k: y.copy_(x * k)) for k in (2.0, 3.0)]
    for graph, k in zip(graphs, (2.0, 3.0), strict=True):
        x.fill_(5.0)
        graph.replay()
        assert y.tolist() == [5.0 * k] * 8
