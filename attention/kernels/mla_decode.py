"""Absorbed MLA over the paged latent cache: one query token at a time against its own context.

For token t and head h with the cached rows z (latent, c wide) and k (rotated key, r wide):
score_s = (q_latent . z_s + q_pe . k_s) * scale, p = softmax(score) over the visible s,
u = sum_s p_s z_s. (The absorbed form of multi-head latent attention; the value is the latent.)
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

from attention.compiled import entry_points
from experts.kernels.runtime import kernels

_CACHE_DTYPES = (torch.float32, torch.bfloat16)  # in the order of experts.kernels.simd.Kind
_pack_arguments = struct.Struct("24q").pack


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
    Raises ValueError for shapes or dtypes that do not fit and for tokens whose sequence, length or
    blocks do not exist.
    """
    _check(q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens)
    entry = entry_points()
    if entry is None:
        return mla_decode_torch(
            q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens, scale
        )
    q_latent, q_pe = _dense_rows(q_latent), _dense_rows(q_pe)
    kv_cache, block_tables = kv_cache.contiguous(), block_tables.contiguous()
    seq_ids, context_lens = seq_ids.contiguous(), context_lens.contiguous()
    num_tokens, num_heads, latent = q_latent.shape
    num_blocks, block_size, width = kv_cache.shape
    num_seqs, max_blocks = block_tables.shape
    out = torch.empty(num_tokens, num_heads, latent)
    factor = ctypes.c_float(scale)
    bad = entry.mla(
        _pack_arguments(
            kernels().pool_address, *entry.mla_bodies, num_tokens, num_heads, latent,
            width - latent,
            q_latent.data_ptr(), 4 * q_latent.stride(0), 4 * q_latent.stride(1),
            q_pe.data_ptr(), 4 * q_pe.stride(0), 4 * q_pe.stride(1),
            kv_cache.data_ptr(), _CACHE_DTYPES.index(kv_cache.dtype), block_size, num_blocks,
            block_tables.data_ptr(), num_seqs, max_blocks, seq_ids.data_ptr(),
            context_lens.data_ptr(), ctypes.addressof(factor), out.data_ptr(),
        )
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(
            f"token {bad}: sequence {int(seq_ids[bad])} of {num_seqs}, context of "
            f"{int(context_lens[bad])} tokens: no such sequence, or blocks that do not exist"
        )
    return out


def _dense_rows(queries: Tensor) -> Tensor:
    """queries itself when the last dimension is contiguous, else a copy."""
    return queries if queries.stride(2) == 1 else queries.contiguous()


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
    if kv_cache.dtype not in _CACHE_DTYPES:
        raise ValueError(f"kv_cache must be float32 or bfloat16, got {kv_cache.dtype}")
    if block_tables.dtype != torch.int32 or block_tables.ndim != 2:
        raise ValueError(f"block_tables must be [B, max_blocks] int32, got {block_tables.dtype}")
    for name, ids in (("seq_ids", seq_ids), ("context_lens", context_lens)):
        if ids.dtype != torch.int32 or ids.shape != (num_tokens,):
            raise ValueError(f"{name} must be [{num_tokens}] int32, got {ids.shape} {ids.dtype}")


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
