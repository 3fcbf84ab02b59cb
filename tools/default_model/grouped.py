"""The routed experts of a layer as one differentiable operation.

    y[t] = sum_k w[t,k] * Down_e( silu(Gate_e x[t]) * Up_e x[t] ),  e = ids[t,k]

Rows are sorted by expert, each expert is three plain products over its rows, and the backward pass
is written out: autograd over slices of stacked weights fills a zero tensor of all experts per
slice. The weight multiplies the activation, not the output, which saves a pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class GroupedSwiglu(torch.autograd.Function):
    """x [T, d], ids [T, k], weights [T, k], gate_up [E, 2w, d], down [E, d, w] -> [T, d]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=len(down)).tolist()
        rows, pair_weights = order // ids.shape[1], weights.flatten()[order]
        hidden = x.new_empty(len(order), gate_up.shape[1])
        y = x.new_empty(len(order), x.shape[1])
        for e, part in _parts(counts):
            torch.mm(x[rows[part]], gate_up[e].T, out=hidden[part])
            gate, up = hidden[part].chunk(2, dim=1)
            activated = F.silu(gate).mul_(up).mul_(pair_weights[part, None])
            torch.mm(activated, down[e].T, out=y[part])
        ctx.save_for_backward(x, rows, pair_weights, hidden, order, gate_up, down)
        ctx.counts, ctx.top_k = counts, ids.shape[1]
        return _sum_pairs(y, order, ids.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rows, pair_weights, hidden, order, gate_up, down = ctx.saved_tensors
        grad_pair_weights = torch.empty_like(pair_weights)
        grad_x = x.new_empty(len(order), x.shape[1])
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e, part in _parts(ctx.counts):
            x_e, grad_e = x[rows[part]], grad[rows[part]]
            gate, up = hidden[part].chunk(2, dim=1)
            share = gate.sigmoid()
            silu = gate * share
            product = silu * up
            grad_product = grad_e @ down[e]
            torch.sum(grad_product * product, dim=1, out=grad_pair_weights[part])
            weight = pair_weights[part, None]
            torch.mm(grad_e.T, product.mul_(weight), out=grad_down[e])
            grad_product.mul_(weight)
            # d silu(g)/dg = s (1 + g (1 - s)) = s + silu(g) (1 - s)
            slope = torch.addcmul(share, silu, 1 - share)
            grad_hidden = torch.cat([slope.mul_(grad_product).mul_(up), silu.mul_(grad_product)], 1)
            torch.mm(grad_hidden.T, x_e, out=grad_gate_up[e])
            torch.mm(grad_hidden, gate_up[e], out=grad_x[part])
        grad_weights = torch.empty_like(grad_pair_weights)
        grad_weights[order] = grad_pair_weights
        grad_x = _sum_pairs(grad_x, order, ctx.top_k)
        return grad_x, None, grad_weights.view(-1, ctx.top_k), grad_gate_up, grad_down


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    parts, start = [], 0
    for e, count in enumerate(counts):
        if count:
            parts.append((e, slice(start, start + count)))
        start += count
    return parts


def _sum_pairs(values: Tensor, order: Tensor, top_k: int) -> Tensor:
    """Sorted pair rows [T * k, d] -> their sums by token [T, d]."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return F.embedding_bag(place.view(-1, top_k), values, mode="sum")
