"""The attention tier's operations on a device, as Triton kernels or as their plain-torch twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from attention.kernels.gpu import heads, latent_cache, mla_decode, mla_prefill, rows
from experts.device import KernelKind


@dataclass(frozen=True, slots=True)
class AttentionOps:
    """Signatures: the functions of the same names."""

    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., Tensor]
    multiply_heads: Callable[..., Tensor]
    rotate_query_and_cache_latent: Callable[..., None]
    gather_latents: Callable[..., Tensor]
    mla_decode: Callable[..., Tensor]
    mla_prefill: Callable[..., Tensor]


_TRITON = AttentionOps(
    rms_norm=rows.rms_norm,
    add_rms_norm=rows.add_rms_norm,
    multiply_heads=heads.multiply_heads,
    rotate_query_and_cache_latent=latent_cache.rotate_query_and_cache_latent,
    gather_latents=latent_cache.gather_latents,
    mla_decode=mla_decode.mla_decode,
    mla_prefill=mla_prefill.mla_prefill,
)
_TORCH = AttentionOps(
    rms_norm=rows.rms_norm_torch,
    add_rms_norm=rows.add_rms_norm_torch,
    multiply_heads=heads.multiply_heads_torch,
    rotate_query_and_cache_latent=latent_cache.rotate_query_and_cache_latent_torch,
    gather_latents=latent_cache.gather_latents_torch,
    mla_decode=mla_decode.mla_decode_torch,
    mla_prefill=mla_prefill.mla_prefill_torch,
)


def attention_ops(kernels: KernelKind) -> AttentionOps:
    """For a ComputeDevice's `kernels`; "host" has none of these."""
    if kernels == "host":
        raise ValueError("kernels host: the CPU's kernels are in attention.kernels")
    return _TRITON if kernels == "triton" else _TORCH
