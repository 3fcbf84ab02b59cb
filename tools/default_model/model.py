"""DeepSeek-V3 in the form that trains: the published names, experts stacked, plain torch.

Routing is Shoal's own gate and the angles are Shoal's own rope table, so that what is trained is
what is served. The auxiliary-loss-free balance is a bias on the choice alone: `balance`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.rope import rope_table
from default_model.grouped import GroupedSwiglu
from experts.config import ModelConfig
from router.gate import GateSpec, select_experts_torch

PEAK_ROWS = 2
"""Sequences of a batch in which the largest attention scores are looked for."""
FASTEST_SHRINK = 0.95
"""Of a head's scores in one step; faster, the layers after it could not follow."""


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Multi-head latent attention, naive form; `peaks`: largest scores of the last pass [H]."""

    peaks: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        if c.q_lora_rank is None:
            raise ValueError("this trainer makes models with q_lora_rank")
        self.config, heads = c, c.num_attention_heads
        self.register_buffer("peaks", torch.zeros(heads), persistent=False)
        self.q_a_proj = _linear(c.hidden_size, c.q_lora_rank)
        self.q_a_layernorm = RmsNorm(c.q_lora_rank, c.rms_norm_eps)
        self.q_b_proj = _linear(c.q_lora_rank, heads * (c.qk_nope_head_dim + c.qk_rope_head_dim))
        self.kv_a_proj_with_mqa = _linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim)
        self.kv_a_layernorm = RmsNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.kv_b_proj = _linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim))
        self.o_proj = _linear(heads * c.v_head_dim, c.hidden_size)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        """x [B, T, d], angles [T, rope/2] complex, mask [B, 1, T, T] or None: causal."""
        c = self.config
        batch, length, _ = x.shape
        nope, rope = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_pe = q.view(batch, length, -1, nope + rope).split([nope, rope], dim=-1)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([c.kv_lora_rank, rope], dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        k_nope, v = kv.view(batch, length, -1, nope + c.v_head_dim).split([nope, c.v_head_dim], -1)
        k_pe = _turn(k_pe.unsqueeze(2), angles).expand(-1, -1, c.num_attention_heads, -1)
        q = torch.cat([q_nope, _turn(q_pe, angles)], dim=-1).transpose(1, 2)
        k = torch.cat([k_nope, k_pe], dim=-1).transpose(1, 2)
        if self.training:
            self.peaks = _peaks(q[:PEAK_ROWS].detach(), k[:PEAK_ROWS].detach(), mask)
        mixed = F.scaled_dot_product_attention(
            q, k, v.transpose(1, 2), attn_mask=mask, is_causal=mask is None
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def clip_scores(self, limit: float) -> None:
        """Shrink the query and key weights of heads whose scores passed `limit` (QK-clip, Kimi K2).

        Muon's steps do not shrink, so scores would grow until every head looks at one token with
        all its weight and learns nothing more. The rope key is shared by the heads and stays.
        """
        c = self.config
        factor = (limit / self.peaks.clamp_min(limit)).clamp_min(FASTEST_SHRINK)
        factor = factor.view(-1, 1, 1)  # [H, 1, 1]
        heads, nope = c.num_attention_heads, c.qk_nope_head_dim
        query = self.q_b_proj.weight.view(heads, -1, self.q_b_proj.in_features)
        query[:, :nope] *= factor.sqrt()
        query[:, nope:] *= factor
        key = self.kv_b_proj.weight.view(heads, -1, self.kv_b_proj.in_features)
        key[:, :nope] *= factor.sqrt()


class Mlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = _linear(hidden, width)
        self.up_proj = _linear(hidden, width)
        self.down_proj = _linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Gate(nn.Module):
    """Scores, and the bias that only chooses; `load` counts the last pass's rows by expert."""

    e_score_correction_bias: Tensor
    load: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.spec = GateSpec.of(c)
        self.weight = nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))
        self.register_buffer("load", torch.zeros(c.n_routed_experts), persistent=False)
        self.topk_ids = torch.empty(0, c.num_experts_per_tok, dtype=torch.int64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, d] -> ids [T, k] and weights [T, k]."""
        logits = F.linear(x, self.weight)
        ids, weights = select_experts_torch(logits, self.e_score_correction_bias, self.spec)
        self.topk_ids = ids
        self.load = torch.bincount(ids.flatten(), minlength=len(self.weight)).float()
        return ids, weights

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """b += speed * sign(mean load - load): what is busy is chosen a little less."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)


class Moe(nn.Module):
    """Routed experts and the shared one."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.gate = Gate(c)
        self.experts_gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.experts_down = nn.Parameter(torch.empty(experts, hidden, width))
        self.shared_experts = Mlp(hidden, c.n_shared_experts * width)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        ids, weights = self.gate(rows)
        routed = GroupedSwiglu.apply(rows, ids, weights, self.experts_gate_up, self.experts_down)
        return routed.view_as(x) + self.shared_experts(x)


class Layer(nn.Module):
    """Attention, then a dense MLP or experts, each on its norm and added."""

    def __init__(self, c: ModelConfig, dense: bool) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Mlp(c.hidden_size, c.intermediate_size) if dense else Moe(c)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class NextToken(Layer):
    """The multi-token-prediction module: from h_i and token i+1 to the hidden state for i+2."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__(c, dense=False)
        self.enorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.hnorm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.eh_proj = _linear(2 * c.hidden_size, c.hidden_size)
        self.shared_head = nn.ModuleDict({"norm": RmsNorm(c.hidden_size, c.rms_norm_eps)})

    def draft(
        self, hidden: Tensor, embedded: Tensor, angles: Tensor, mask: Tensor | None
    ) -> Tensor:
        """hidden [B, T, d] before the final norm, embedded [B, T, d] of the tokens after."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))
        normed: Tensor = self.shared_head["norm"](self(x, angles, mask))
        return normed


class DeepseekV3(nn.Module):
    """The main model and its next-token module, parameters in float32."""

    angles: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        dense = c.first_k_dense_replace
        self.layers = nn.ModuleList(Layer(c, i < dense) for i in range(c.num_hidden_layers))
        self.norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = _linear(c.hidden_size, c.vocab_size)
        self.next_token = NextToken(c)
        cos, sin = rope_table(c, c.max_position_embeddings).chunk(2, dim=1)
        self.register_buffer("angles", torch.complex(cos, sin), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [B, T] -> hidden states before the final norm [B, T, d]."""
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.angles[: ids.shape[1]], mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states of the last layer [..., d] -> [..., vocab]."""
        return self.lm_head(self.norm(hidden))

    def draft_logits(self, hidden: Tensor, next_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden [B, T, d] and the tokens after them [B, T] -> logits of the ones after those."""
        angles = self.angles[: next_ids.shape[1]]
        drafted = self.next_token.draft(hidden, self.embed_tokens(next_ids), angles, mask)
        return self.lm_head(drafted)

    def attentions(self) -> list[Attention]:
        """Of the main layers, then of the next-token module."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def gates(self) -> list[Gate]:
        """The gates of the main MoE layers, then the next-token module's."""
        return [module for module in self.modules() if isinstance(module, Gate)]


def _linear(num_in: int, num_out: int) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=False)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate interleaved pairs: x [B, T, H, r] by angles [T, r/2] complex."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2)


def _peaks(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Largest score of each head [H]; q, k [B, H, T, r], mask [B, 1, T, T] or None: causal."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is None:
        length = scores.shape[-1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask[: len(q)], -torch.inf).amax(dim=(0, 2, 3))
