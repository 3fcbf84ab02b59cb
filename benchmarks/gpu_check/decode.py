"""Section 4: V2-Lite decoding on this device, attention and experts in one process.

The bound is what a step must read: all weights that it needs, of the experts those that some token
chose (counted), and the cache. Time is the host's, waiting for the tokens of every step included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from attention.device_model import DeviceDecoder
from experts.config import ModelConfig
from experts.device import KernelKind
from gpu_check.accounting import Work, decode_step, prefill
from gpu_check.greedy import Sequences, random_prompts
from gpu_check.model import Model, lite_config
from gpu_check.plan import Context, Unit
from gpu_check.rows import Benchmark, Check
from gpu_check.shapes import ModelShape
from gpu_check.variants import check_warm
from router.client import MoeClient
from router.gate import DeviceGate, GateSpec
from router.kernels.gpu.ops import router_ops
from router.local import LocalMoe
from router.weights import load_device_gates

BATCHES, CONTEXT, NUM_STEPS = (1, 64), 1024, 32
SMOKE_BATCHES, SMOKE_CONTEXT, SMOKE_STEPS = (2,), 3, 1
GOAL_BATCH = 64
COMPARED = (8, 64, 16)
"""Sequences, prompt tokens, new tokens of the comparison with the twins."""
SMOKE_COMPARED = (2, 3, 1)
MAX_MARGIN = 0.1
"""Where kernels and twins choose different tokens, the best two must be as close as this, in
standard deviations of the logits: bfloat16 rounding turns only near ties."""


MIXED = (
    (1, 40, 511),
    (2, 700, 100),
    (7, 1000, 64),
    (16, 300, 496),
    (33, 1050, 256),
    (64, 500, 448),
)
"""Steps: decoding sequences, the position of their tokens, a prompt's new tokens beside them."""
SMOKE_MIXED = ((1, 2, 17), (2, 20, 16))


def units(context: Context) -> Iterator[Unit]:
    """What a warm engine compiles, times, then the same tokens."""
    yield Unit("V2-Lite mixed steps after warm-up", lambda: [warm_steps(context)])
    yield Unit("V2-Lite decode", lambda: times(context))
    yield Unit("V2-Lite tokens against twins", lambda: [same_tokens(context)])


def warm_steps(context: Context) -> Check:
    """An engine compiles nothing after its warm-up, for steps that decode beside a prompt chunk."""
    steps = SMOKE_MIXED if context.smoke else MIXED
    num_seqs = max(num_decodes for num_decodes, _, _ in steps)
    num_tokens = 1 + max(max(position, num_new) for _, position, num_new in steps)
    model = Model.open(lite_config(smoke=context.smoke, num_layers=2), context.compute)
    prompts = random_prompts(num_seqs + 1, num_tokens, model.config.vocab_size)
    sequences = Sequences(prompts, num_tokens)
    cache = model.new_cache(num_seqs + 1, num_tokens)
    decoder = model.decoder(cache, num_seqs, num_tokens, graphs=True)

    def serve() -> None:
        for num_decodes, position, num_new in steps:
            hidden = decoder.forward(sequences.mixed(num_decodes, position, num_new))
            decoder.logits(hidden[: num_decodes + 1])

    return check_warm(context, "V2-Lite mixed steps", decoder.warm_up, serve)


def shape_of(config: ModelConfig) -> ModelShape:
    """The sizes that the accounting needs."""
    names = {field.name for field in fields(ModelShape)} - {"name"}
    return ModelShape(name="V2-Lite", **{name: getattr(config, name) for name in names})


def times(context: Context) -> Iterator[Benchmark]:
    """Of both batches: the prompts, then decoding with and without CUDA graphs."""
    model = Model.open(lite_config(smoke=context.smoke), context.compute)
    for batch in SMOKE_BATCHES if context.smoke else BATCHES:
        yield from Decoding(context, model, batch).benchmarks()


