"""Matrices that belong to one head each, and the product of every head with its own."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attention.compiled import entry_points
from experts.kernels.runtime import kernels
from experts.linear import SUPPORTED_DTYPES

_pack_arguments = struct.Struct("12q").pack


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """data [H, width, length] float32 or bfloat16; the matrix of a head is contiguous, heads may
    lie apart (views of kv_b)."""

    data: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"head weights are {self.data.dtype}, not float32 or bfloat16")
        if self.data.stride()[1:] != (self.data.shape[2], 1):
            raise ValueError(f"a head's matrix must be row-major, strides {self.data.stride()}")

    @cached_property
    def operand(self) -> tuple[int, int, int, int, int, int]:
        """kind, address, bytes from head to head, H, width, length: what the kernel reads."""
        data = self.data
        kind = SUPPORTED_DTYPES.index(data.dtype)
        return kind, data.data_ptr(), data.stride(0) * data.itemsize, *data.shape


def multiply_heads(x: Tensor, weights: HeadWeights) -> Tensor:
    """out[t, h] = weights[h] x[t, h]: x [T, H, >= length] float32 -> [T, H, width] float32.

    Only the first `length` values of a head of x are read. A row's bits depend on that row only.
    """
    entry = entry_points()
    if entry is None:
        return multiply_heads_torch(x, weights)
    num_rows, num_heads, _ = x.shape
    out = torch.empty(num_rows, num_heads, weights.data.shape[1])
    row_stride, head_stride, _ = x.stride()
    entry.multiply_heads(
        _pack_arguments(
            kernels().pool_address, *weights.operand, x.data_ptr(), 4 * row_stride, 4 * head_stride,
            num_rows, out.data_ptr(),
        )
    )  # fmt: skip
    return out


def multiply_heads_torch(x: Tensor, weights: HeadWeights) -> Tensor:
    """Plain-torch twin; a token at a time, so that no row depends on others."""
    data = weights.data.float()
    rows = [data @ token[:, : data.shape[2], None] for token in x]
    return torch.stack(rows).squeeze(-1)
