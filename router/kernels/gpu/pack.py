"""Rows in the order in which they are sent, as they are or quantised to fp8 on the way.

fp8: q = x / scale as float8_e4m3fn, scale = max(max|x|, 1e-4) / 448 of each 128 columns, rounded up
to a power of two if ue8m0; x = q * scale. Source: DeepSeek-V3 report section 3.3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
FP8_MAX = 448.0


def pack_rows(x: Tensor, row_index: Tensor) -> Tensor:
    """x [T, d] bfloat16 or float32, row_index [N] int32 (-1: padding, becomes zeros) -> [N, d]."""
    return pack_rows_torch(x, row_index)


def pack_rows_torch(x: Tensor, row_index: Tensor) -> Tensor:
    """Plain-torch twin of `pack_rows`."""
    if not x.shape[0]:
        return x.new_zeros(row_index.shape[0], x.shape[1])
    rows = x.index_select(0, row_index.clamp_min(0))
    return rows.masked_fill_((row_index < 0).unsqueeze(1), 0.0)


def pack_rows_fp8(x: Tensor, row_index: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """As `pack_rows`, quantised: q [N, d] float8_e4m3fn, scales [N, ceil(d / 128)] float32."""
    return pack_rows_fp8_torch(x, row_index, ue8m0=ue8m0)


def pack_rows_fp8_torch(
    x: Tensor, row_index: Tensor, *, ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of `pack_rows_fp8`."""
    rows = pack_rows_torch(x, row_index).float()
    num_rows, width = rows.shape
    num_groups = -(-width // GROUP)
    padded = torch.nn.functional.pad(rows, (0, num_groups * GROUP - width))
    groups = padded.view(num_rows, num_groups, GROUP)
    scales = groups.abs().amax(2).clamp_min(1e-4) / FP8_MAX
    if ue8m0:
        mantissa, exponent = torch.frexp(scales)  # scale = mantissa * 2^exponent, 1/2 <= m < 1
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    q = (groups / scales.unsqueeze(2)).clamp(-FP8_MAX, FP8_MAX)
    return q.view(num_rows, -1)[:, :width].to(torch.float8_e4m3fn), scales
