"""The answers of the workers, summed row by row.

y[t] = sum over workers w, ascending, of rows[index[t, w]]      float32, a fixed order
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine_rows(rows: Tensor, index: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """rows [N, d] bfloat16 or float32, index [T, W] int32 (-1: none) -> [T, d] of out_dtype.

    A row that no worker answers is zero.
    """
    return combine_rows_torch(rows, index, out_dtype)


def combine_rows_torch(
    rows: Tensor, index: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Plain-torch twin of `combine_rows`."""
    total = rows.new_zeros(index.shape[0], rows.shape[1], dtype=torch.float32)
    if rows.shape[0]:
        for places in index.unbind(1):
            answers = rows.index_select(0, places.clamp_min(0)).float()
            total += answers.masked_fill_((places < 0).unsqueeze(1), 0.0)
    return total.to(out_dtype)
