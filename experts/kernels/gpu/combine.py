"""The results of the experts of a row, added up in float32 in the order in which they lie.

    out[t] = 0 + pair_rows[row_starts[t]] + ... + pair_rows[row_starts[t + 1] - 1]

The order is fixed, so a row's bits depend on its own pairs only.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_COLUMNS: Final = 1024  # 8 float32 a thread of 4 warps: two 16-byte loads; not measured


@triton.jit
def _sum_kernel(pair_rows, row_starts, out, d, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """PER_ROW: pairs of every row; 0: row_starts says."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < d
    start, stop = row * PER_ROW, row * PER_ROW + PER_ROW
    if PER_ROW == 0:
        start, stop = (
            tl.load(row_starts + row).to(tl.int64),
            tl.load(row_starts + row + 1).to(tl.int64),
        )
    total = tl.zeros((BLOCK,), tl.float32)
    for pair in range(start, stop):
        total += tl.load(pair_rows + pair * d + columns, inside, other=0.0)
    tl.store(out + row * d + columns, total.to(out.dtype.element_ty), inside)


def sum_pairs(
    pair_rows: Tensor, row_starts: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """pair_rows [P, d] float32; row_starts [T + 1] int32, ascending, row t has the pairs
    row_starts[t]..row_starts[t+1]-1, none if both are equal -> [T, d]."""
    _check(pair_rows, row_starts)
    num_rows, d = row_starts.shape[0] - 1, pair_rows.shape[1]
    out = torch.empty(num_rows, d, dtype=out_dtype, device=pair_rows.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(d, _BLOCK_COLUMNS))
        _sum_kernel[grid](pair_rows, row_starts, out, d, 0, _BLOCK_COLUMNS, num_warps=4)
    return out


def sum_parts(parts: Tensor, out_dtype: torch.dtype) -> Tensor:
    """parts [T, S, d] float32 -> [T, d]: for a product whose inner dimension was split in S."""
    num_rows, num_parts, d = parts.shape
    out = torch.empty(num_rows, d, dtype=out_dtype, device=parts.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(d, _BLOCK_COLUMNS))
        _sum_kernel[grid](parts, None, out, d, num_parts, _BLOCK_COLUMNS, num_warps=4)
    return out


def sum_pairs_torch(
    pair_rows: Tensor, row_starts: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `sum_pairs`."""
    _check(pair_rows, row_starts)
    starts, counts = row_starts[:-1].long(), row_starts.diff()
    out = torch.zeros(counts.shape[0], pair_rows.shape[1], device=pair_rows.device)
    for rank in range(int(counts.max()) if counts.numel() else 0):
        rows = (counts > rank).nonzero().squeeze(1)
        out[rows] += pair_rows[starts[rows] + rank]
    return out.to(out_dtype)


def _check(pair_rows: Tensor, row_starts: Tensor) -> None:
    if pair_rows.ndim != 2 or pair_rows.dtype != torch.float32 or not pair_rows.is_contiguous():
        raise ValueError(f"pair_rows must be [P, d] float32, got {pair_rows.dtype}")
    if row_starts.ndim != 1 or row_starts.dtype != torch.int32 or row_starts.shape[0] < 1:
        raise ValueError(f"row_starts must be [T + 1] int32, got {row_starts.dtype}")
