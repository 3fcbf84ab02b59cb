"""MLA over whole prompt chunks in the naive form: keys and values expanded from the latents.

For query i of a sequence with Q new tokens in a context of S, and head h:
score_s = (q_nope . k_nope_s + q_pe . k_pe_s) * scale over s <= S - Q + i, out = softmax(score) v.
The Q queries are the last of the context: whatever lies before them is a cached prefix. k_pe is one
row for all heads, so it stays apart (two dots) instead of being copied H times into the keys. The
CPU's: attention/mla.py.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.kernels.gpu.products import multiply_add
from attention.mla import QUERY_BLOCK
from experts.kernels.gpu.tile import has_small_blocks


@triton.jit
def _attend(
    q, pe, keys, key_pe, kv_row, pe_row, start, stop, last_seen, scale, maximum, total, mixed,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles of keys start..stop-1 of a context: statistics and mixed values after them. MASKED: row
    i of q sees keys up to last_seen[i], else all of them are seen by every row."""
    columns, dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    nearby = tl.arange(0, BLOCK_N)
    kv_offsets, pe_offsets = (nearby * kv_row)[:, None], (nearby * pe_row)[:, None]
    for first in tl.range(start, stop, BLOCK_N):
        at = first + nearby
        there = at[:, None] < (stop if MASKED else first + BLOCK_N)
        k_at = keys + tl.cast(first, tl.int64) * kv_row + kv_offsets
        k = tl.load(k_at + columns[None, :], mask=there & (columns[None, :] < NOPE), other=0.0)
        v_mask = there & (values[None, :] < VALUE)
        v = tl.load(k_at + NOPE + values[None, :], mask=v_mask, other=0.0)
        pe_at = key_pe + tl.cast(first, tl.int64) * pe_row + pe_offsets
        k_pe = tl.load(pe_at + dims[None, :], mask=there & (dims[None, :] < ROPE), other=0.0)
        scores = multiply_add(pe, tl.trans(k_pe), tl.zeros((q.shape[0], BLOCK_N), tl.float32))
        scores = multiply_add(q, tl.trans(k), scores) * scale
        if MASKED:
            scores = tl.where(at[None, :] <= last_seen[:, None], scores, -float("inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        factor = tl.exp2(maximum - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * factor + tl.sum(weights, axis=1)
        mixed = multiply_add(weights.to(v.dtype), v, mixed * factor[:, None])
        maximum = highest
    return maximum, total, mixed


@triton.jit(do_not_specialize_on_alignment=["cu_q", "cu_k"])
def _prefill_kernel(
    q, kv, k_pe, cu_q, cu_k, out, scale, q_row, q_head, kv_row, kv_head, pe_row, num_heads,
    NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    head, seq = tl.program_id(1).to(tl.int64), tl.program_id(2)
    q_start, q_stop = tl.load(cu_q + seq), tl.load(cu_q + seq + 1)
    k_start, k_stop = tl.load(cu_k + seq), tl.load(cu_k + seq + 1)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # what takes longest starts first
    if first >= q_stop - q_start:
        return
    queries = first + tl.arange(0, BLOCK_M)
    columns, dims, values = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_V)
    exists = (q_start + queries < q_stop)[:, None]
    rows = (q_start + queries).to(tl.int64)[:, None]
    q_at = q + rows * q_row + head * q_head
    q_tile = tl.load(q_at + columns[None, :], mask=exists & (columns[None, :] < NOPE), other=0.0)
    pe_mask = exists & (dims[None, :] < ROPE)
    pe_tile = tl.load(q_at + NOPE + dims[None, :], mask=pe_mask, other=0.0)

    num_before = k_stop - k_start - (q_stop - q_start)
    keys = kv + k_start.to(tl.int64) * kv_row + head * kv_head
    key_pe = k_pe + k_start.to(tl.int64) * pe_row
    seen_by_all = (num_before + first + 1) // BLOCK_N * BLOCK_N
    stop = tl.minimum(num_before + first + BLOCK_M, k_stop - k_start)
    maximum = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    maximum, total, mixed = _attend(
        q_tile, pe_tile, keys, key_pe, kv_row, pe_row, 0, seen_by_all, num_before + queries, scale,
        maximum, total, mixed, NOPE, ROPE, VALUE, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V, False,
    )  # fmt: skip
    maximum, total, mixed = _attend(
        q_tile, pe_tile, keys, key_pe, kv_row, pe_row, seen_by_all, stop, num_before + queries,
        scale, maximum, total, mixed, NOPE, ROPE, VALUE, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_V, True,
    )  # fmt: skip
    out_at = out + (rows * num_heads + head) * VALUE + values[None, :]
    result = (mixed * (1.0 / total)[:, None]).to(out.dtype.element_ty)
    tl.store(out_at, result, mask=exists & (values[None, :] < VALUE))


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
    _check(q, kv, k_pe, cu_q, cu_k)
    num_heads, rope = q.shape[1], k_pe.shape[1]
    nope = q.shape[2] - rope
    value = kv.shape[2] - nope
    out = torch.empty(q.shape[0], num_heads, value, dtype=q.dtype, device=q.device)
    num_seqs = cu_q.shape[0] - 1
    if not max_q or not num_seqs:
        return out
    block_m, block_n, num_warps, num_stages = _blocks(q.dtype, small=has_small_blocks())
    _prefill_kernel[(triton.cdiv(max_q, block_m), num_heads, num_seqs)](
        q, kv, k_pe, cu_q, cu_k, out, scale * math.log2(math.e), *q.stride()[:2],
        *kv.stride()[:2], k_pe.stride(0), num_heads, NOPE=nope, ROPE=rope, VALUE=value,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=_padded(nope), BLOCK_R=_padded(rope),
        BLOCK_V=_padded(value), num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


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


def _blocks(dtype: torch.dtype, *, small: bool) -> tuple[int, int, int, int]:
    """Queries, keys, warps, stages. 128 queries are two warp groups of 64 rows of the matrix
    instruction of sm_90; [128, 128] sums and [128, 64] scores take 96 registers a thread. Shared
    memory: 48 KiB of queries and 40 KiB a stage, before sm_90 one less; small: 99 KiB are all.
    float32 is for exact tests. Not measured on a GPU."""
    return (16, 16, 4, 1) if dtype == torch.float32 else (128, 64, 8, 2 if small else 3)


def _padded(width: int) -> int:
    """A tile's width: a power of two, at least the depth of a matrix instruction."""
    padded: int = triton.next_power_of_2(width)
    return max(16, padded)


def _check(q: Tensor, kv: Tensor, k_pe: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, kv {tuple(kv.shape)}, k_pe {tuple(k_pe.shape)}"
    nope = q.shape[2] - k_pe.shape[1]
    if q.shape[1] != kv.shape[1] or kv.shape[0] != k_pe.shape[0] or not 0 < nope < kv.shape[2]:
        raise ValueError(shapes)
    if q.stride(2) != 1 or kv.stride(2) != 1 or k_pe.stride(1) != 1:
        raise ValueError(f"rows must be contiguous: {shapes}")
    if not q.dtype == kv.dtype == k_pe.dtype or q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"q {q.dtype}, kv {kv.dtype}, k_pe {k_pe.dtype}")
    for name, starts in (("cu_q", cu_q), ("cu_k", cu_k)):
        if starts.dtype != torch.int32 or starts.ndim != 1 or starts.shape != cu_q.shape:
            raise ValueError(f"{name} must be [B + 1] int32, got {starts.shape} {starts.dtype}")
