"""Calls of every wrapper of this folder on meta tensors, for tools/compile_kernels.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from attention.kernels.gpu.cache_layout import CacheLayout
from attention.kernels.gpu.heads import multiply_heads
from attention.kernels.gpu.latent_cache import gather_latents, rotate_query_and_cache_latent
from attention.kernels.gpu.mla_decode import mla_decode
from attention.kernels.gpu.mla_prefill import mla_prefill
from attention.kernels.gpu.rows import add_rms_norm, rms_norm


@dataclass(frozen=True, slots=True)
class Sizes:
    """H heads; n, r, v wide; latent c; hidden size d."""

    num_heads: int
    nope: int
    rope: int
    value: int
    latent: int
    hidden: int


MODELS = {
    "v2-lite": Sizes(16, 128, 64, 128, 512, 2048),
    "v2": Sizes(128, 128, 64, 128, 512, 5120),
    "v3": Sizes(128, 128, 64, 128, 512, 7168),
    "odd": Sizes(6, 24, 10, 20, 36, 100),
}
CONTEXT = 8192
BLOCK_SIZE = 64
NUM_SEQS = 64
CHUNK = 2048
_BF16, _F32, _FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn

Case = tuple[str, Callable[[], object]]


def cases(native_fp8: bool) -> Iterator[Case]:
    """(name, call). native_fp8: whether the target converts fp8 by itself."""
    for model, sizes in MODELS.items():
        yield from _decode_cases(model, sizes, native_fp8)
        yield from _other_cases(model, sizes)
    sizes = MODELS["v2-lite"]
    yield "mla_decode/v2-lite/f32", partial(_decode, sizes, _F32, _F32, 4, native_fp8)
    yield "mla_prefill/v2-lite/f32", partial(_prefill, sizes, _F32)
    yield "multiply_heads/v2-lite/f32", partial(_multiply, sizes, _F32)


def _decode_cases(model: str, sizes: Sizes, native_fp8: bool) -> Iterator[Case]:
    for cache, name in ((_BF16, "bf16"), (_FP8, "fp8")):
        for splits in (1, 4):
            call = partial(_decode, sizes, _BF16, cache, splits, native_fp8)
            yield f"mla_decode/{model}/{name}/splits {splits}", call


def _other_cases(model: str, sizes: Sizes) -> Iterator[Case]:
    yield f"mla_prefill/{model}", partial(_prefill, sizes, _BF16)
    yield f"multiply_heads/{model}", partial(_multiply, sizes, _BF16)
    yield f"rows/{model}", partial(_norms, sizes)
    for cache, name in ((_BF16, "bf16"), (_FP8, "fp8")):
        yield f"latent_cache/{model}/{name}", partial(_cache, sizes, cache)


def _empty(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _new_cache(sizes: Sizes, dtype: torch.dtype) -> tuple[CacheLayout, Tensor]:
    layout = CacheLayout(sizes.latent, sizes.rope, dtype)
    blocks = NUM_SEQS * CONTEXT // BLOCK_SIZE
    return layout, layout.new_cache(1, blocks, BLOCK_SIZE, torch.device("meta"))[0]


def _decode(
    sizes: Sizes, dtype: torch.dtype, cache: torch.dtype, splits: int, native_fp8: bool
) -> None:
    heads = sizes.num_heads
    q = _empty(NUM_SEQS, heads, sizes.nope + sizes.rope, dtype=dtype)
    mla_decode(
        _empty(NUM_SEQS, heads, sizes.latent, dtype=dtype),
        q[:, :, sizes.nope :],
        _new_cache(sizes, cache)[1],
        _empty(NUM_SEQS, CONTEXT // BLOCK_SIZE, dtype=torch.int32),
        _empty(NUM_SEQS, dtype=torch.int32),
        _empty(NUM_SEQS, dtype=torch.int32),
        0.1,
        num_splits=splits,
        native_fp8=native_fp8,
    )


def _prefill(sizes: Sizes, dtype: torch.dtype) -> None:
    latents = _empty(CONTEXT, sizes.latent + sizes.rope, dtype=dtype)
    mla_prefill(
        _empty(CHUNK, sizes.num_heads, sizes.nope + sizes.rope, dtype=dtype),
        _empty(CONTEXT, sizes.num_heads, sizes.nope + sizes.value, dtype=dtype),
        latents[:, sizes.latent :],
        _empty(3, dtype=torch.int32),
        _empty(3, dtype=torch.int32),
        CHUNK,
        0.1,
    )


def _multiply(sizes: Sizes, dtype: torch.dtype) -> None:
    kv_b = _empty(sizes.num_heads, sizes.nope + sizes.value, sizes.latent, dtype=dtype)
    q = _empty(NUM_SEQS, sizes.num_heads, sizes.nope + sizes.rope, dtype=dtype)
    u = multiply_heads(q, kv_b[:, : sizes.nope].transpose(1, 2).contiguous())
    multiply_heads(u, kv_b[:, sizes.nope :])


def _norms(sizes: Sizes) -> None:
    x, weight = (
        _empty(NUM_SEQS, sizes.hidden, dtype=_F32),
        _empty(sizes.hidden, dtype=_F32),
    )
    rms_norm(x, weight, 1e-6, _BF16)
    add_rms_norm(x, _empty(NUM_SEQS, sizes.hidden), weight, 1e-6, _BF16)


def _cache(sizes: Sizes, dtype: torch.dtype) -> None:
    layout, cache = _new_cache(sizes, dtype)
    rotate_query_and_cache_latent(
        _empty(NUM_SEQS, sizes.num_heads, sizes.nope + sizes.rope),
        _empty(NUM_SEQS, sizes.latent + sizes.rope),
        _empty(sizes.latent, dtype=_F32),
        _empty(CONTEXT, sizes.rope, dtype=_F32),
        _empty(NUM_SEQS, dtype=torch.int32),
        _empty(NUM_SEQS, dtype=torch.int64),
        cache,
    )
    gather_latents(cache, _empty(CONTEXT, dtype=torch.int64), layout, _BF16)
