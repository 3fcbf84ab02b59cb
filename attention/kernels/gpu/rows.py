"""RMS norm of rows, with the residual addition in front of it.

out = weight * x / sqrt(mean(x^2) + eps), statistics in float32. A program a row, so that a row's
bits do not depend on the others. The CPU's: attention/layers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    """x [T, d] float32 or bfloat16, rows contiguous; weight [d] float32 -> [T, d] out_dtype."""
    return rms_norm_torch(x, weight, eps, out_dtype)


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
    return add_rms_norm_torch(x, delta, weight, eps, out_dtype)


def add_rms_norm_torch(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    """Plain-torch twin of `add_rms_norm`."""
    return rms_norm_torch(x.add_(delta), weight, eps, out_dtype)
