"""Section 2: the kernels of the attention tier against their twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attention.kernels.gpu.cache_layout import CacheLayout, read_rows
from attention.kernels.gpu.mla_decode import FIXED_SPLITS, pick_num_splits
from attention.kernels.gpu.ops import AttentionOps, attention_ops
from gpu_check.attention_data import BLOCK_SIZE, paged, queries, rope_rows, score_scale
from gpu_check.compare import poison
from gpu_check.expert_data import random
from gpu_check.kernel_checks import Case, alone, case, units_of
from gpu_check.plan import Context, Unit
from gpu_check.shapes import ODD, TINY, V2_LITE, V3, ModelShape

EPS = 1e-6
CONTEXTS = ([1], [700, 0, 64, 65, 1], [4096] * 4 + [37, 0, 2049, 8192])
"""V2 has V3's heads and latent: it needs no shapes of its own here."""
SMOKE_CONTEXTS = ([65, 0],)
CHUNKS = ([(1, 1)], [(37, 37), (1, 130), (200, 457)], [(2048, 2048), (512, 4096)])
"""(new tokens, context)"""
SMOKE_CHUNKS = ([(3, 3), (2, 9)],)


def units(context: Context, kernels: Any = None) -> Iterator[Unit]:
    """kernels: other than the Triton ones, for tests."""
    twins = attention_ops("torch")
    found = cases(context, twins)
    return units_of(found, kernels or attention_ops("triton"), twins, twice=not context.smoke)


def cases(context: Context, twins: AttentionOps) -> Iterator[Case]:
    """`twins` are exempt from giving a row the same bits in every batch."""
    for shape in (TINY,) if context.smoke else (V2_LITE, V3, ODD):
        dtypes = [torch.bfloat16, *([torch.float32] if shape is ODD else [])]
        for dtype in dtypes:
            for rows in (5,) if context.smoke else (1, 64, 1000):
                yield from _row_cases(context, twins, shape, rows, dtype)
            for chunks in SMOKE_CHUNKS if context.smoke else CHUNKS:
                yield _prefill_case(context, shape, chunks, dtype)
        for cache_dtype in (*dtypes, torch.float8_e4m3fn):
            for rows in (5,) if context.smoke else (1, 300):
                yield from _cache_cases(context, shape, rows, cache_dtype)
            for lengths in SMOKE_CONTEXTS if context.smoke else CONTEXTS:
                yield from _decode_cases(context, twins, shape, lengths, cache_dtype)


