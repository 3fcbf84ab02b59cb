"""Absorbed MLA over the paged latent cache: one query token at a time against its own context.

For token t and head h with the cached rows z (latent, c wide) and k (rotated key, r wide):
score_s = (q_latent . z_s + q_pe . k_s) * scale, p = softmax(score) over the visible s,
u = sum_s p_s z_s. (The absorbed form of multi-head latent attention; the value is the latent.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Attend each token to the first `context_lens[t]` cached tokens of its sequence.

    q_latent [T, H, c] float32 (q_nope already multiplied by W_UK); q_pe [T, H, r] float32, rotated;
    kv_cache [num_blocks, block_size, c + r] float32 or bfloat16; block_tables [B, max_blocks]
    int32, entries past a context are not read; seq_ids [T] int32, the row of block_tables of each
    token; context_lens [T] int32 >= 1, the token itself included (causal: each token has its own).
    Returns u [T, H, c] float32. A token's row does not depend on the other tokens of the call.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check(q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens)
    return mla_decode_torch(q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens, scale)


def _check(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
) -> None:
    num_tokens, num_heads, latent = q_latent.shape
    if q_pe.shape[:2] != (num_tokens, num_heads) or kv_cache.shape[2] != latent + q_pe.shape[2]:
        raise ValueError(f"q_latent {q_latent.shape}, q_pe {q_pe.shape}, cache {kv_cache.shape}")
    if q_latent.dtype != torch.float32 or q_pe.dtype != torch.float32:
        raise ValueError(f"queries must be float32, got {q_latent.dtype} and {q_pe.dtype}")
    if kv_cache.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kv_cache must be float32 or bfloat16, got {kv_cache.dtype}")
    for name, ids in (("block_tables", block_tables), ("seq_ids", seq_ids)):
        if ids.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {ids.dtype}")
    if context_lens.dtype != torch.int32 or not (
        seq_ids.shape == context_lens.shape == (num_tokens,)
    ):
        raise ValueError(f"seq_ids and context_lens must be [{num_tokens}] int32")


def mla_decode_torch(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Plain-torch twin: oracle and fall-back; a token at a time, so no row depends on others."""
    latent, block_size = q_latent.shape[2], kv_cache.shape[1]
    queries = torch.cat([q_latent, q_pe], dim=2)  # [T, H, c + r]
    out = torch.empty_like(q_latent)
    for t, (seq, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        blocks = block_tables[seq, : -(-length // block_size)].long()
        rows = kv_cache[blocks].flatten(0, 1)[:length].float()  # [S, c + r]
        scores = (queries[t] @ rows.t()) * scale  # [H, S]
        out[t] = scores.softmax(dim=1) @ rows[:, :latent]
    return out
