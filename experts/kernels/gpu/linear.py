"""Dense products with a weight of the checkpoint, and the gate of a dense MLP.

    linear(x, w) = x . w^T        w [N, K] bfloat16, float32, or float8_e4m3fn with a scale for each
                                  128 x 128 block
    silu_mul(gate_up) = silu(gate_up[:, :f]) * gate_up[:, f:]

Plain weights go to torch's own product (cuBLAS), which picks its order of summation by the shape;
with `deterministic`, and for fp8, the kernel here takes blocks that do not depend on the number of
rows. A few rows against a narrow weight would leave most of the GPU idle: the inner dimension is
then split into parts, fixed by the weight's shape, whose sums are added in order.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from experts.kernels.gpu.combine import sum_parts
from experts.kernels.gpu.grouped_gemm import (
    BLOCKS_SHARING_A_TILE,
    gated_torch,
    multiply_torch,
)
from experts.kernels.gpu.quantise import (
    dequantise_blocks,
    dequantise_rows,
    quantise_rows,
    quantise_rows_torch,
)
from experts.kernels.gpu.tile import (
    SCALED,
    mode_of,
    tile_for,
    tile_of_program,
    two_products,
    weight_operand,
)

_FEW_ROWS: Final = 64
_WANTED_PROGRAMS: Final = 256
"""With few rows: about two for each multiprocessor of the large GPUs (108 to 148 of them)."""
_MIN_PART: Final = 512  # channels; a shorter part is mostly filling and draining of its stages
_SILU_COLUMNS: Final = 1024


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _linear_kernel(
    x, x_scales, w, w_scales, out, num_rows, num_blocks, N, K, x_stride, part,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """out [num_rows, parts, N]: sums over `part` channels each."""
    block, tile = tile_of_program(tl.program_id(0), num_blocks, tl.cdiv(N, 2 * COLUMNS), GROUP)
    index, num_parts = tl.program_id(1), tl.num_programs(1)
    rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = rows < num_rows
    column, num_groups = tile * 2 * COLUMNS, tl.cdiv(K, 128)
    left, right = two_products(
        x + rows * x_stride, x_scales + rows * num_groups if MODE == SCALED else x, is_row,
        w, w_scales, column, column + COLUMNS, N - 1, N - 1,
        column // 128 * num_groups, tl.minimum(column + COLUMNS, N - 1) // 128 * num_groups,
        K, index * part, tl.minimum(index * part + part, K),
        MODE, SWAP, ROWS, COLUMNS, DEPTH, BY_DESCRIPTOR,
    )  # fmt: skip
    columns = column + tl.arange(0, COLUMNS)[None, :]
    out_at = out + (rows * num_parts + index)[:, None] * N + columns
    kind: tl.constexpr = out.dtype.element_ty
    tl.store(out_at, left.to(kind), is_row[:, None] & (columns < N))
    tl.store(out_at + COLUMNS, right.to(kind), is_row[:, None] & (columns < N - COLUMNS))


@triton.jit
def _silu_mul_kernel(gate_up, out, f, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < f
    gate = tl.load(gate_up + row * stride + columns, inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + f + columns, inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * f + columns, result.to(out.dtype.element_ty), inside)


def rows_of_block(num_rows: int, dtype: torch.dtype, *, deterministic: bool) -> int:
    """As block_rows_for of the grouped product: 16 as long as reading the weight is all."""
    if dtype == torch.float32:
        return 32
    if deterministic:
        return 64
    return 16 if num_rows <= 16 else 64 if num_rows <= 512 else 128


def part_of(num_rows: int, num_tiles: int, length: int, *, deterministic: bool) -> int:
    """Channels of a part: all of them unless few rows meet a narrow weight."""
    if deterministic or num_rows > _FEW_ROWS:
        return length
    parts = min(triton.cdiv(_WANTED_PROGRAMS, num_tiles), max(1, length // _MIN_PART))
    return int(triton.cdiv(triton.cdiv(length, parts), 128) * 128)


def linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    fp8_matmul: bool = False,
) -> Tensor:
    """x [T, K] bfloat16 or float32, rows contiguous; weight [N, K] in the dtype of x, or
    float8_e4m3fn with scales [ceil(N/128), ceil(K/128)] float32. Returns [T, N] in out_dtype (that
    of x if not given). fp8_matmul: fp8 weights meet quantised rows. deterministic: a row's bits do
    not depend on the others."""
    _check(x, weight, scales)
    out_dtype = out_dtype or x.dtype
    if scales is None and not deterministic:
        return _multiply(x, weight, out_dtype)
    x_scales = None
    if scales is not None and fp8_matmul:
        x, x_scales = quantise_rows(x)
    (num_rows, length), width = x.shape, weight.shape[0]
    block_rows = rows_of_block(num_rows, x.dtype, deterministic=deterministic)
    mode = mode_of(x, weight)
    tile = tile_for(block_rows, mode, x)
    if mode is SCALED:  # the bounds of a part take registers that 128 x 256 with scales has not
        tile = tile._replace(columns=min(tile.columns, 64))
    num_blocks, num_tiles = triton.cdiv(num_rows, tile.rows), triton.cdiv(width, 2 * tile.columns)
    part = part_of(num_rows, num_tiles, length, deterministic=deterministic)
    parts = triton.cdiv(length, part)
    kind = out_dtype if parts == 1 else torch.float32
    out = torch.empty(num_rows, parts, width, dtype=kind, device=x.device)
    if num_rows:
        w, by_descriptor = weight_operand(weight, mode, tile)
        _linear_kernel[(num_blocks * num_tiles, parts)](
            x, x_scales, w, scales, out,
            num_rows, num_blocks, width, length, x.stride(0), part,
            mode, tile.swap, tile.rows, tile.columns, tile.depth, BLOCKS_SHARING_A_TILE,
            by_descriptor, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out.squeeze(1) if parts == 1 else sum_parts(out, out_dtype)


def _multiply(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """torch's product; bfloat16 operands with a float32 result are not rounded in between."""
    if x.is_cuda and x.dtype == torch.bfloat16 and out_dtype == torch.float32:
        return torch.mm(x, weight.t(), out_dtype=out_dtype)
    return functional.linear(x, weight).to(out_dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2f] -> [T, f] in the same dtype; computed in float32."""
    num_rows, f = gate_up.shape[0], gate_up.shape[1] // 2
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(f"gate_up must be rows [T, 2f], got {tuple(gate_up.shape)}")
    out = torch.empty(num_rows, f, dtype=gate_up.dtype, device=gate_up.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(f, _SILU_COLUMNS))
        _silu_mul_kernel[grid](gate_up, out, f, gate_up.stride(0), _SILU_COLUMNS, num_warps=4)
    return out


def linear_torch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    fp8_matmul: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `linear`."""
    _check(x, weight, scales)
    out_dtype = out_dtype or x.dtype
    rows = x.float()
    if scales is not None and fp8_matmul:
        rows = dequantise_rows(*quantise_rows_torch(x))
    return multiply_torch(rows, dequantise_blocks(weight, scales), deterministic).to(out_dtype)


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same argument as `silu_mul`."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return gated_torch(gate, up).to(gate_up.dtype)


def _check(x: Tensor, weight: Tensor, scales: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight {tuple(weight.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.stride(1) != 1:
        raise ValueError(f"x must be rows of bfloat16 or float32, got {x.dtype}")
    if (scales is not None) != (weight.dtype == torch.float8_e4m3fn):
        raise ValueError(f"scales belong to float8_e4m3fn weights, got {weight.dtype}")
    if scales is None and weight.dtype != x.dtype:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}")
