"""Every head times its own matrix: q' = W_UK^T q_nope and out = W_UV u of the absorbed form.

A tile of rows has the same size whatever the number of rows, so a row's bits depend on that row
only. The CPU's: attention/heads.py.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.kernels.gpu.products import multiply_add


@triton.jit(do_not_specialize=["num_rows"])
def _heads_kernel(
    x, weight, out, num_rows, width, length, x_row, x_head, w_head, w_row, w_column,
    BLOCK_T: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    num_tiles = tl.cdiv(width, BLOCK_B)
    rows = tl.program_id(0) // num_tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(0) % num_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
    rows_mask, columns_mask = rows[:, None] < num_rows, columns[None, :] < width
    rows = rows.to(tl.int64)
    x_rows = x + rows[:, None] * x_row + head * x_head
    w_columns = weight + head.to(tl.int64) * w_head + columns[None, :] * w_row
    total = tl.zeros((BLOCK_T, BLOCK_B), tl.float32)
    for start in tl.range(0, length, BLOCK_A):
        inner = start + tl.arange(0, BLOCK_A)
        a_mask = inner < length
        a = tl.load(x_rows + inner[None, :], mask=rows_mask & a_mask[None, :], other=0.0)
        b_mask = columns_mask & a_mask[:, None]
        b = tl.load(w_columns + inner[:, None] * w_column, mask=b_mask, other=0.0)
        total = multiply_add(a, b, total)
    target = out + (rows[:, None] * num_heads + head) * width + columns[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=rows_mask & columns_mask)


def multiply_heads(x: Tensor, weight: Tensor) -> Tensor:
    """out[t, h] = weight[h] x[t, h]: x [T, H, >= a], weight [H, b, a] -> [T, H, b] like x.

    float32 or bfloat16, both the same; the last dimension of x contiguous, any other strides. Only
    the first a values of a head of x are read.
    """
    num_rows, num_heads, available = x.shape
    num_matrices, width, length = weight.shape
    if num_matrices != num_heads or available < length or x.stride(2) != 1:
        raise ValueError(
            f"x {tuple(x.shape)} with strides {x.stride()} times {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}")
    out = torch.empty(num_rows, num_heads, width, dtype=x.dtype, device=x.device)
    if not num_rows:
        return out
    block_t, block_b, block_a, num_warps = _blocks(width, length, x.dtype)
    tiles = triton.cdiv(num_rows, block_t) * triton.cdiv(width, block_b)
    _heads_kernel[(tiles, num_heads)](
        x, weight, out, num_rows, width, length, x.stride(0), x.stride(1), *weight.stride(),
        block_t, block_b, block_a, num_warps=num_warps, num_stages=3,
    )  # fmt: skip
    return out


def multiply_heads_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch twin; a token at a time, so that no row depends on others."""
    data, out = weight.float(), x.new_empty(x.shape[0], *weight.shape[:2])
    for t, token in enumerate(x[:, :, : weight.shape[2]].float()):
        out[t] = (data @ token[:, :, None]).squeeze(-1)
    return out


def _blocks(width: int, length: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows, columns, depth of a tile, warps. In a decode step the weights are most of what is read
    (16.8 MB for 128 heads of 512 x 128) and 64 rows take all of a matrix instruction of sm_90; a
    row count may not choose the tile, which chooses the order of the sum. Three stages of
    (64 + 128) x 64 bfloat16 are 72 KiB. Not measured on a GPU."""
    if dtype == torch.float32:  # only for exact tests
        return 16, _at_most(32, width), _at_most(32, length), 4
    return 64, _at_most(128, width), _at_most(64, length), 4


def _at_most(limit: int, size: int) -> int:
    padded: int = triton.next_power_of_2(size)
    return min(limit, max(16, padded))
