"""The write into the paged latent cache, and the gather out of it.

One kernel for what each new token needs: turn the rope part of its queries (interleaved pairs,
attention/rope.py), norm its latent (RMS, LATENT_NORM_EPS) and turn its key, and put both into its
slot, quantised if the cache is fp8 (attention/kernels/gpu/cache_layout.py). The CPU's:
attention/layers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows, read_rows
from attention.layers import LATENT_NORM_EPS, rms_norm_torch
from attention.rope import rotate


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
    rotate_query_and_cache_latent_torch(q, kv_a, kv_a_norm, rope, positions, slots, kv_cache)


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
    return gather_latents_torch(kv_cache, slots, layout, dtype)


def gather_latents_torch(
    kv_cache: Tensor, slots: Tensor, layout: CacheLayout, dtype: torch.dtype
) -> Tensor:
    """Plain-torch twin of `gather_latents`."""
    rows = read_rows(kv_cache.view(-1, layout.width)[slots.clamp(min=0)], layout)
    return rows.masked_fill_(slots[:, None] < 0, 0.0).to(dtype)
