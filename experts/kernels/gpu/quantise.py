"""Activations as fp8: one scale for each 128 channels of a row.

    scale = max(max|x|, 1e-4) / 448        (ue8m0: rounded up to a power of two)
    q     = e4m3(clamp(x / scale, -448, 448)),  x ~ q * scale

Divisions are IEEE ones and the cast rounds to nearest even, so that kernel and twin give the same
codes. A product with a weight of 128 x 128 blocks is then, for each 128 of the inner dimension,
(q . q) * scale_x * scale_w, summed in float32.

Sources: (1) DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2; (2) act_quant in the inference
code published with DeepSeek-V3.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.kernels.gpu.fp8 import encode_e4m3

GROUP: Final = 128
"""Channels that share a scale; the side of a weight's block too."""
FP8_MAX: Final = 448.0
MIN_AMAX: Final = 1e-4
_GROUPS_PER_PROGRAM: Final = 8  # 2 KiB of bfloat16: 16-byte accesses, two warps; not measured


@triton.jit
def _quantise_kernel(
    x, q, scales, d, num_groups, x_stride, UE8M0: tl.constexpr, GROUPS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = columns < d
    values = tl.load(x + row * x_stride + columns, inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=1), 1e-4), 448.0)
    if UE8M0:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = exponent.to(tl.float32, bitcast=True)
    codes = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    codes = tl.clamp(codes, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(q + row * d + columns, encode_e4m3(codes), inside)
    tl.store(scales + row * num_groups + groups, scale, groups < num_groups)


def quantise_rows(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, d] bfloat16 or float32, rows contiguous (they may lie apart).

    Returns q [T, d] float8_e4m3fn and scales [T, ceil(d / 128)] float32.
    """
    _check(x)
    num_rows, d = x.shape
    num_groups = -(-d // GROUP)
    q = torch.empty(num_rows, d, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, num_groups, dtype=torch.float32, device=x.device)
    if num_rows:
        grid = (num_rows, triton.cdiv(num_groups, _GROUPS_PER_PROGRAM))
        _quantise_kernel[grid](
            x,
            q.view(torch.uint8),
            scales,
            d,
            num_groups,
            x.stride(0),
            ue8m0,
            _GROUPS_PER_PROGRAM,
            num_warps=2,
        )
    return q, scales


def quantise_rows_torch(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `quantise_rows`."""
    _check(x)
    num_rows, d = x.shape
    num_groups = -(-d // GROUP)
    groups = torch.zeros(num_rows, num_groups * GROUP, device=x.device)
    groups[:, :d] = x
    groups = groups.view(num_rows, num_groups, GROUP)
    scales = groups.abs().amax(dim=2).clamp_min(MIN_AMAX)
    scales /= torch.full_like(scales, FP8_MAX)  # by a number CUDA would multiply with its inverse
    if ue8m0:
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    codes = (groups / scales[:, :, None]).clamp(-FP8_MAX, FP8_MAX).view(num_rows, -1)[:, :d]
    return codes.to(torch.float8_e4m3fn), scales


def dequantise_rows(q: Tensor, scales: Tensor) -> Tensor:
    """q [T, d] e4m3, scales [T, ceil(d / 128)] -> [T, d] float32. Plain torch, for the twins."""
    return q.float() * scales.repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]


def dequantise_blocks(weight: Tensor, scales: Tensor | None) -> Tensor:
    """weight [N, K], scales [ceil(N/128), ceil(K/128)] or None -> [N, K] float32, for the twins."""
    if scales is None:
        return weight.float()
    return dequantise_rows(weight, scales.repeat_interleave(GROUP, dim=0)[: weight.shape[0]])


def _check(x: Tensor) -> None:
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float32) or x.stride(1) != 1:
        raise ValueError(f"x must be rows of bfloat16 or float32, got {tuple(x.shape)} {x.dtype}")
