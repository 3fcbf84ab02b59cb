"""Dense products with a weight of the checkpoint, and the gate of a dense MLP.

    linear(x, w) = x . w^T        w [N, K] bfloat16, float32, or float8_e4m3fn with a scale for each
                                  128 x 128 block
    silu_mul(gate_up) = silu(gate_up[:, :f]) * gate_up[:, f:]

Plain weights go to torch's own product (cuBLAS), which picks its order of summation by the shape;
with `deterministic`, and for fp8, the kernel here takes blocks that do not depend on the number of
rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.gpu.grouped_gemm import multiply_torch
from experts.kernels.gpu.quantise import (
    dequantise_blocks,
    dequantise_rows,
    quantise_rows_torch,
)


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
    return (silu(gate) * up).to(gate_up.dtype)


def _check(x: Tensor, weight: Tensor, scales: Tensor | None) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight {tuple(weight.shape)}")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.stride(1) != 1:
        raise ValueError(f"x must be rows of bfloat16 or float32, got {x.dtype}")
    if (scales is not None) != (weight.dtype == torch.float8_e4m3fn):
        raise ValueError(f"scales belong to float8_e4m3fn weights, got {weight.dtype}")
    if scales is None and weight.dtype != x.dtype:
        raise ValueError(f"x {x.dtype}, weight {weight.dtype}")