def _name(dtype: torch.dtype) -> str:
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def _row_cases(
    context: Context, twins: AttentionOps, shape: ModelShape, rows: int, dtype: torch.dtype
) -> Iterator[Case]:
    """Norms, and a matrix a head."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    latent, nope, value = shape.kv_lora_rank, shape.qk_nope_head_dim, shape.v_head_dim
    place, name = f"{shape.name}, {rows} rows", _name(dtype)

    def norm(ops: AttentionOps) -> Tensor:
        weight = random(context, 1, hidden).add_(1)
        return ops.rms_norm(random(context, 2, rows, hidden).to(dtype), weight, EPS, dtype)

    def add_norm(ops: AttentionOps) -> tuple[Tensor, Tensor]:
        weight, x = random(context, 1, hidden).add_(1), random(context, 2, rows, hidden)
        delta = random(context, 3, rows, hidden).to(dtype)
        return x, ops.add_rms_norm(x, delta, weight, EPS, dtype)

    def absorb(ops: AttentionOps, count: int = rows) -> Tensor:
        q = random(context, 4, rows, heads, shape.query_width).to(dtype)[:count]
        return ops.multiply_heads(q, _kv_b(context, shape, dtype)[:, :nope].mT.contiguous())

    def expand(ops: AttentionOps) -> Tensor:
        u = random(context, 5, rows, heads, latent).to(dtype)
        return ops.multiply_heads(u, _kv_b(context, shape, dtype)[:, nope:])

    yield case("rms_norm", place, name, norm)
    yield case("add_rms_norm", place, name, add_norm)
    yield case("multiply_heads", f"{place}, {nope} to {latent}", name, absorb)
    yield case("multiply_heads", f"{place}, {latent} to {value}", name, expand)
    if rows > 1:
        yield alone("multiply_heads", place, name, absorb, twins)


def _kv_b(context: Context, shape: ModelShape, dtype: torch.dtype) -> Tensor:
    """[H, n + v, c]"""
    heads, latent = shape.num_attention_heads, shape.kv_lora_rank
    wide = shape.qk_nope_head_dim + shape.v_head_dim
    return random(context, 6, heads, wide, latent, std=latent**-0.5).to(dtype)


def _cache_cases(
    context: Context, shape: ModelShape, rows: int, cache_dtype: torch.dtype
) -> Iterator[Case]:
    layout = CacheLayout(shape.kv_lora_rank, shape.qk_rope_head_dim, cache_dtype)
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
    place, name = f"{shape.name}, {rows} rows", _name(cache_dtype)
    num_blocks = rows // BLOCK_SIZE + 2

    def write(ops: AttentionOps) -> tuple[Tensor, Tensor]:
        size = (rows, shape.num_attention_heads, shape.query_width)
        q = random(context, 7, *size).to(dtype)
        kv_a = random(context, 8, rows, shape.latent_width).to(dtype)
        cache = poison(layout.new_cache(1, num_blocks, BLOCK_SIZE, context.device)[0])
        free = num_blocks * BLOCK_SIZE
        slots = torch.randperm(free, device=context.device, generator=context.generator(9))[:rows]
        slots[rows // 2] = -1
        positions = torch.arange(rows, dtype=torch.int32, device=context.device)
        norm = random(context, 10, shape.kv_lora_rank).add_(1)
        rope = rope_rows(context, shape, rows)
        ops.rotate_query_and_cache_latent(q, kv_a, norm, rope, positions, slots, cache)
        return q, read_rows(cache.view(-1, layout.width), layout)

    def gather(ops: AttentionOps) -> Tensor:
        found = paged(context, shape, [rows], cache_dtype)
        blocks = found.block_tables[0].long()
        slots = blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=context.device)
        slots = slots.flatten()[:rows].flip(0)
        slots[rows // 2] = -1
        return ops.gather_latents(found.kv_cache, slots, layout, dtype)

    yield case("rotate_query_and_cache_latent", place, name, write)
    yield case("gather_latents", place, name, gather)


def _decode_cases(
    context: Context,
    twins: AttentionOps,
    shape: ModelShape,
    lengths: list[int],
    cache_dtype: torch.dtype,
) -> Iterator[Case]:
    """One token of each sequence."""
    dtype = torch.float32 if cache_dtype == torch.float32 else torch.bfloat16
    name, num_tokens = _name(cache_dtype), len(lengths)
    place = f"{shape.name}, contexts {' '.join(map(str, lengths))}"
    picked = pick_num_splits(
        num_tokens, shape.num_attention_heads, context.compute.num_sms, max(lengths)
    )

    def decode(ops: AttentionOps, count: int = num_tokens, splits: int = picked) -> Tensor:
        found = paged(context, shape, lengths, cache_dtype)
        q_latent, q_pe = queries(context, shape, num_tokens, dtype)
        return ops.mla_decode(
            q_latent[:count], q_pe[:count], found.kv_cache, found.block_tables,
            found.seq_ids[:count], found.context_lens[:count], score_scale(shape),
            num_splits=splits, native_fp8=context.compute.fp8_matmul,
        )  # fmt: skip

    for splits in sorted({1, FIXED_SPLITS, picked}):
        yield case(
            "mla_decode",
            f"{place}, {splits} splits",
            name,
            lambda ops, splits=splits: decode(ops, splits=splits),
        )
    if num_tokens > 1:

        def fixed(ops: AttentionOps, count: int = num_tokens) -> Tensor:
            return decode(ops, count, FIXED_SPLITS)

        yield alone("mla_decode", place, name, fixed, twins)


def _prefill_case(
    context: Context, shape: ModelShape, chunks: list[tuple[int, int]], dtype: torch.dtype
) -> Case:
    """Chunks behind their cached prefixes, and three rows of padding."""
    news, contexts = zip(*chunks, strict=True)
    heads, value, nope = shape.num_attention_heads, shape.v_head_dim, shape.qk_nope_head_dim

    def starts(counts: tuple[int, ...]) -> Tensor:
        ends = torch.tensor((0, *counts), device=context.device).cumsum(0)
        return ends.int()

    def prefill(ops: AttentionOps) -> Tensor:
        q = random(context, 11, sum(news) + 3, heads, shape.query_width).to(dtype)
        kv = random(context, 12, sum(contexts), heads, nope + value).to(dtype)
        k_pe = random(context, 13, sum(contexts), shape.qk_rope_head_dim).to(dtype)
        scale = 2.0 * shape.query_width**-0.5
        out = ops.mla_prefill(q, kv, k_pe, starts(news), starts(contexts), max(news), scale)
        return out[: sum(news)]

    what = " ".join(f"{new}/{all_}" for new, all_ in chunks)
    return case("mla_prefill", f"{shape.name}, new/context {what}", _name(dtype), prefill)
