"""The two products of the routed experts, over the experts that a batch is routed to.

    h[p]         = silu(x[row_ids[p]] . gate^T) * (x[row_ids[p]] . up^T)        for each pair p
    pair_rows[p] = pair_weights[p] * (h[p] . down^T)

gate, up and down are those of the slot slot_of[expert of p]. Only slots of experts with pairs are
read. A program computes one tile of one block of sorted pairs (permute.py, tile.py); unused blocks
lie behind all others and end at once.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.gpu.permute import SortedPairs, max_blocks
from experts.kernels.gpu.quantise import GROUP, dequantise_blocks, dequantise_rows
from experts.kernels.gpu.tile import (
    PLAIN,
    SCALED,
    mode_of,
    tile_for,
    tile_of_program,
    two_products,
    weight_operand,
)

BLOCKS_SHARING_A_TILE: Final = 8
"""8 blocks of 128 rows against 16 tiles of 2 x 128: what a wave of 132 programs reads is small
when both sides are alike."""


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """gate_up [S, 2, f, d] and down [S, d, f] in bfloat16, float32 or float8_e4m3fn; with fp8 also
    gate_up_scales [S, 2, ceil(f/128), ceil(d/128)], down_scales [S, ceil(d/128), ceil(f/128)]
    float32. All contiguous. S slots, f: width of an expert, d: width of a row. Raises ValueError
    when they do not fit each other."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    def __post_init__(self) -> None:
        num_slots, _, f, d = self.gate_up.shape
        rows, columns = triton.cdiv(f, GROUP), triton.cdiv(d, GROUP)
        expected: list[tuple[Tensor | None, tuple[int, ...]]] = [
            (self.gate_up, (num_slots, 2, f, d)),
            (self.down, (num_slots, d, f)),
        ]
        if self.gate_up.dtype == torch.float8_e4m3fn:
            expected += [
                (self.gate_up_scales, (num_slots, 2, rows, columns)),
                (self.down_scales, (num_slots, columns, rows)),
            ]
        for tensor, shape in expected:
            if tensor is None or tensor.shape != shape or not tensor.is_contiguous():
                raise ValueError(f"weights or scales are not {shape}, row-major")

    @property
    def is_fp8(self) -> bool:
        return self.gate_up_scales is not None


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_experts"])
def _gate_up_kernel(
    x, x_scales, w, w_scales, slot_of, order, block_experts, row_ids, h,
    num_pairs, num_blocks, num_experts, f, d, x_stride,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """h[pair] for the pairs of a block and COLUMNS columns; w [S, 2, f, d]."""
    block, tile = tile_of_program(tl.program_id(0), num_blocks, tl.cdiv(f, COLUMNS), GROUP)
    slot = _slot(block, block_experts, slot_of, num_experts)
    if slot < 0:
        return
    pairs = tl.load(order + block * ROWS + tl.arange(0, ROWS))
    is_pair = pairs < num_pairs
    rows = tl.load(row_ids + pairs, is_pair, other=0).to(tl.int64)
    gate_row, up_row = slot * 2 * f + tile * COLUMNS, slot * 2 * f + f + tile * COLUMNS
    last, num_groups = slot * 2 * f + f - 1, tl.cdiv(d, 128)
    scales = (slot * 2 * tl.cdiv(f, 128) + tile * COLUMNS // 128) * num_groups
    gate, up = two_products(
        x + rows * x_stride, x_scales + rows * num_groups if MODE == SCALED else x, is_pair,
        w, w_scales, gate_row, up_row, last, last + f,
        scales, scales + tl.cdiv(f, 128) * num_groups, d, 0, d,
        MODE, SWAP, ROWS, COLUMNS, DEPTH, BY_DESCRIPTOR,
    )  # fmt: skip
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    h_at = h + pairs.to(tl.int64)[:, None] * f + columns[None, :]
    gated = (gate * tl.sigmoid(gate) * up).to(h.dtype.element_ty)
    tl.store(h_at, gated, is_pair[:, None] & (columns < f)[None, :])


@triton.jit(do_not_specialize=["num_pairs", "num_blocks", "num_experts"])
def _down_kernel(
    h, h_scales, w, w_scales, slot_of, order, block_experts, pair_weights, out,
    num_pairs, num_blocks, num_experts, f, d,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """out[pair] for the pairs of a block and twice COLUMNS columns; w [S, d, f]."""
    block, tile = tile_of_program(tl.program_id(0), num_blocks, tl.cdiv(d, 2 * COLUMNS), GROUP)
    if tl.load(block_experts + block) < 0:
        return
    slot = _slot(block, block_experts, slot_of, num_experts)
    pairs = tl.load(order + block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_pair = pairs < num_pairs
    column, num_groups = tile * 2 * COLUMNS, tl.cdiv(f, 128)
    scales = slot * tl.cdiv(d, 128) * num_groups
    left, right = two_products(
        h + pairs * f, h_scales + pairs * num_groups if MODE == SCALED else h, is_pair,
        w, w_scales, slot * d + column, slot * d + column + COLUMNS, slot * d + d - 1,
        slot * d + d - 1, scales + column // 128 * num_groups,
        scales + tl.minimum(column + COLUMNS, d - 1) // 128 * num_groups,
        f, 0, tl.where(slot < 0, 0, f),
        MODE, SWAP, ROWS, COLUMNS, DEPTH, BY_DESCRIPTOR,
    )  # fmt: skip
    # Read again: registers across the loop are few.
    pairs = tl.load(order + block * ROWS + tl.arange(0, ROWS), volatile=True).to(tl.int64)
    is_pair = pairs < num_pairs
    factor = tl.load(pair_weights + pairs, is_pair, other=0.0)[:, None]
    columns = column + tl.arange(0, COLUMNS)[None, :]
    out_at = out + pairs[:, None] * d + columns
    tl.store(out_at, left * factor, is_pair[:, None] & (columns < d))
    tl.store(out_at + COLUMNS, right * factor, is_pair[:, None] & (columns < d - COLUMNS))


@triton.jit
def _slot(block, block_experts, slot_of, num_experts):
    """Slot of a block's expert; -1 for an unused block, dropped pairs, an expert without a slot."""
    expert = tl.load(block_experts + block)
    is_expert = (expert >= 0) & (expert < num_experts)
    return tl.load(slot_of + expert, is_expert, other=-1).to(tl.int64)


def block_rows_for(
    num_pairs: int, num_experts: int, dtype: torch.dtype, *, deterministic: bool = False
) -> int:
    """Rows of a block, from what is known without reading values. dtype: of the weights.

    Weights are read once a block, from L2 if blocks of one expert follow each other; below 64 rows
    an expert the reading is all that counts. deterministic: the same whatever the batch.
    """
    if dtype == torch.float32:
        return 32
    if deterministic:
        return 64
    mean = num_pairs / max(1, num_experts)
    return 16 if mean <= 16 else 64 if mean <= 64 else 128


def gate_up_silu(
    x: Tensor,
    x_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    row_ids: Tensor,
    *,
    out_dtype: torch.dtype,
    deterministic: bool = False,
) -> Tensor:
    """The first product. x [T, d] with rows of contiguous numbers, in the dtype of the weights; for
    fp8 weights e4m3 with x_scales [T, ceil(d/128)], or bfloat16 or float32 without. row_ids [P]
    int32 < T, slot_of [E] int32. Returns [P, f]; rows of dropped pairs are not written.
    deterministic: nothing to do here, the blocks of `pairs` decide (block_rows_for).
    """
    (_, _, f, d), num_pairs = weights.gate_up.shape, row_ids.shape[0]
    mode = _check(x, x_scales, weights.gate_up, slot_of, pairs, row_ids)
    h = torch.empty(num_pairs, f, dtype=out_dtype, device=x.device)
    if not num_pairs:
        return h
    tile = tile_for(pairs.block_rows, mode, x)
    w, by_descriptor = weight_operand(weights.gate_up, mode, tile)
    _gate_up_kernel[(pairs.num_blocks * triton.cdiv(f, tile.columns),)](
        x, x_scales, w, weights.gate_up_scales,
        slot_of, pairs.order, pairs.block_experts, row_ids, h,
        num_pairs, pairs.num_blocks, slot_of.shape[0], f, d, x.stride(0),
        mode, tile.swap, tile.rows, tile.columns, tile.depth, BLOCKS_SHARING_A_TILE,
        by_descriptor, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return h


def down(
    h: Tensor,
    h_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    pair_weights: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """The second product. h [P, f] as gate_up_silu returns it, or quantised with h_scales;
    pair_weights [P] float32. Returns [P, d] float32, zero for dropped pairs."""
    (_, d, f), num_pairs = weights.down.shape, pair_weights.shape[0]
    mode = _check(h, h_scales, weights.down, slot_of, pairs, pair_weights)
    out = torch.empty(num_pairs, d, dtype=torch.float32, device=h.device)
    if not num_pairs:
        return out
    tile = tile_for(pairs.block_rows, mode, h)
    w, by_descriptor = weight_operand(weights.down, mode, tile)
    _down_kernel[(pairs.num_blocks * triton.cdiv(d, 2 * tile.columns),)](
        h, h_scales, w, weights.down_scales,
        slot_of, pairs.order, pairs.block_experts, pair_weights, out,
        num_pairs, pairs.num_blocks, slot_of.shape[0], f, d,
        mode, tile.swap, tile.rows, tile.columns, tile.depth, BLOCKS_SHARING_A_TILE,
        by_descriptor, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _check(
    x: Tensor,
    scales: Tensor | None,
    weight: Tensor,
    slot_of: Tensor,
    pairs: SortedPairs,
    per_pair: Tensor,
) -> tl.constexpr:
    """How to multiply. Raises ValueError for shapes and dtypes that do not fit."""
    mode = mode_of(x, weight)
    if x.ndim != 2 or x.shape[1] != weight.shape[-1] or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} does not fit weights {tuple(weight.shape)}")
    if mode is PLAIN and x.dtype != weight.dtype:
        raise ValueError(f"x {x.dtype}, weights {weight.dtype}")
    if (mode is SCALED) != (scales is not None):
        raise ValueError(f"scales belong to float8_e4m3fn rows, got {x.dtype}")
    if slot_of.dtype != torch.int32 or per_pair.ndim != 1:
        raise ValueError(f"slot_of must be int32, got {slot_of.dtype}")
    num_pairs, num_experts = per_pair.shape[0], slot_of.shape[0]
    if num_pairs and pairs.num_blocks < max_blocks(num_pairs, num_experts, pairs.block_rows):
        raise ValueError(f"{pairs.num_blocks} blocks are of other pairs or experts")
    return mode


def gate_up_silu_torch(
    x: Tensor,
    x_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    row_ids: Tensor,
    *,
    out_dtype: torch.dtype,
    deterministic: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `gate_up_silu`."""
    num_pairs, width = row_ids.shape[0], weights.gate_up.shape[2]
    out = torch.zeros(num_pairs, width, dtype=out_dtype, device=x.device)
    for slot, of_slot in _pairs_by_slot(pairs, slot_of, num_pairs):
        rows = _rows(x, x_scales, row_ids[of_slot].long())
        gate, up = (_matrix(weights.gate_up, weights.gate_up_scales, slot, i) for i in (0, 1))
        gate, up = (multiply_torch(rows, matrix, deterministic) for matrix in (gate, up))
        out[of_slot] = gated_torch(gate, up).to(out_dtype)
    return out


def down_torch(
    h: Tensor,
    h_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    pair_weights: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `down`."""
    num_pairs, hidden = pair_weights.shape[0], weights.down.shape[1]
    out = torch.zeros(num_pairs, hidden, device=h.device)
    for slot, of_slot in _pairs_by_slot(pairs, slot_of, num_pairs):
        matrix = _matrix(weights.down, weights.down_scales, slot)
        rows = multiply_torch(_rows(h, h_scales, of_slot), matrix, deterministic)
        out[of_slot] = rows * pair_weights[of_slot, None]
    return out


def gated_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. On a CPU row by row: torch's exponentials of whole vectors and of what is
    left over differ in the last bit, and which one a number meets depends on its place."""
    if gate.is_cuda:
        return silu(gate) * up
    out = torch.empty_like(gate)
    for row in range(gate.shape[0]):
        out[row] = silu(gate[row]) * up[row]
    return out


def multiply_torch(x: Tensor, matrix: Tensor, deterministic: bool) -> Tensor:
    """x [T, K] . matrix [N, K]^T in float32."""
    if not deterministic:
        return x @ matrix.t()
    # BLAS picks its summation order by the shape, so one row at a time is what fixes it.
    out = torch.empty(x.shape[0], matrix.shape[0], device=x.device)
    for row in range(x.shape[0]):
        out[row] = (x[row : row + 1] @ matrix.t())[0]
    return out


def _pairs_by_slot(pairs: SortedPairs, slot_of: Tensor, num_pairs: int) -> list[tuple[int, Tensor]]:
    """Pairs of each slot that is read; not those of experts without a slot."""
    order = pairs.order.view(pairs.num_blocks, pairs.block_rows).long()
    found = []
    for expert in range(slot_of.shape[0]):
        members = order[pairs.block_experts == expert].flatten()
        members = members[members < num_pairs]
        slot = int(slot_of[expert])
        if members.numel() and slot >= 0:
            found.append((slot, members))
    return found


def _rows(x: Tensor, scales: Tensor | None, index: Tensor) -> Tensor:
    return x[index].float() if scales is None else dequantise_rows(x[index], scales[index])


def _matrix(weights: Tensor, scales: Tensor | None, *index: int) -> Tensor:
    return dequantise_blocks(weights[index], None if scales is None else scales[index])
