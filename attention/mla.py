"""Multi-head latent attention in its two forms, over tensors only. Pure: no cache bookkeeping.

The cache keeps z (c wide, normed) and k (r wide, rotated, shared by the heads) of a token; kv_b's
rows of a head are W_UK (n) and W_UV (v). Naive: K_h = [W_UK z ; k], V_h = W_UV z; score = (q_nope .
W_UK z + q_pe . k) * scale; out = sum p V_h. Absorbed: q' = W_UK^T q_nope; score = (q' . z + q_pe .
k) * scale; u = sum p z; out = W_UV u. The same algebra: naive expands every cached token once
(2H(n+v)c flops) and then pays 2H(n+r+v) for each pair of query and cached token, absorbed pays
2H(2c+r) a pair and expands nothing. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and
appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.weights import AttentionWeights
from experts.config import ModelConfig
from experts.linear import linear

QUERY_BLOCK = 128
"""Queries of a naive chunk scored at a time: their scores [H, 128, context] stay in the cache."""


@dataclass(frozen=True, slots=True)
class MlaSizes:
    """H heads; n, r, v wide; latent c."""

    num_heads: int
    nope: int
    rope: int
    value: int
    latent: int

    @classmethod
    def of(cls, config: ModelConfig) -> MlaSizes:
        return cls(
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
            config.kv_lora_rank,
        )

    def prefers_naive(self, num_new: int, context_len: int) -> bool:
        """Whether expanding the cached tokens pays for a chunk of num_new queries.

        Per head: num_new queries see (2 context - num_new + 1)/2 cached tokens each, on average.
        For V3 alone on a long prefix it pays from 171 new tokens, for a fresh prompt much earlier.
        """
        pairs = num_new * (2 * context_len - num_new + 1) / 2
        absorbed = pairs * (2 * self.latent + self.rope)
        absorbed += num_new * (self.nope + self.value) * self.latent
        naive = pairs * (self.nope + self.rope + self.value)
        naive += context_len * (self.nope + self.value) * self.latent
        return naive < absorbed


def naive_attention(
    q: Tensor, latents: Tensor, weights: AttentionWeights, sizes: MlaSizes, scale: float
) -> Tensor:
    """A chunk of one sequence against its whole context, causal, keys and values expanded.

    q [Q, H, n + r] float32, rotated: the last Q positions of the context. latents [S, c + r]
    float32. Returns [Q, H * v] float32.
    """
    context_len, heads = latents.shape[0], sizes.num_heads
    expanded = linear(latents[:, : sizes.latent].contiguous(), weights.kv_b)
    per_head = expanded.view(context_len, heads, -1)
    k_nope, values = per_head[:, :, : sizes.nope], per_head[:, :, sizes.nope :]
    k_pe = latents[:, None, sizes.latent :].expand(-1, heads, -1)
    keys = torch.cat([k_nope, k_pe], dim=2)
    out = _causal(q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1), scale)
    return out.transpose(0, 1).reshape(q.shape[0], heads * sizes.value)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [H, Q, w], k [H, S, w], v [H, S, v] -> [H, Q, v]; query i sees keys up to S - Q + i.

    Blocks of queries against the keys they see. Torch's fused attention wants equal widths of keys
    and values on a CPU and else builds all of [H, Q, S]: 5 times slower at 8 heads and 512 tokens.
    """
    num_new, num_before = q.shape[1], k.shape[1] - q.shape[1]
    out = torch.empty(q.shape[0], num_new, v.shape[2])
    for start in range(0, num_new, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_new)
        num_seen = num_before + stop
        later = torch.full((stop - start, num_seen), -torch.inf).triu_(num_before + start + 1)
        scores = torch.baddbmm(
            later.expand(q.shape[0], -1, -1),
            q[:, start:stop],
            k[:, :num_seen].transpose(1, 2),
            alpha=scale,
        )
        out[:, start:stop] = torch.bmm(scores.softmax(-1), v[:, :num_seen])
    return out
