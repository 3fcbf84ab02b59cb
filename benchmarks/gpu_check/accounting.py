"""Fewest bytes a kernel must move through device memory, and its FLOPs (2 a multiply-add). Pure.

Every input is read once and every output written once; of the experts' weights those that some
row needs. What a kernel moves beyond that (partial results, padding) is its loss.
"""

from __future__ import annotations

from typing import NamedTuple

from gpu_check.shapes import ModelShape

BF16_BYTES = 2
FLOAT32_BYTES = 4
SCALE_BLOCK = 128


class Work(NamedTuple):
    """What a piece of work costs at least."""

    num_bytes: int
    flops: int

    def plus(self, other: Work) -> Work:
        """Both, one after the other."""
        return Work(self.num_bytes + other.num_bytes, self.flops + other.flops)


def blocks(width: int) -> int:
    """Groups of 128 that share a scale."""
    return -(-width // SCALE_BLOCK)


def latent_row_bytes(shape: ModelShape, fp8: bool) -> int:
    """A cached token of one layer; fp8: codes, float32 scales and a bfloat16 rotated key, padded
    to 16 bytes (V3: 656)."""
    latent, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
    if not fp8:
        return (latent + rope) * BF16_BYTES
    packed = latent + blocks(latent) * FLOAT32_BYTES + rope * BF16_BYTES
    return -(-packed // 16) * 16


def mla_decode(shape: ModelShape, batch: int, context: int, fp8: bool = False) -> Work:
    """One new token of each sequence, absorbed: scores over c + r, values over c."""
    latent, heads = shape.kv_lora_rank, shape.num_attention_heads
    cache = batch * context * latent_row_bytes(shape, fp8)
    vectors = batch * heads * (shape.latent_width + latent) * BF16_BYTES
    return Work(cache + vectors, 2 * batch * heads * context * (shape.latent_width + latent))


def mla_prefill(shape: ModelShape, num_new: int, context: int) -> Work:
    """The last num_new tokens of one sequence, naive and causal."""
    heads, value = shape.num_attention_heads, shape.v_head_dim
    pairs = num_new * (2 * context - num_new + 1) // 2
    queries = num_new * heads * (shape.query_width + value)
    keys = context * (heads * (shape.qk_nope_head_dim + value) + shape.qk_rope_head_dim)
    return Work((queries + keys) * BF16_BYTES, 2 * pairs * heads * (shape.query_width + value))


def expert_bytes(shape: ModelShape, fp8: bool = False) -> int:
    """gate, up and down of one expert."""
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    if not fp8:
        return 3 * hidden * width * BF16_BYTES
    return 3 * (hidden * width + blocks(hidden) * blocks(width) * FLOAT32_BYTES)


def gate_up(shape: ModelShape, rows: int, pairs: int, num_active: int, fp8: bool = False) -> Work:
    """The first half of the experts: `rows` tokens read, `pairs` (token, expert) rows written."""
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    weights = num_active * expert_bytes(shape, fp8) * 2 // 3
    moved = rows * _row_bytes(hidden, fp8) + pairs * width * BF16_BYTES
    return Work(weights + moved, 4 * pairs * hidden * width)


def down(shape: ModelShape, pairs: int, num_active: int, fp8: bool = False) -> Work:
    """The second half: weighted float32 rows."""
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    weights = num_active * expert_bytes(shape, fp8) // 3
    moved = pairs * (_row_bytes(width, fp8) + hidden * FLOAT32_BYTES)
    return Work(weights + moved, 2 * pairs * hidden * width)


def _row_bytes(width: int, fp8: bool) -> int:
    return width + blocks(width) * FLOAT32_BYTES if fp8 else width * BF16_BYTES


def attention_weight_bytes(shape: ModelShape) -> int:
    """bfloat16 matrices of one layer that a decode step reads. kv_b is read as its two halves."""
    hidden, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.kv_lora_rank
    queries = heads * shape.query_width
    query = hidden * queries
    if shape.q_lora_rank is not None:
        query = shape.q_lora_rank * (hidden + queries)
    key_value = heads * (shape.qk_nope_head_dim + shape.v_head_dim) * latent
    rest = shape.latent_width * hidden + heads * shape.v_head_dim * hidden
    return (query + key_value + rest) * BF16_BYTES


def decode_step(shape: ModelShape, batch: int, context: int, active_experts: float) -> Work:
    """One token for each of `batch` sequences, everything in bfloat16.

    active_experts: of a layer, that some token chose. Norms, gates and hidden states (below 1 %)
    are left out, the embedding too: a step reads `batch` rows of it.
    """
    hidden, layers = shape.hidden_size, shape.num_hidden_layers
    dense = shape.first_k_dense_replace * 3 * hidden * shape.intermediate_size * BF16_BYTES
    shared = shape.num_moe_layers * shape.n_shared_experts * expert_bytes(shape)
    head = shape.vocab_size * hidden * BF16_BYTES
    for_all = layers * attention_weight_bytes(shape) + dense + shared + head
    experts = round(shape.num_moe_layers * active_experts * expert_bytes(shape))
    core = mla_decode(shape, batch, context)
    chosen = shape.num_moe_layers * shape.num_experts_per_tok * expert_bytes(shape)
    products = (for_all + chosen) // BF16_BYTES * 2 * batch
    return Work(for_all + experts + layers * core.num_bytes, products + layers * core.flops)


def experts_touched(shape: ModelShape, tokens: int) -> float:
    """Expected experts of a layer that evenly routed tokens need."""
    experts, chosen = shape.n_routed_experts, shape.num_experts_per_tok
    return float(experts * (1 - (1 - chosen / experts) ** tokens))


def prefill(shape: ModelShape, batch: int, length: int) -> Work:
    """Whole prompts in bfloat16, logits of the last token of each: every weight is read once."""
    step = decode_step(shape, 1, 0, shape.n_routed_experts)
    head = shape.vocab_size * shape.hidden_size * 2
    core = mla_prefill(shape, length, length)
    products = batch * (length * (step.flops - head) + head)
    return Work(step.num_bytes, products + batch * shape.num_hidden_layers * core.flops)
