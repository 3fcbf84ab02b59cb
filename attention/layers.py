"""Row-wise steps of the decoder: RMS norm, residual addition, the write into the latent cache."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from attention.compiled import entry_points
from attention.rope import rotate

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: so do the models' own code and
transformers (it differs for models with rms_norm_eps 1e-5, such as Moonlight)."""

_pack_norm = struct.Struct("5qf4xq").pack
_pack_rotate = struct.Struct("14qf4x").pack


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps): x [T, d], weight [d], contiguous float32 -> [T, d]."""
    entry = entry_points()
    if entry is None:
        return rms_norm_torch(x, weight, eps)
    out = torch.empty_like(x)
    entry.norm(_pack_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), *x.shape, eps, 0))
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain-torch twin of `rms_norm`."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, then rms_norm(x): all [T, d] contiguous float32."""
    entry = entry_points()
    if entry is None:
        return add_rms_norm_torch(x, delta, weight, eps)
    out, delta = torch.empty_like(x), delta.contiguous()
    addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    entry.norm(_pack_norm(*addresses, *x.shape, eps, delta.data_ptr()))
    return out


def add_rms_norm_torch(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain-torch twin of `add_rms_norm`."""
    return rms_norm_torch(x.add_(delta), weight, eps)


def rotate_query_and_cache_latent(
    q: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
) -> None:
    """Turn the rope part of every query in place, and write each token's latent into the cache.

    q [T, H, n + r] float32; kv_a [T, c + r] float32; kv_a_norm [c]; rope [num_positions, r] (see
    `rope_table`); positions [T] int32; slots [T] int64, row of `cache` of each token, all
    different; cache [num_slots, c + r] float32: the normed latent, then the turned key. All
    contiguous. Positions and slots are not checked here: the scheduler keeps them in range.
    """
    entry = entry_points()
    if entry is None:
        rotate_query_and_cache_latent_torch(q, kv_a, kv_a_norm, rope, positions, slots, cache)
        return
    num_tokens, num_heads, head = q.shape
    entry.rotate_and_store(
        _pack_rotate(
            q.data_ptr(), kv_a.data_ptr(), kv_a_norm.data_ptr(), rope.data_ptr(),
            positions.data_ptr(), slots.data_ptr(), cache.data_ptr(),
            num_tokens, num_heads * head, kv_a_norm.shape[0], rope.shape[1], rope.shape[0],
            cache.shape[0], num_heads, LATENT_NORM_EPS,
        )
    )  # fmt: skip


def rotate_query_and_cache_latent_torch(
    q: Tensor,
    kv_a: Tensor,
    kv_a_norm: Tensor,
    rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    cache: Tensor,
) -> None:
    """Plain-torch twin of `rotate_query_and_cache_latent`."""
    rows, latent, r = rope[positions.long()], kv_a_norm.shape[0], rope.shape[1]
    q[:, :, -r:] = rotate(q[:, :, -r:], rows)
    cache[slots, :latent] = rms_norm_torch(kv_a[:, :latent], kv_a_norm, LATENT_NORM_EPS)
    cache[slots, latent:] = rotate(kv_a[:, latent:], rows)
