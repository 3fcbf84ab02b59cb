"""Section 3: the attention kernels against the ceilings and torch's own attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.kernels.gpu.cache_layout import CacheLayout
from attention.kernels.gpu.mla_decode import pick_num_splits
from attention.kernels.gpu.ops import attention_ops
from gpu_check.accounting import BF16_BYTES, FLOAT32_BYTES, Work, mla_decode, mla_prefill
from gpu_check.attention_data import BLOCK_SIZE, paged, queries, rope_rows, score_scale
from gpu_check.expert_data import random
from gpu_check.kernel_times import Run, measure
from gpu_check.plan import Context, Unit
from gpu_check.rows import Benchmark
from gpu_check.shapes import TINY, V2_LITE, V3, ModelShape

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
GOAL = "mla-decode"
DECODES = (
    (V3, 64, 4096, BF16, GOAL),
    (V3, 64, 8192, BF16, GOAL),
    (V3, 128, 4096, BF16, GOAL),
    (V3, 256, 4096, BF16, GOAL),
    (V3, 256, 8192, BF16, GOAL),
    (V3, 1, 8192, BF16, ""),
    (V3, 64, 4096, FP8, ""),
    (V3, 256, 8192, FP8, ""),
    (V2_LITE, 1, 1024, BF16, ""),
    (V2_LITE, 64, 1024, BF16, ""),
)
"""Model, batch, context, cache, goal."""
SMOKE_DECODES = ((TINY, 2, 70, BF16, ""), (TINY, 1, 3, FP8, ""))
PREFILLS = ((V3, 4096, 4096), (V3, 1024, 8192), (V2_LITE, 4096, 4096))
"""Model, new tokens, context."""
SMOKE_PREFILLS = ((TINY, 3, 5),)


def units(context: Context) -> Iterator[Unit]:
    """One for each kernel and shape."""
    for one in SMOKE_DECODES if context.smoke else DECODES:
        name = f"times of mla_decode, {one[0].name}, batch {one[1]}, context {one[2]}"
        yield Unit(name, lambda one=one: [decode(context, *one)])
    for prefill_shape in SMOKE_PREFILLS if context.smoke else PREFILLS:
        name = f"times of mla_prefill, {prefill_shape[0].name}, {prefill_shape[1:]}"
        yield Unit(name, lambda one=prefill_shape: [prefill(context, *one)])
    for shape, rows in ((TINY, 3),) if context.smoke else ((V3, 128), (V3, 4096), (V2_LITE, 64)):
        name = f"times of rows and heads, {shape.name}, {rows} rows"
        yield Unit(name, lambda shape=shape, rows=rows: others(context, shape, rows))


def decode(
    context: Context,
    shape: ModelShape,
    batch: int,
    length: int,
    cache_dtype: torch.dtype,
    goal: str,
) -> Benchmark:
    """One token of each of `batch` sequences of the same length."""
    ops, heads = attention_ops("triton"), shape.num_attention_heads
    found = paged(context, shape, [length] * batch, cache_dtype)
    q_latent, q_pe = queries(context, shape, batch, BF16)
    seq_ids, scale = found.seq_ids, score_scale(shape)
    splits = pick_num_splits(batch, heads, context.compute.num_sms, length)

    def run() -> Tensor:
        return ops.mla_decode(
            q_latent, q_pe, found.kv_cache, found.block_tables, seq_ids, found.context_lens,
            scale, num_splits=splits, native_fp8=context.compute.fp8_matmul,
        )  # fmt: skip

    def torch_attention() -> Run:
        """The heads as queries of one head, over a cache that is not paged."""
        q = torch.cat([q_latent, q_pe], dim=2)[:, None]
        k = random(context, 40, batch, 1, length, shape.latent_width).bfloat16()
        v = k[..., : shape.kv_lora_rank]
        return lambda: scaled_dot_product_attention(q, k, v, scale=scale)

    fp8 = cache_dtype == FP8
    place = f"{shape.name}, batch {batch}, context {length}, {splits} splits{', fp8 cache' * fp8}"
    work = mla_decode(shape, batch, length, fp8)
    peers = {"sdpa, bf16, contiguous": torch_attention}
    return measure(context, "mla_decode", place, "bfloat16", work, run, peers, goal)


def prefill(context: Context, shape: ModelShape, num_new: int, length: int) -> Benchmark:
    """A chunk of one sequence."""
    ops, heads = attention_ops("triton"), shape.num_attention_heads
    nope, value = shape.qk_nope_head_dim, shape.v_head_dim
    q = random(context, 41, num_new, heads, shape.query_width).bfloat16()
    kv = random(context, 42, length, heads, nope + value).bfloat16()
    k_pe = random(context, 43, length, shape.qk_rope_head_dim).bfloat16()
    cu_q, cu_k = (
        torch.tensor([0, n], dtype=torch.int32, device=context.device) for n in (num_new, length)
    )
    scale = shape.query_width**-0.5

    def torch_attention() -> Run:
        """Keys with the shared part copied to every head; causal, so without a prefix only."""
        if num_new != length:
            raise NotImplementedError("its causal mask begins at the first key")
        keys = torch.cat([kv[:, :, :nope], k_pe[:, None].expand(-1, heads, -1)], dim=2)
        parts = [part.transpose(0, 1)[None].contiguous() for part in (q, keys, kv[:, :, nope:])]
        return lambda: scaled_dot_product_attention(*parts, is_causal=True, scale=scale)

    return measure(
        context, "mla_prefill", f"{shape.name}, {num_new} new of {length}", "bfloat16",
        mla_prefill(shape, num_new, length),
        lambda: ops.mla_prefill(q, kv, k_pe, cu_q, cu_k, num_new, scale),
        {"sdpa": torch_attention},
    )  # fmt: skip


def others(context: Context, shape: ModelShape, rows: int) -> Iterator[Benchmark]:
    """What else a layer needs: norms, the products of the absorbed form, the cache's new rows."""
    ops, heads, hidden = attention_ops("triton"), shape.num_attention_heads, shape.hidden_size
    latent, nope = shape.kv_lora_rank, shape.qk_nope_head_dim
    place = f"{shape.name}, {rows} rows"
    x, weight = random(context, 44, rows, hidden), random(context, 45, hidden)
    delta = random(context, 46, rows, hidden).bfloat16()
    yield measure(
        context, "add_rms_norm", place, "float32",
        Work(rows * hidden * (2 * FLOAT32_BYTES + 2 * BF16_BYTES) + hidden * FLOAT32_BYTES, 0),
        lambda: ops.add_rms_norm(x, delta, weight, 1e-6, BF16),
    )  # fmt: skip
    q = random(context, 47, rows, heads, shape.query_width).bfloat16()
    w_uk = random(context, 48, heads, latent, nope, std=nope**-0.5).bfloat16()
    moved = heads * latent * nope + rows * heads * (nope + latent)
    yield measure(
        context, "multiply_heads", place, "bfloat16",
        Work(moved * BF16_BYTES, 2 * rows * heads * nope * latent),
        lambda: ops.multiply_heads(q, w_uk),
        {"bmm": lambda: lambda: torch.bmm(q[:, :, :nope].transpose(0, 1), w_uk.mT)},
    )  # fmt: skip
    layout = CacheLayout(latent, shape.qk_rope_head_dim, BF16)
    cache = layout.new_cache(1, rows // BLOCK_SIZE + 1, BLOCK_SIZE, context.device)[0]
    kv_a = random(context, 49, rows, shape.latent_width).bfloat16()
    norm, rope = random(context, 50, latent), rope_rows(context, shape, rows)
    slots = torch.arange(rows, device=context.device)
    positions = slots.int()
    turned = 2 * rows * heads * shape.qk_rope_head_dim + 2 * rows * shape.latent_width
    yield measure(
        context, "rotate_query_and_cache_latent", place, "float32",
        Work(turned * BF16_BYTES + rope.nbytes, 0),
        lambda: ops.rotate_query_and_cache_latent(q, kv_a, norm, rope, positions, slots, cache),
    )  # fmt: skip
