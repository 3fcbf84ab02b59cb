"""Absorbed MLA over the paged latent cache: a query token at a time against its own context.

For token t and head h with the cached rows z (latent, c wide) and k (rotated key, r wide):
score_s = (q_latent . z_s + q_pe . k_s) * scale, p = softmax(score), u = sum_s p_s z_s. The
CPU's: attention/kernels/mla_decode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.kernels.gpu.cache_layout import CacheLayout, read_rows

FIXED_SPLITS = 4
"""Splits of every context in deterministic mode: a row's bits depend on how its context is cut, so
there the cut may not follow the batch."""
MAX_SPLITS = 32


def pick_num_splits(
    num_tokens: int, num_heads: int, num_sms: int, max_context: int, deterministic: bool
) -> int:
    """In how many parts to cut each context."""
    del num_tokens, num_heads, num_sms, max_context, deterministic
    return FIXED_SPLITS


def mla_decode(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    num_splits: int,
    native_fp8: bool = True,
) -> Tensor:
    """Attend each token to the first `context_lens[t]` cached tokens of its sequence.

    q_latent [T, H, c] (q_nope already multiplied by W_UK), q_pe [T, H, r], rotated: float32 or
    bfloat16, the last dimension contiguous; kv_cache [num_blocks, block_size, width] of a layer
    (see CacheLayout), of the queries' dtype or fp8; block_tables [B, max_blocks] int32, entries
    past a context are not read; seq_ids [T] int32, the row of block_tables of each token;
    context_lens [T] int32, the token itself included, 0 for a padding row, which gives zeros.
    num_splits: see `pick_num_splits`; a row's bits depend on its own context and num_splits only.
    native_fp8: whether the device converts fp8 (compute capability 8.9). Returns u [T, H, c] like
    q_latent.
    """
    return mla_decode_torch(
        q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens, scale,
        num_splits=num_splits, native_fp8=native_fp8,
    )  # fmt: skip


def mla_decode_torch(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    num_splits: int,
    native_fp8: bool = True,
) -> Tensor:
    """Plain-torch twin, a token at a time; reads the lengths, which waits for a device."""
    del num_splits, native_fp8
    c, block_size = q_latent.shape[2], kv_cache.shape[1]
    layout = CacheLayout.of(kv_cache, c, q_pe.shape[2])
    queries = torch.cat([q_latent, q_pe], dim=2).float()  # [T, H, c + r]
    out = torch.zeros_like(q_latent)
    for t, (seq, length) in enumerate(zip(seq_ids.tolist(), context_lens.tolist(), strict=True)):
        if length == 0:
            continue
        blocks = block_tables[seq, : -(-length // block_size)].long()
        rows = read_rows(kv_cache[blocks].flatten(0, 1)[:length], layout)  # [S, c + r]
        out[t] = ((queries[t] @ rows.t()) * scale).softmax(dim=1) @ rows[:, :c]
    return out
