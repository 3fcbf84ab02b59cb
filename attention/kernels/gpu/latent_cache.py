"""The write into the paged latent cache, and the gather out of it.

One kernel for what each new token needs: turn the rope part of its queries (interleaved pairs,
attention/rope.py), norm its latent (RMS, LATENT_NORM_EPS) and turn its key, and put both into its
slot, quantised if the cache is fp8 (attention/kernels/gpu/cache_layout.py). The CPU's:
attention/layers.py.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.kernels.gpu.cache_layout import (
    FP8_MAX,
    GROUP,
    MIN_SCALE,
    CacheLayout,
    encode_rows,
    key_view,
    read_rows,
    row_strides,
    scale_view,
)
from attention.layers import LATENT_NORM_EPS, rms_norm_torch
from attention.rope import rotate
from experts.kernels.gpu.fp8 import decode_e4m3, encode_e4m3

_FP8_MAX: Final = tl.constexpr(FP8_MAX)
_MIN_SCALE: Final = tl.constexpr(MIN_SCALE)
_BLOCK_H = 16
"""Heads whose queries a program turns: 16 x 64 values, four a thread. Not measured on a GPU."""


@triton.jit
def _turn(pairs, cos, sin):
    """Interleaved pairs [..., r/2, 2] float32 by the angles of a position [r/2]."""
    a, b = tl.split(pairs)
    return tl.join(a * cos - b * sin, a * sin + b * cos)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rotate_and_store_kernel(
    q, kv_a, norm, rope, positions, slots, cache, scales, keys, eps,
    num_heads, q_token, q_head, q_start, kv_token, cache_row, scales_row, keys_row,
    LATENT: tl.constexpr, ROPE: tl.constexpr, SCALES_AT: tl.constexpr, KEY_AT: tl.constexpr,
    FP8: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    pairs = tl.arange(0, BLOCK_PAIRS)
    turn = rope + tl.load(positions + token).to(tl.int64) * ROPE + pairs
    cos = tl.load(turn, mask=pairs < ROPE // 2, other=0.0)
    sin = tl.load(turn + ROPE // 2, mask=pairs < ROPE // 2, other=0.0)

    both = 2 * pairs[:, None] + tl.arange(0, 2)[None, :]  # [r/2, 2]
    q_at = q + token * q_token + heads[:, None, None] * q_head + q_start + both[None, :, :]
    q_mask = (heads[:, None, None] < num_heads) & (both[None, :, :] < ROPE)
    turned = _turn(tl.load(q_at, mask=q_mask, other=0.0).to(tl.float32), cos[None], sin[None])
    tl.store(q_at, turned.to(q.dtype.element_ty), mask=q_mask)

    slot = tl.load(slots + token)
    if (tl.program_id(1) == 0) & (slot >= 0):
        source = kv_a + token * kv_token
        key_pairs = tl.load(source + LATENT + both, mask=both < ROPE, other=0.0)
        key = _turn(key_pairs.to(tl.float32), cos, sin)
        key_at = keys + slot * keys_row + KEY_AT + both
        tl.store(key_at, key.to(keys.dtype.element_ty), mask=both < ROPE)

        columns = tl.arange(0, BLOCK_C)
        mask = columns < LATENT
        x = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x) / LATENT + eps)
        latent = x * factor * tl.load(norm + columns, mask=mask, other=0.0)
        if FP8:
            groups = tl.reshape(latent, (BLOCK_C // GROUP, GROUP))
            scale = tl.math.div_rn(tl.max(tl.abs(groups), axis=1), _FP8_MAX)
            scale = tl.maximum(scale, _MIN_SCALE)
            scale += tl.sum(groups - groups, axis=1)  # 0, or NaN in a group that has one
            of_group = tl.arange(0, BLOCK_C // GROUP)
            scale_at = scales + slot * scales_row + SCALES_AT + of_group
            tl.store(scale_at, scale, mask=of_group * GROUP < LATENT)
            codes = tl.math.div_rn(groups, tl.broadcast_to(scale[:, None], groups.shape))
            codes = encode_e4m3(tl.clamp(codes, -_FP8_MAX, _FP8_MAX))
            tl.store(cache + slot * cache_row + columns, tl.reshape(codes, (BLOCK_C,)), mask=mask)
        else:
            stored = latent.to(cache.dtype.element_ty)
            tl.store(cache + slot * cache_row + columns, stored, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _gather_kernel(
    cache, scales, keys, slots, out, cache_row, scales_row, keys_row,
    LATENT: tl.constexpr, ROPE: tl.constexpr, SCALES_AT: tl.constexpr, KEY_AT: tl.constexpr,
    FP8: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    columns, dims = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    kept = (columns < LATENT) & (slot >= 0)
    latent = tl.load(cache + slot * cache_row + columns, mask=kept, other=0)
    if FP8:
        group = columns // GROUP
        scale = tl.load(scales + slot * scales_row + SCALES_AT + group, mask=kept, other=0.0)
        latent = decode_e4m3(latent, tl.float32) * scale
    target = out + row * (LATENT + ROPE)
    tl.store(target + columns, latent.to(out.dtype.element_ty), mask=columns < LATENT)
    key_at = keys + slot * keys_row + KEY_AT + dims
    key = tl.load(key_at, mask=(dims < ROPE) & (slot >= 0), other=0.0)
    tl.store(target + LATENT + dims, key.to(out.dtype.element_ty), mask=dims < ROPE)


def rotate_query_and_cache_latent(
    q: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
) -> None:
    """Turn the rope part of every query in place, and write each token's latent into the cache.

    q [T, H, n + r] and kv_a [T, c + r], float32 or bfloat16, the last dimension contiguous;
    kv_a_norm [c] float32; rope [num_positions, r] float32 (see `rope_table`); positions [T] int32;
    slots [T] int64: block * block_size + offset, all different, -1 for a padding row, whose query
    is turned and whose latent goes nowhere; kv_cache [num_blocks, block_size, width] of a layer.
    """
    num_tokens, num_heads, head = q.shape
    c, r = kv_a_norm.shape[0], rope.shape[1]
    layout = CacheLayout.of(kv_cache, c, r)
    _check(q, kv_a, kv_a_norm, rope, positions, slots)
    if not num_tokens:
        return
    block_c = triton.next_power_of_2(c)
    _rotate_and_store_kernel[(num_tokens, triton.cdiv(num_heads, _BLOCK_H))](
        q, kv_a, kv_a_norm, rope, positions, slots, *_views(kv_cache, layout), LATENT_NORM_EPS,
        num_heads, q.stride(0), q.stride(1), head - r, kv_a.stride(0), *row_strides(layout),
        LATENT=c, ROPE=r, SCALES_AT=layout.scales_at, KEY_AT=layout.key_at,
        FP8=layout.is_fp8, GROUP=min(GROUP, block_c), BLOCK_H=_BLOCK_H, BLOCK_C=block_c,
        BLOCK_PAIRS=triton.next_power_of_2(r // 2), num_warps=4,
    )  # fmt: skip


def rotate_query_and_cache_latent_torch(
    q: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    kv_cache: Tensor,
) -> None:
    """Plain-torch twin of `rotate_query_and_cache_latent`."""
    c, r = kv_a_norm.shape[0], rope.shape[1]
    layout = CacheLayout.of(kv_cache, c, r)
    turns = rope[positions.long()]
    q[:, :, -r:] = rotate(q[:, :, -r:].float(), turns).to(q.dtype)
    values = kv_a.float()
    latent = rms_norm_torch(values[:, :c], kv_a_norm, LATENT_NORM_EPS)
    written = encode_rows(torch.cat([latent, rotate(values[:, c:], turns)], dim=1), layout)
    kept = slots >= 0
    kv_cache.view(-1, layout.width)[slots[kept]] = written[kept]


def gather_latents(
    kv_cache: Tensor, slots: Tensor, layout: CacheLayout, dtype: torch.dtype
) -> Tensor:
    """Rows of a layer's cache, dequantised: slots [S] int64 -> [S, c + r] dtype.

    A slot of -1 (padding) gives zeros.
    """
    CacheLayout.of(kv_cache, layout.latent, layout.rope)
    if slots.dtype != torch.int64 or slots.ndim != 1:
        raise ValueError(f"slots must be [S] int64, got {tuple(slots.shape)} {slots.dtype}")
    width = layout.latent + layout.rope
    out = torch.empty(slots.shape[0], width, dtype=dtype, device=kv_cache.device)
    if not slots.shape[0]:
        return out
    _gather_kernel[(slots.shape[0],)](
        *_views(kv_cache, layout), slots, out, *row_strides(layout),
        LATENT=layout.latent, ROPE=layout.rope, SCALES_AT=layout.scales_at, KEY_AT=layout.key_at,
        FP8=layout.is_fp8, GROUP=GROUP, BLOCK_C=triton.next_power_of_2(layout.latent),
        BLOCK_R=triton.next_power_of_2(layout.rope), num_warps=2,
    )  # fmt: skip
    return out


def gather_latents_torch(
    kv_cache: Tensor, slots: Tensor, layout: CacheLayout, dtype: torch.dtype
) -> Tensor:
    """Plain-torch twin of `gather_latents`."""
    rows = read_rows(kv_cache.view(-1, layout.width)[slots.clamp(min=0)], layout)
    return rows.masked_fill_(slots[:, None] < 0, 0.0).to(dtype)


def _views(kv_cache: Tensor, layout: CacheLayout) -> tuple[Tensor, Tensor, Tensor]:
    """The cache as the kernels take it: for latents, scales and keys."""
    return kv_cache, scale_view(kv_cache, layout), key_view(kv_cache, layout)


def _check(
    q: Tensor, kv_a: Tensor, kv_a_norm: Tensor, rope: Tensor, positions: Tensor, slots: Tensor
) -> None:
    num_tokens, c, r = q.shape[0], kv_a_norm.shape[0], rope.shape[1]
    if kv_a.shape != (num_tokens, c + r) or q.shape[2] < r:
        raise ValueError(f"q {tuple(q.shape)}, kv_a {tuple(kv_a.shape)}, latent {c}, rope {r}")
    if q.stride(2) != 1 or kv_a.stride(1) != 1:
        raise ValueError(f"rows must be contiguous: strides {q.stride()} and {kv_a.stride()}")
    if kv_a_norm.dtype != torch.float32 or rope.dtype != torch.float32:
        raise ValueError(f"kv_a_norm {kv_a_norm.dtype} and rope {rope.dtype} must be float32")
    if not (rope.is_contiguous() and positions.is_contiguous() and slots.is_contiguous()):
        raise ValueError("rope, positions and slots must be contiguous")
    for name, ids, dtype in (("positions", positions, torch.int32), ("slots", slots, torch.int64)):
        if ids.dtype != dtype or ids.shape != (num_tokens,):
            raise ValueError(f"{name} must be [{num_tokens}] {dtype}, got {ids.shape} {ids.dtype}")
