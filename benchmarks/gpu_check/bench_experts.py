"""Section 3: the experts' kernels against the ceilings, torch._grouped_mm and a loop of products.

The goals speak of rows of the products: with "1 of them a row" each row goes to one expert here.
Rows of V3 that reach a worker with a whole group have two of its experts on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.gpu.grouped_gemm import DeviceWeights, block_rows_for
from experts.kernels.gpu.ops import ExpertOps, expert_ops
from experts.kernels.gpu.permute import SortedPairs
from gpu_check.accounting import FLOAT32_BYTES, Work, down, gate_up
from gpu_check.expert_data import Local, Routed, WeightKind, device_weights, random, route
from gpu_check.kernel_times import Run, measure
from gpu_check.plan import Context, Unit
from gpu_check.rows import Benchmark
from gpu_check.shapes import TINY, V2_LITE, V3

Operand = tuple[Tensor, Tensor | None]


class Load(NamedTuple):
    """A layer's work on one worker."""

    local: Local
    rows: int
    kind: WeightKind
    goal: str = ""

    def __str__(self) -> str:
        return f"{self.local}, {self.rows} rows, {self.local.top_k} of them a row"


_V3_ONE, _V3_TWO = Local(V3, 32, 1), Local(V3, 32, 2)
_LITE = Local(V2_LITE, 64, 6)
LOADS = (
    Load(_V3_ONE, 4096, "bfloat16", "grouped-bf16"),
    Load(_V3_TWO, 4096, "bfloat16", "grouped-bf16"),
    Load(_V3_ONE, 4096, "fp8", "grouped-fp8"),
    Load(_V3_TWO, 4096, "fp8", "grouped-fp8"),
    Load(_V3_ONE, 64, "bfloat16", "grouped-few-rows"),
    Load(_V3_ONE, 64, "fp8", "grouped-few-rows"),
    Load(_LITE, 1, "bfloat16"),
    Load(_LITE, 64, "bfloat16"),
    Load(_LITE, 4096, "bfloat16"),
)
SMOKE_LOADS = (Load(Local(TINY, 4, 2), 3, "bfloat16"), Load(Local(TINY, 4, 1), 3, "fp8"))


def units(context: Context) -> Iterator[Unit]:
    """One for each load."""
    for load in SMOKE_LOADS if context.smoke else LOADS:
        if load.kind == "bfloat16" or context.has_fp8:
            name = f"times of experts, {load}, {load.kind}"
            yield Unit(name, lambda load=load: benchmarks(context, load))


def benchmarks(context: Context, load: Load) -> Iterator[Benchmark]:
    """The two products, then all that a layer's experts need."""
    layer = Layer(context, load, expert_ops("triton"))
    rate = load.kind
    yield measure(
        context, "gate_up_silu + down", str(load), rate, layer.products_work, layer.products,
        layer.peers(), load.goal,
    )  # fmt: skip
    yield measure(context, "sort to sum_pairs", str(load), rate, layer.whole_work, layer.whole)


