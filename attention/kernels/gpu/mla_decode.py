"""Absorbed MLA over the paged latent cache: a query token at a time against its own context.

For token t and head h with the cached rows z (latent, c wide) and k (rotated key, r wide):
score_s = (q_latent . z_s + q_pe . k_s) * scale, p = softmax(score), u = sum_s p_s z_s. The
CPU's: attention/kernels/mla_decode.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from attention.kernels.gpu.cache_layout import (
    GROUP,
    CacheLayout,
    key_view,
    read_rows,
    row_strides,
    scale_view,
)
from attention.kernels.gpu.mla_decode_kernels import attend_part, merge_parts
from experts.kernels.gpu.tile import has_small_blocks

FIXED_SPLITS: Final = 4
"""Parts of every context in deterministic mode: a row's bits depend on how its context is cut, so
there the cut may not follow the batch."""
MAX_SPLITS: Final = 32
MIN_PART: Final = 256
"""Tokens of a part: a shorter one costs more in its merge than its own programs save."""
MAX_SCRATCH_BYTES: Final = 1 << 28
"""Of a call's parts; more rows than fit go in several launches."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's share and how it runs. `share_scores`: see `_tile`."""

    heads: int
    tokens: int
    num_warps: int
    num_stages: int
    share_scores: bool = False


def pick_num_splits(
    num_tokens: int, num_heads: int, num_sms: int, max_context: int, *, deterministic: bool = False
) -> int:
    """In how many parts to cut each context: the fewest that fill waves of programs to within 85%
    of the best. Pure; a CUDA graph keeps what was picked for its bucket."""
    if deterministic:
        return FIXED_SPLITS
    heads = _tile(num_heads, torch.bfloat16, False, True).heads
    programs = num_tokens * math.ceil(num_heads / heads)
    slots = num_sms if heads == 64 else 2 * num_sms  # smaller tiles run two on a multiprocessor
    largest = max(1, min(MAX_SPLITS, max_context // MIN_PART))
    waves = [programs * parts / slots for parts in range(1, largest + 1)]
    used = [wave / math.ceil(wave) for wave in waves]  # share of the slots with work
    return 1 + next(i for i, share in enumerate(used) if share >= 0.85 * max(used))


def _tile(
    num_heads: int, dtype: torch.dtype, fp8_cache: bool, native_fp8: bool, small: bool = False
) -> Tile:
    """64 heads: the queries (72 KiB at 576 values) and two tiles of 64 tokens (144 KiB) fill the
    shared memory of sm_90, [64, 512] sums half its registers. Two warp groups share the 64 rows of
    the matrix instruction, so each has to take half of the columns; Triton gives a product whose
    result feeds another all rows on each, computing the scores twice, unless a branch stands
    between the two: `share_scores`, one that is always taken. sm_80 (no fp8) has 163 KiB,
    smaller instructions, and takes an fp8 cache apart in registers. Fewer heads, or small blocks
    (99 KiB): small tiles, several programs on a multiprocessor. float32 is for exact tests. Not
    measured on a GPU."""
    most = 16 if small else 64 if native_fp8 else 16 if fp8_cache else 32
    heads = min(most, max(16, triton.next_power_of_2(num_heads)))
    if dtype == torch.float32:
        return Tile(16, 16, num_warps=4, num_stages=1)
    if heads == 64:
        return Tile(64, 64, num_warps=8, num_stages=2, share_scores=True)
    return Tile(heads, 32, num_warps=8, num_stages=3)


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
    layout = _check(q_latent, q_pe, kv_cache, block_tables, seq_ids, context_lens)
    out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
    row_bytes = 4 * num_splits * out[0].numel() if len(out) and num_splits > 1 else 1
    step = max(1, MAX_SCRATCH_BYTES // row_bytes)
    for rows in [slice(start, start + step) for start in range(0, len(out), step)]:
        _launch(
            q_latent[rows], q_pe[rows], kv_cache, layout, block_tables, seq_ids[rows],
            context_lens[rows], scale, num_splits, native_fp8, out[rows],
        )  # fmt: skip
    return out


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


def _launch(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    layout: CacheLayout,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
    scale: float,
    num_splits: int,
    native_fp8: bool,
    out: Tensor,
) -> None:
    num_tokens, num_heads, c = q_latent.shape
    tile, block_c = (
        _tile(num_heads, q_latent.dtype, layout.is_fp8, native_fp8, has_small_blocks()),
        triton.next_power_of_2(c),
    )
    parts, lse = out, out
    if num_splits > 1:
        shape = (num_tokens, num_splits, num_heads)
        parts = torch.empty(*shape, c, dtype=torch.float32, device=out.device)
        lse = torch.empty(shape, dtype=torch.float32, device=out.device)
    native = layout.is_fp8 and native_fp8
    grid = num_tokens * triton.cdiv(num_heads, tile.heads), num_splits
    attend_part[grid](
        q_latent, q_pe, kv_cache.view(torch.float8_e4m3fn) if native else kv_cache,
        scale_view(kv_cache, layout), key_view(kv_cache, layout), block_tables, seq_ids,
        context_lens, parts, lse, scale * math.log2(math.e),
        *q_latent.stride()[:2], *q_pe.stride()[:2], *row_strides(layout), block_tables.shape[1],
        num_heads, num_splits,
        LATENT=c, ROPE=layout.rope, SCALES_AT=layout.scales_at, KEY_AT=layout.key_at,
        FP8=layout.is_fp8, NATIVE=native, GROUP=min(GROUP, block_c), BLOCK_SIZE=kv_cache.shape[1],
        SPLIT=num_splits > 1, BLOCK_H=tile.heads, BLOCK_N=tile.tokens, BLOCK_C=block_c,
        BLOCK_R=max(16, triton.next_power_of_2(layout.rope)), SHARE_SCORES=tile.share_scores,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if num_splits > 1:
        merge_parts[(num_tokens * num_heads,)](
            parts, lse, out, num_heads, num_splits, LATENT=c, BLOCK_C=block_c, UNROLL=4,
            num_warps=4,
        )  # fmt: skip


def _check(
    q_latent: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_ids: Tensor,
    context_lens: Tensor,
) -> CacheLayout:
    num_tokens, num_heads, c = q_latent.shape
    layout = CacheLayout.of(kv_cache, c, q_pe.shape[2])
    if q_pe.shape[:2] != (num_tokens, num_heads):
        raise ValueError(f"q_latent {tuple(q_latent.shape)}, q_pe {tuple(q_pe.shape)}")
    if q_latent.stride(2) != 1 or q_pe.stride(2) != 1:
        raise ValueError(f"rows must be contiguous: {q_latent.stride()} and {q_pe.stride()}")
    if q_pe.dtype != q_latent.dtype or not (layout.is_fp8 or layout.dtype == q_latent.dtype):
        raise ValueError(f"queries {q_latent.dtype}, {q_pe.dtype}; cache {kv_cache.dtype}")
    if block_tables.dtype != torch.int32 or not block_tables.is_contiguous():
        raise ValueError(f"block_tables must be [B, max_blocks] int32, got {block_tables.dtype}")
    for name, ids in (("seq_ids", seq_ids), ("context_lens", context_lens)):
        if ids.dtype != torch.int32 or ids.shape != (num_tokens,) or not ids.is_contiguous():
            raise ValueError(f"{name} must be [{num_tokens}] int32, got {ids.shape} {ids.dtype}")
    return layout
