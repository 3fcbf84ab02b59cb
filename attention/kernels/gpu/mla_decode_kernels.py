"""The two kernels of mla_decode.py: attention over a part of a context, and the merge of the parts.

A program takes a tile of heads of one token through its part of the context, tile by tile of cached
tokens, with a running maximum and sum (flash attention). A tile of latents [tokens, c] is loaded
once: it is the keys of all heads of the program and, multiplied by the weights, their values.
Statistics are base 2: p = 2^(score * log2(e) - maximum).
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

import triton
import triton.language as tl

from attention.kernels.gpu.products import multiply_add
from experts.kernels.gpu.fp8 import decode_e4m3


@triton.jit
def _blocks(table, first, stop, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Blocks of the BLOCK_N positions from `first`: one number if a block has room for all of them
    (tiles are aligned), which leaves the registers to the sums."""
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.load(table + first // BLOCK_SIZE, mask=first < stop, other=0)
    else:
        positions = first + tl.arange(0, BLOCK_N)
        return tl.load(table + positions // BLOCK_SIZE, mask=positions < stop, other=0)


@triton.jit
def _rows_at(base, blocks, offsets, row_stride, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses [BLOCK_N, 1] of the rows at `offsets` in `blocks`, one for all or one each."""
    first = base + blocks.to(tl.int64) * (BLOCK_SIZE * row_stride)
    if BLOCK_SIZE % BLOCK_N == 0:
        return first + (offsets * row_stride)[:, None]
    else:
        return first[:, None] + (offsets * row_stride)[:, None]


@triton.jit
def _dequantised(codes, scales, dtype: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr):
    """codes [tokens, c] times scales [tokens, groups] of GROUP columns each -> dtype."""
    values = codes.to(tl.float32) if NATIVE else decode_e4m3(codes, tl.float32)
    groups = tl.reshape(values, (codes.shape[0], codes.shape[1] // GROUP, GROUP))
    return tl.reshape((groups * scales[:, :, None]).to(dtype), codes.shape)


@triton.jit(
    do_not_specialize=["max_blocks", "num_splits"],
    do_not_specialize_on_alignment=["block_tables", "seq_ids", "context_lens"],
)
def attend_part(
    q_latent, q_pe, cache, scales, keys, block_tables, seq_ids, context_lens, out, lse, scale,
    ql_token, ql_head, qp_token, qp_head, cache_row, scales_row, keys_row, max_blocks, num_heads,
    num_splits,
    LATENT: tl.constexpr, ROPE: tl.constexpr, SCALES_AT: tl.constexpr, KEY_AT: tl.constexpr,
    FP8: tl.constexpr, NATIVE: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr, SHARE_SCORES: tl.constexpr,
):  # fmt: skip
    """SPLIT: there are parts, each with its statistics; if not, num_splits is 1."""
    num_tiles = tl.cdiv(num_heads, BLOCK_H)
    token, part = (tl.program_id(0) // num_tiles).to(tl.int64), tl.program_id(1)
    heads = tl.program_id(0) % num_tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    columns, dims = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    q_mask = (heads[:, None] < num_heads) & (columns[None, :] < LATENT)
    q_at = q_latent + token * ql_token + (heads[:, None] * ql_head + columns[None, :])
    q = tl.load(q_at, mask=q_mask, other=0.0)
    pe_mask = (heads[:, None] < num_heads) & (dims[None, :] < ROPE)
    pe_at = q_pe + token * qp_token + (heads[:, None] * qp_head + dims[None, :])
    pe = tl.load(pe_at, mask=pe_mask, other=0.0)

    context = tl.load(context_lens + token)
    table = block_tables + tl.load(seq_ids + token).to(tl.int64) * max_blocks
    per_part = tl.cdiv(tl.cdiv(context, BLOCK_N), num_splits) * BLOCK_N
    start = part * per_part
    stop = tl.minimum(start + per_part, context)

    maximum = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    mixed = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    # Looked up a tile ahead: the load of a tile needs not wait for the table.
    blocks = _blocks(table, start, stop, BLOCK_SIZE, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N):
        positions = first + tl.arange(0, BLOCK_N)
        seen = positions < stop
        offsets = positions % BLOCK_SIZE
        latent_at = _rows_at(cache, blocks, offsets, cache_row, BLOCK_SIZE, BLOCK_N)
        mask = seen[:, None] & (columns[None, :] < LATENT)
        latents = tl.load(latent_at + columns[None, :], mask=mask, other=0.0)
        key_at = _rows_at(keys + KEY_AT, blocks, offsets, keys_row, BLOCK_SIZE, BLOCK_N)
        mask = seen[:, None] & (dims[None, :] < ROPE)
        key = tl.load(key_at + dims[None, :], mask=mask, other=0.0).to(pe.dtype)
        if FP8:
            groups = tl.arange(0, BLOCK_C // GROUP)
            at = _rows_at(scales + SCALES_AT, blocks, offsets, scales_row, BLOCK_SIZE, BLOCK_N)
            mask = seen[:, None] & (groups[None, :] * GROUP < LATENT)
            scale_of = tl.load(at + groups[None, :], mask=mask, other=0.0)
            latents = _dequantised(latents, scale_of, q.dtype, GROUP, NATIVE)
        blocks = _blocks(table, first + BLOCK_N, stop, BLOCK_SIZE, BLOCK_N)

        factor = maximum  # of no use but to the compiler: the branch is always taken, see _tile
        weights = tl.broadcast_to(maximum[:, None], (BLOCK_H, BLOCK_N)).to(q.dtype)
        if (not SHARE_SCORES) or first < stop:
            scores = tl.zeros((BLOCK_H, BLOCK_N), tl.float32)
            scores = multiply_add(pe, tl.trans(key), scores)
            scores = multiply_add(q, tl.trans(latents), scores)
            scores = tl.where(seen[None, :], scores * scale, -float("inf"))
            highest = tl.maximum(maximum, tl.max(scores, axis=1))
            factor = tl.exp2(maximum - highest)
            exponentials = tl.exp2(scores - highest[:, None])
            total = total * factor + tl.sum(exponentials, axis=1)
            maximum = highest
            weights = exponentials.to(q.dtype)
        mixed = multiply_add(weights, latents, mixed * factor[:, None])

    first_row = (token * num_splits + part) * num_heads
    total = tl.where(total == 0.0, 1.0, total)  # of a part without tokens
    result = mixed * (1.0 / total)[:, None]
    out_at = out + first_row * LATENT + (heads[:, None] * LATENT + columns[None, :])
    tl.store(out_at, result.to(out.dtype.element_ty), mask=q_mask)
    if SPLIT:
        tl.store(lse + first_row + heads, maximum + tl.log2(total), mask=heads < num_heads)


@triton.jit(do_not_specialize=["num_splits"])
def merge_parts(
    parts, lse, out, num_heads, num_splits, LATENT: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """out = sum of parts * 2^lse / sum of 2^lse: parts [T, S, H, c], lse [T, S, H] base 2, -inf
    for a part without tokens, which is not read; zeros if all are. UNROLL: parts whose loads may be
    under way at the same time."""
    token, head = tl.program_id(0).to(tl.int64) // num_heads, tl.program_id(0) % num_heads
    columns = tl.arange(0, BLOCK_C)
    first = token * num_splits * num_heads + head
    highest = -1e38  # finite: all parts may be empty
    for part in tl.range(0, num_splits, loop_unroll_factor=UNROLL):
        highest = tl.maximum(highest, tl.load(lse + first + part * num_heads))
    total, mixed = 0.0, tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.range(0, num_splits, loop_unroll_factor=UNROLL):
        at = first + part * num_heads
        here = tl.load(lse + at)
        width = tl.where(here > -float("inf"), LATENT, 0)
        weight = tl.exp2(here - highest)
        mixed += weight * tl.load(parts + at * LATENT + columns, mask=columns < width, other=0.0)
        total += weight
    result = mixed / tl.where(total == 0.0, 1.0, total)
    target = out + (token * num_heads + head) * LATENT + columns
    tl.store(target, result.to(out.dtype.element_ty), mask=columns < LATENT)
