"""Seeded weights and routed batches of an expert worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from experts.kernels.gpu.grouped_gemm import DeviceWeights
from gpu_check.accounting import blocks
from gpu_check.plan import Context
from gpu_check.shapes import ModelShape

WeightKind = Literal["float32", "bfloat16", "fp8"]
CODE_STD = 100.0
"""Of random e4m3 codes: few are clamped to 448."""
SPARE_SLOTS = 2
"""Slots that hold NaN: a kernel that reads a slot it was not sent to is found out."""


@dataclass(frozen=True)
class Local:
    """What one worker holds of a layer, and how many of a row's experts it computes."""

    shape: ModelShape
    num_experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.num_experts} local experts"


@dataclass(frozen=True)
class Routed:
    """Pairs of T rows, row after row: P of them."""

    expert_ids: Tensor  # [P] int32
    row_ids: Tensor  # [P] int32
    row_starts: Tensor  # [T + 1] int32
    pair_weights: Tensor  # [P] float32
    slot_of: Tensor  # [E] int32

    @property
    def num_pairs(self) -> int:
        return self.row_ids.shape[0]

    @property
    def num_active(self) -> int:
        """Experts that some pair needs."""
        return int(self.expert_ids.unique().numel())


def random(context: Context, seed: int, *shape: int, std: float = 1.0) -> Tensor:
    """Normal values, float32."""
    generator = context.generator(seed)
    return torch.randn(shape, device=context.device, generator=generator).mul_(std)


def device_weights(context: Context, local: Local, kind: WeightKind, seed: int) -> DeviceWeights:
    """Every expert in a slot, and SPARE_SLOTS that must not be read."""
    hidden, width = local.shape.hidden_size, local.shape.moe_intermediate_size
    slots = local.num_experts + SPARE_SLOTS
    shapes = ((slots, 2, width, hidden), (slots, hidden, width))
    matrices = [_matrices(context, kind, seed + i, *shape) for i, shape in enumerate(shapes)]
    (gate_up, gate_up_scales), (down, down_scales) = matrices
    return DeviceWeights(gate_up, down, gate_up_scales, down_scales)


def _matrices(
    context: Context, kind: WeightKind, seed: int, *shape: int
) -> tuple[Tensor, Tensor | None]:
    """A slot at a time, so that float32 never exists for all of them."""
    dtype = torch.float8_e4m3fn if kind == "fp8" else getattr(torch, kind)
    data = torch.empty(shape, dtype=dtype, device=context.device)
    std = shape[-1] ** -0.5
    code_std = CODE_STD if kind == "fp8" else std
    for slot in range(shape[0] - SPARE_SLOTS):
        values = random(context, seed * 1000 + slot, *shape[1:], std=code_std)
        data[slot] = values.clamp_(-448, 448).to(dtype)
    data[-SPARE_SLOTS:] = torch.full(shape[1:], torch.nan, device=context.device).to(dtype)
    if kind != "fp8":
        return data, None
    grid = (*shape[:-2], blocks(shape[-2]), blocks(shape[-1]))
    factors = torch.rand(grid, device=context.device, generator=context.generator(seed)).add_(0.5)
    return data, factors.mul_(std / CODE_STD)


def route(
    context: Context, local: Local, rows: int, seed: int, *, num_used: int | None = None
) -> Routed:
    """Every row to top_k of the first `num_used` experts (all of them), evenly at random."""
    generator, top_k = context.generator(seed), local.top_k
    scores = torch.rand(
        rows, num_used or local.num_experts, device=context.device, generator=generator
    )
    expert_ids = scores.topk(top_k, dim=1).indices.sort(dim=1).values.int().flatten()
    numbers = torch.arange(rows * top_k, device=context.device, dtype=torch.int32)
    slots = torch.randperm(local.num_experts, device=context.device, generator=generator)
    return Routed(
        expert_ids=expert_ids,
        row_ids=numbers // top_k,
        row_starts=torch.arange(rows + 1, device=context.device, dtype=torch.int32) * top_k,
        pair_weights=torch.rand(rows * top_k, device=context.device, generator=generator),
        slot_of=slots.int(),
    )