class Decoding:
    """One batch of sequences of one length."""

    def __init__(self, context: Context, model: Model, batch: int) -> None:
        self._context, self._model, self._batch = context, model, batch
        self._length = SMOKE_CONTEXT if context.smoke else CONTEXT
        self._steps = SMOKE_STEPS if context.smoke else NUM_STEPS
        self._num_tokens = self._length + self._steps
        prompts = random_prompts(batch, self._length, model.config.vocab_size)
        self._sequences = Sequences(prompts, self._num_tokens)
        self._cache = model.new_cache(batch, self._num_tokens)

    def benchmarks(self) -> Iterator[Benchmark]:
        """The prompts first: the cache is then the same for all that follow."""
        config, batch, context = self._model.config, self._batch, self._context
        shape, place = shape_of(config), f"V2-Lite, batch {batch}, context {self._length}"
        decoder = self._decoder(graphs=True)
        tokens = self._sequences.prefill(decoder)
        seconds = self._wall_s(lambda: self._sequences.prefill(decoder))
        work = prefill(shape, batch, self._length)
        yield self._row("prefill, inline", place, work, seconds, batch * self._length)
        counting = Counting(self._model, load_device_gates(self._model.checkpoint, context.compute))
        self._run(self._decoder(graphs=False, moe=counting), tokens, 1)
        active = counting.active_experts
        work = decode_step(shape, batch, self._length + self._steps // 2, active)
        for graphs in (True, False):
            decoder = self._decoder(graphs=graphs)
            self._run(decoder, tokens, 1)  # records, or compiles
            seconds = self._wall_s(lambda d=decoder: self._run(d, tokens, self._steps))
            each = None if seconds is None else seconds / self._steps
            row = self._row("decode step, inline", place, work, each, batch)
            goal = "lite-decode" if graphs and batch == GOAL_BATCH else ""
            how = "CUDA graphs" if graphs else "no graphs"
            yield replace(row, goal=goal, note=f"{how}, {active:.1f} experts a layer")

    def _decoder(self, *, graphs: bool, moe: MoeClient | None = None) -> DeviceDecoder:
        return self._model.decoder(
            self._cache, self._batch, self._num_tokens, graphs=graphs, moe=moe
        )

    def _run(self, decoder: DeviceDecoder, tokens: Tensor, steps: int) -> None:
        for _ in self._sequences.decode(decoder, tokens, steps):
            pass

    def _wall_s(self, work: Callable[[], object]) -> float | None:
        """Of something that ran before."""
        if self._context.smoke:
            return None
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _row(
        self, kernel: str, place: str, work: Work, seconds: float | None, tokens: int
    ) -> Benchmark:
        return Benchmark(
            kernel, place, "bfloat16", work.num_bytes, work.flops, seconds, tokens=tokens
        )


class Counting:
    """A MoE client that counts the experts of each layer that some row chose, then asks the real
    one."""

    accepts_device = True
    num_renormalised = 0

    def __init__(self, model: Model, gates: Mapping[int, DeviceGate]) -> None:
        self._ops = router_ops("triton" if model.compute.kernels == "triton" else "torch")
        self._moe: LocalMoe = model.moe
        self._gates, self._spec = gates, GateSpec.of(model.config)
        self._counts: list[int] = []

    @property
    def active_experts(self) -> float:
        """Mean of the layers."""
        return sum(self._counts) / len(self._counts)

    def begin(self, layer: int, x: Tensor, deadline_s: float | None = None) -> Tensor:
        """See MoeClient."""
        gate = self._gates[layer]
        logits = self._ops.gate_logits(x, gate.weight)
        ids, _, _ = self._ops.select_experts(logits, gate.bias, self._spec)
        self._counts.append(int(ids.unique().numel()))
        return self._moe.begin(layer, x, deadline_s)

    def finish(self, ticket: Tensor) -> Tensor:
        """See MoeClient."""
        return self._moe.finish(ticket)


def same_tokens(context: Context) -> Check:
    """Greedy tokens of the Triton kernels and of the twins, over the same seeded weights."""
    batch, length, num_new = SMOKE_COMPARED if context.smoke else COMPARED
    config = lite_config(smoke=context.smoke)
    prompts = random_prompts(batch, length, config.vocab_size)
    ours, _ = _choices(context, config, "triton", prompts, num_new)
    twins, margins = _choices(context, config, "torch", prompts, num_new)
    error, note = first_difference(ours, twins, margins)
    place = f"V2-Lite, {batch} prompts of {length}, {num_new} new tokens"
    dtype = str(context.compute.dtype).removeprefix("torch.")
    return Check("greedy tokens", place, dtype, error, MAX_MARGIN, note=note)


def _choices(
    context: Context, config: ModelConfig, kernels: KernelKind, prompts: Tensor, num_new: int
) -> tuple[Tensor, Tensor]:
    """tokens [B, N] and how far the best logit is above the next, in standard deviations, [B, N].

    Not the first token, which the prefill chooses.
    """
    model = Model.open(config, replace(context.compute, kernels=kernels))
    batch, length = prompts.shape
    sequences = Sequences(prompts, length + num_new)
    cache = model.new_cache(batch, length + num_new)
    graphs = kernels == "triton"
    decoder = model.decoder(cache, batch, length + num_new, graphs=graphs)
    tokens, margins = [], []
    for logits in sequences.decode(decoder, sequences.prefill(decoder), num_new):
        best = logits.topk(2, dim=1)
        tokens.append(best.indices[:, 0].cpu())
        gap = best.values[:, 0] - best.values[:, 1]
        margins.append((gap / logits.std(dim=1)).cpu())
    return torch.stack(tokens, dim=1), torch.stack(margins, dim=1)


def first_difference(ours: Tensor, twins: Tensor, margins: Tensor) -> tuple[float, str]:
    """(largest margin of the twins where a sequence first differs, 0 if none does; in words)."""
    different = ours != twins
    rows = different.any(dim=1).nonzero().flatten().tolist()
    if not rows:
        return 0.0, f"all {len(ours)} sequences are the same"
    places = {row: int(different[row].int().argmax()) for row in rows}
    worst = max(rows, key=lambda row: float(margins[row, places[row]]))
    margin = float(margins[worst, places[worst]])
    same = len(ours) - len(rows)
    return margin, (
        f"{same} of {len(ours)} sequences are the same; sequence {worst} differs first at token "
        f"{places[worst]}, where the twins' best two logits are {margin:.3f} deviations apart"
    )
