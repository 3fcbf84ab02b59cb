"""Row-wise steps of the decoder: RMS norm, residual addition, the write into the latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.kernels.rows import add_rms_norm_rows, rms_norm_rows, rotate_and_store
from attention.rope import rotate

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says: so do the models' own code and
transformers (it differs for models with rms_norm_eps 1e-5, such as Moonlight)."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps): x [T, d], weight [d], both float32 -> [T, d]."""
    out = torch.empty_like(x)
    rms_norm_rows(x.numpy(), weight.numpy(), eps, out.numpy())
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Plain-torch twin of `rms_norm`."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps) * weight


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += delta in place, then rms_norm(x): all [T, d] float32."""
    out = torch.empty_like(x)
    add_rms_norm_rows(x.numpy(), delta.numpy(), weight.numpy(), eps, out.numpy())
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
    different; cache [num_slots, c + r] float32: the normed latent, then the turned key.
    """
    rotate_and_store(
        q.numpy(),
        kv_a.numpy(),
        kv_a_norm.numpy(),
        LATENT_NORM_EPS,
        rope.numpy(),
        positions.numpy(),
        slots.numpy(),
        cache.numpy(),
    )


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
