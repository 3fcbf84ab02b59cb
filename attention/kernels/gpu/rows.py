"""RMS norm of rows, with the residual addition in front of it.

out = weight * x / sqrt(mean(x^2) + eps), statistics in float32. A program a row, so that a row's
bits do not depend on the others. The CPU's: attention/layers.py.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _norm_kernel(
    x, delta, weight, out, x_stride, delta_stride, width, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    values = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(delta + row * delta_stride + columns, mask=mask, other=0.0)
        tl.store(x + row * x_stride + columns, values, mask=mask)
    factor = tl.rsqrt(tl.sum(values * values) / width + eps)
    normed = values * factor * tl.load(weight + columns, mask=mask, other=0.0)
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """x [T, d] float32 or bfloat16, rows contiguous; weight [d] float32 -> [T, d] out_dtype."""
    return _launch(x, None, weight, eps, out_dtype)


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """Plain-torch twin of `rms_norm`."""
    values = x.float()
    factor = torch.rsqrt(values.square().mean(dim=1, keepdim=True) + eps)
    return (values * factor * weight).to(out_dtype)


def add_rms_norm(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """x += delta in place, then rms_norm(x): x [T, d] float32, the residual stream; delta [T, d]
    float32 or bfloat16."""
    if x.dtype != torch.float32 or delta.shape != x.shape or delta.stride(-1) != 1:
        raise ValueError(
            f"x must be float32, delta like it with contiguous rows: {tuple(x.shape)} {x.dtype}, "
            f"{tuple(delta.shape)} {delta.dtype}, strides {delta.stride()}"
        )
    return _launch(x, delta, weight, eps, out_dtype)


def add_rms_norm_torch(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Plain-torch twin of `add_rms_norm`."""
    return rms_norm_torch(x.add_(delta), weight, eps, out_dtype)


def _launch(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    num_rows, width = x.shape
    if weight.shape != (width,) or weight.dtype != torch.float32 or x.stride(1) != 1:
        raise ValueError(
            f"weight must be [{width}] float32 and rows contiguous: {tuple(weight.shape)} "
            f"{weight.dtype}, strides of x {x.stride()}"
        )
    out = torch.empty(num_rows, width, dtype=out_dtype, device=x.device)
    if not num_rows:
        return out
    block = triton.next_power_of_2(width)
    _norm_kernel[(num_rows,)](
        x, delta, weight, out, x.stride(0), 0 if delta is None else delta.stride(0), width, eps,
        ADD=delta is not None, BLOCK=block, num_warps=_num_warps(block),
    )  # fmt: skip
    return out


def _num_warps(block: int) -> int:
    """Eight values a thread are one load of 16 bytes in bfloat16, two in float32; rows of 7168 get
    the 16 warps that keep four such loads in flight a thread. Not measured on a GPU."""
    return min(max(block // 256, 1), 16)
