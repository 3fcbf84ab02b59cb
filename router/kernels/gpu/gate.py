"""The gate on a GPU: router logits, then the experts of each row with their weights.

    logits = float32(x) float32(Wg)^T                   products of bfloat16 are exact in float32
    select_experts: the formulas of router/gate.py

Sources: DeepSeek-V2 report section 2.2.2, DeepSeek-V3 report section 2.1.2 and its inference code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from router import gate as host_gate
from router.gate import GateSpec


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, d], weight [E, d], bfloat16 or float32 each -> logits [T, E] float32.

    A row's bits depend on the row alone.
    """
    return gate_logits_torch(x, weight)


def gate_logits_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch twin of `gate_logits`: one product a row, whatever the batch."""
    by_row = x.float().unsqueeze(1)  # [T, 1, d]
    return torch.bmm(by_row, weight.float().T.expand(x.shape[0], -1, -1)).squeeze(1)


def select_experts(
    logits: Tensor, bias: Tensor | None, spec: GateSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, E] float32, bias [E] float32 (it only chooses) -> the k experts of each row.

    Returns topk_ids [T, k] int32, ascending in each row, topk_weights [T, k] float32, and bad_row
    [1] int32: the first row whose logits are not all finite, T if there is none. Such a row is
    answered as if its logits were zero, so that nothing after it reads a wild index.
    """
    return select_experts_torch(logits, bias, spec)


def select_experts_torch(
    logits: Tensor, bias: Tensor | None, spec: GateSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin of `select_experts`."""
    finite = logits.isfinite().all(dim=1)  # [T]
    logits = logits.masked_fill(~finite.unsqueeze(1), 0.0)
    topk_ids, topk_weights = host_gate.select_experts_torch(logits, bias, spec)
    bad_row = finite.int().cumprod(0).sum(0, keepdim=True)
    return topk_ids.int(), topk_weights, bad_row.int()
