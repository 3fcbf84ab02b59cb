"""Rows in the order in which they are sent, as they are or quantised to fp8 on the way.

fp8: the rule of experts/kernels/gpu/quantise.py, applied while the row is copied.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.kernels.gpu.fp8 import encode_e4m3
from experts.kernels.gpu.quantise import GROUP, quantise_rows_torch

_BLOCK: Final = 1024
"""Columns a program copies: 16 bytes of bfloat16 a thread with 4 warps. Not measured on a GPU."""


# A worker's part of the index begins anywhere, and one number of it is read.
@triton.jit(do_not_specialize_on_alignment=["row_index"])
def _pack_kernel(x, row_index, out, width, x_stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_index + place).to(tl.int64)
    values = tl.load(x + row * x_stride + columns, (columns < width) & (row >= 0), other=0.0)
    tl.store(out + place * width + columns, values, columns < width)


@triton.jit(do_not_specialize_on_alignment=["row_index"])
def _pack_fp8_kernel(
    x, row_index, codes, scales, width, num_groups, x_stride,
    UE8M0: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    row = tl.load(row_index + place).to(tl.int64)
    values = tl.load(x + row * x_stride + columns, (columns < width) & (row >= 0), other=0.0)
    values = values.to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4), 448.0)
    if UE8M0:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = exponent.to(tl.float32, bitcast=True)
    scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    scaled = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(codes + place * width + columns, encode_e4m3(scaled), columns < width)
    tl.store(scales + place * num_groups + groups, scale, groups < num_groups)


def pack_rows(x: Tensor, row_index: Tensor) -> Tensor:
    """x [T, d] bfloat16 or float32, row_index [N] int32 (-1: padding, becomes zeros) -> [N, d]."""
    _check(x, row_index)
    num_places, width = row_index.shape[0], x.shape[1]
    out = torch.empty(num_places, width, dtype=x.dtype, device=x.device)
    if num_places:
        grid = (num_places, triton.cdiv(width, _BLOCK))
        _pack_kernel[grid](x, row_index, out, width, x.stride(0), _BLOCK, num_warps=4)
    return out


def pack_rows_torch(x: Tensor, row_index: Tensor) -> Tensor:
    """Plain-torch twin of `pack_rows`."""
    _check(x, row_index)
    if not x.shape[0]:
        return x.new_zeros(row_index.shape[0], x.shape[1])
    rows = x.index_select(0, row_index.clamp_min(0))
    return rows.masked_fill_((row_index < 0).unsqueeze(1), 0.0)


def pack_rows_fp8(x: Tensor, row_index: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """As `pack_rows`, quantised: q [N, d] float8_e4m3fn, scales [N, ceil(d / 128)] float32."""
    _check(x, row_index)
    num_places, width = row_index.shape[0], x.shape[1]
    num_groups = triton.cdiv(width, GROUP)
    q = torch.empty(num_places, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_places, num_groups, dtype=torch.float32, device=x.device)
    if num_places:
        groups = _BLOCK // GROUP
        _pack_fp8_kernel[(num_places, triton.cdiv(num_groups, groups))](
            x, row_index, q.view(torch.uint8), scales, width, num_groups, x.stride(0),
            ue8m0, groups, GROUP, num_warps=2,
        )  # fmt: skip
    return q, scales


def pack_rows_fp8_torch(
    x: Tensor, row_index: Tensor, *, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of `pack_rows_fp8`."""
    return quantise_rows_torch(pack_rows_torch(x, row_index), ue8m0=ue8m0)


def _check(x: Tensor, row_index: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float32) or x.stride(1) != 1:
        raise ValueError(f"x must be rows of bfloat16 or float32, got {tuple(x.shape)} {x.dtype}")
    if row_index.ndim != 1 or row_index.dtype != torch.int32 or not row_index.is_contiguous():
        raise ValueError("row_index must be int32 [N], contiguous")
