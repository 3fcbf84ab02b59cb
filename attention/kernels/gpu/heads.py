"""Every head times its own matrix: q' = W_UK^T q_nope and out = W_UV u of the absorbed form.

A tile of rows has the same size whatever the number of rows, so a row's bits depend on that row
only. The CPU's: attention/heads.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multiply_heads(x: Tensor, weight: Tensor) -> Tensor:
    """out[t, h] = weight[h] x[t, h]: x [T, H, >= a], weight [H, b, a] -> [T, H, b] like x.

    float32 or bfloat16, both the same, any strides. Only the first a values of a head of x are
    read.
    """
    return multiply_heads_torch(x, weight)


def multiply_heads_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch twin; a token at a time, so that no row depends on others."""
    data, out = weight.float(), x.new_empty(x.shape[0], *weight.shape[:2])
    for t, token in enumerate(x[:, :, : weight.shape[2]].float()):
        out[t] = (data @ token[:, :, None]).squeeze(-1)
    return out
