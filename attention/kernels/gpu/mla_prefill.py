"""MLA over whole prompt chunks in the naive form: keys and values expanded from the latents.

For query i of a sequence with Q new tokens in a context of S, and head h:
score_s = (q_nope . k_nope_s + q_pe . k_pe_s) * scale over s <= S - Q + i, out = softmax(score) v.
The Q queries are the last of the context: whatever lies before them is a cached prefix. k_pe is one
row for all heads, so it stays apart (two dots) instead of being copied H times into the keys. The
CPU's: attention/mla.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.mla import QUERY_BLOCK


def mla_prefill(
    q: Tensor,
    kv: Tensor,
    k_pe: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    scale: float,
) -> Tensor:
    """Attend the chunks of B sequences, each to its own context.

    q [Q, H, n + r], rotated; kv [S, H, n + v]: each cached token's keys without the rope part, then
    its values; k_pe [S, r], rotated. float32 or bfloat16, all the same, the last dimension
    contiguous. cu_q, cu_k [B + 1] int32: sequence b has queries cu_q[b] .. cu_q[b + 1] - 1, the
    last ones of its context, rows cu_k[b] .. cu_k[b + 1] - 1 of kv; max_q: at least the longest
    chunk. Queries past cu_q[B] (padding) keep undefined rows. Returns [Q, H, v] like q.
    """
    return mla_prefill_torch(q, kv, k_pe, cu_q, cu_k, max_q, scale)


def mla_prefill_torch(
    q: Tensor,
    kv: Tensor,
    k_pe: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    scale: float,
) -> Tensor:
    """Plain-torch twin; reads the lengths, which waits for a device."""
    del max_q
    nope = q.shape[2] - k_pe.shape[1]
    keys = torch.cat([kv[:, :, :nope], k_pe[:, None].expand(-1, q.shape[1], -1)], dim=2)
    out = q.new_zeros(*q.shape[:2], kv.shape[2] - nope)
    bounds = zip(*(torch.stack([cu[:-1], cu[1:]]).tolist() for cu in (cu_q, cu_k)), strict=True)
    (q_starts, k_starts), (q_stops, k_stops) = bounds
    for q0, q1, k0, k1 in zip(q_starts, q_stops, k_starts, k_stops, strict=True):
        for start in range(q0, q1, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q1)
            seen = k1 - (q1 - stop)  # the last query of the block sees rows up to here
            scores = torch.einsum("qhw,shw->hqs", q[start:stop].float(), keys[k0:seen].float())
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
            later = later.triu_(seen - k0 - (stop - start) + 1)
            weights = (scores * scale).masked_fill_(later, -torch.inf).softmax(dim=2)
            out[start:stop] = torch.einsum("hqs,shv->qhv", weights, kv[k0:seen, :, nope:].float())
    return out