class Layer:
    """Weights, one batch, and ways to compute it."""

    def __init__(self, context: Context, load: Load, ops: ExpertOps) -> None:
        self._ops, self._kind = ops, load.kind
        self._fp8 = load.kind == "fp8"
        self._num_experts = load.local.num_experts
        shape = load.local.shape
        self.weights = device_weights(context, load.local, load.kind, 1)
        self.routed: Routed = route(context, load.local, load.rows, 2)
        self.x = random(context, 3, load.rows, shape.hidden_size).bfloat16()
        pairs = self.routed.num_pairs
        self._block_rows = block_rows_for(pairs, self._num_experts, self.weights.down.dtype)
        self._pairs = self._sort()
        self._rows = self._operand(self.x)
        self._h = self._operand(self._gate_up(self._rows))
        active = self.routed.num_active
        self.products_work = gate_up(shape, load.rows, pairs, active, self._fp8).plus(
            down(shape, pairs, active, self._fp8)
        )
        summed = (pairs + load.rows) * shape.hidden_size * FLOAT32_BYTES
        self.whole_work = self.products_work.plus(Work(summed, 0))

    def products(self) -> None:
        """Both, over rows that are sorted and quantised already."""
        self._gate_up(self._rows)
        self._down(self._h)

    def whole(self) -> Tensor:
        """From the batch to its sums."""
        self._pairs = self._sort()
        h = self._gate_up(self._operand(self.x))
        out = self._down(self._operand(h))
        return self._ops.sum_pairs(out, self.routed.row_starts)

    def peers(self) -> dict[str, Callable[[], Run]]:
        """The same two products by torch, over rows in the order of their experts."""
        if self._fp8:
            return {"_scaled_grouped_mm (a scale a row)": self._scaled_grouped_mm}
        return {"_grouped_mm": self._grouped_mm, "loop of products": self._loop}

    def _sort(self) -> SortedPairs:
        return self._ops.sort_pairs(self.routed.expert_ids, self._num_experts, self._block_rows)

    def _operand(self, values: Tensor) -> Operand:
        return self._ops.quantise_rows(values) if self._fp8 else (values, None)

    def _gate_up(self, rows: Operand) -> Tensor:
        routed = self.routed
        return self._ops.gate_up_silu(
            *rows, self.weights, routed.slot_of, self._pairs, routed.row_ids,
            out_dtype=torch.bfloat16,
        )  # fmt: skip

    def _down(self, h: Operand) -> Tensor:
        routed = self.routed
        return self._ops.down(*h, self.weights, routed.slot_of, self._pairs, routed.pair_weights)

    def _sorted(self) -> tuple[Tensor, Tensor, DeviceWeights]:
        """Rows of the pairs by expert, where each expert's end, weights by expert."""
        routed, weights = self.routed, self.weights
        order = routed.expert_ids.argsort(stable=True)
        counts = torch.bincount(routed.expert_ids, minlength=self._num_experts)
        slots = routed.slot_of.long()
        by_expert = DeviceWeights(*(_pick(w, slots) for w in (weights.gate_up, weights.down)))
        return self.x[routed.row_ids[order].long()], counts.cumsum(0).int(), by_expert

    def _grouped_mm(self) -> Run:
        x, ends, weights = self._sorted()
        gate_up, down = weights.gate_up.flatten(1, 2).mT, weights.down.mT

        def run() -> Tensor:
            gate, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, dim=1)
            return torch._grouped_mm(silu(gate) * up, down, offs=ends)

        return run

    def _scaled_grouped_mm(self) -> Run:
        x, ends, weights = self._sorted()
        gate_up, down = weights.gate_up.flatten(1, 2).mT, weights.down.mT
        h = torch.randn(x.shape[0], down.shape[1], device=x.device).to(torch.float8_e4m3fn)
        codes = x.to(torch.float8_e4m3fn)

        def product(rows: Tensor, matrices: Tensor) -> Callable[[], Tensor]:
            row_scales = torch.ones(rows.shape[0], device=x.device)
            scales = torch.ones(matrices.shape[0], matrices.shape[2], device=x.device)
            return lambda: torch._scaled_grouped_mm(
                rows, matrices, row_scales, scales, offs=ends, out_dtype=torch.bfloat16
            )

        first, second = product(codes, gate_up), product(h, down)
        return lambda: (first(), second())

    def _loop(self) -> Run:
        x, ends, weights = self._sorted()
        stops = ends.tolist()
        spans = list(zip([0, *stops[:-1]], stops, range(len(stops)), strict=True))
        gate_up = weights.gate_up.flatten(1, 2)

        def run() -> None:
            for start, stop, expert in spans:
                if start < stop:
                    gate, up = (x[start:stop] @ gate_up[expert].t()).chunk(2, dim=1)
                    (silu(gate) * up) @ weights.down[expert].t()

        return run


def _pick(weights: Tensor, slots: Tensor) -> Tensor:
    """weights[slots]; as bytes, since not every torch can index fp8."""
    return weights.view(torch.uint8)[slots].view(weights.dtype)
