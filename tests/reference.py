"""An independent reference model: plain torch, one sequence at a time, no code of the product.

It reads config.json and the safetensors files with other code than the product, so a test that
agrees with it and with transformers has two witnesses. Notation: T new tokens, S cached and new,
H heads, n/r/v the nope, rope and value widths of a head, c the latent width, k experts of a token.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

BLOCK = 128
LATENT_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm, whatever rms_norm_eps says
Routes = list[tuple[Tensor, Tensor]]


class Reference:
    """`dtype` is that of every product. `absorbed` scores in the latent space, else keys and values
    are expanded. `forced_routes`: layer -> expert ids [T, k] to use in place of the gate's choice.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float32, absorbed: bool = False
    ) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = {name: w.to(dtype) for name, w in read_weights(folder).items()}
        self.dtype, self.absorbed = dtype, absorbed
        self.freqs, self.rope_gain, softmax_gain = yarn(self.config)
        width = self.config["qk_nope_head_dim"] + self.config["qk_rope_head_dim"]
        self.softmax_scale = width**-0.5 * softmax_gain
        self.forced_routes: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        num_layers = self.config["num_hidden_layers"]
        self.latents: list[Tensor] = [torch.empty(0)] * num_layers
        self.rope_keys: list[Tensor] = [torch.empty(0)] * num_layers
        self.num_tokens = 0
        self.routes: dict[int, Routes] = {}
        self.margins: list[Tensor] = []

    @torch.no_grad()
    def forward(self, ids: list[int]) -> Tensor:
        """Append `ids` to the sequence; logits [T, vocab] of each of them."""
        positions = torch.arange(self.num_tokens, self.num_tokens + len(ids))
        self.num_tokens += len(ids)
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(layer, self._norm(prefix + "input_layernorm", x), positions)
            x = x + self._ffn(layer, self._norm(prefix + "post_attention_layernorm", x))
        return self._linear("lm_head", self._norm("model.norm", x))

    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        """The greedy continuation of a fresh sequence; never stops at eos."""
        self.reset()
        tokens = [int(self.forward(ids)[-1].argmax())]
        while len(tokens) < num_tokens:
            tokens.append(int(self.forward(tokens[-1:])[-1].argmax()))
        return tokens

    def latent_cache(self, layer: int) -> Tensor:
        """[S, c + r]: the normed latent, then the rotated key in interleaved order."""
        return torch.cat([self.latents[layer], self.rope_keys[layer]], -1)

    def token_margin(self) -> Tensor:
        """[T] of a one-call sequence: the smallest gap in any layer between the scores of the last
        group or expert chosen and the first one left out. Near 0, rounding may turn a route."""
        return torch.stack(self.margins).min(0).values

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T

    def _norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weights[name + ".weight"]
        )

    def _attention(self, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        """[T, d] -> [T, d]; multi-head latent attention over the cache and the new tokens."""
        c = self.config
        heads, nope, rank = c["num_attention_heads"], c["qk_nope_head_dim"], c["kv_lora_rank"]
        prefix = f"model.layers.{layer}.self_attn."
        angles = positions[:, None].float() * self.freqs
        cos = (angles.cos() * self.rope_gain).to(self.dtype)[:, None]  # [T, 1, r / 2]
        sin = (angles.sin() * self.rope_gain).to(self.dtype)[:, None]
        q = self._query(prefix, x).unflatten(-1, (heads, -1))  # [T, H, n + r]
        q_nope, q_rope = q[..., :nope], rotate(q[..., nope:], cos, sin)
        kv = self._linear(prefix + "kv_a_proj_with_mqa", x)
        latent = self._norm(prefix + "kv_a_layernorm", kv[:, :rank], LATENT_EPS)
        rope_key = rotate(kv[:, None, rank:], cos, sin)[:, 0]
        latent, rope_key = self._append(layer, latent, rope_key)  # [S, c], [S, r]
        kv_b = self.weights[prefix + "kv_b_proj.weight"].view(heads, -1, rank)
        to_key, to_value = kv_b[:, :nope], kv_b[:, nope:]  # [H, n, c], [H, v, c]
        scores = torch.einsum("thr,sr->hts", q_rope, rope_key)
        if self.absorbed:
            q_latent = torch.einsum("thn,hnc->thc", q_nope, to_key)
            scores = scores + torch.einsum("thc,sc->hts", q_latent, latent)
        else:
            keys = torch.einsum("sc,hnc->shn", latent, to_key)
            scores = scores + torch.einsum("thn,shn->hts", q_nope, keys)
        seen = torch.arange(len(latent)) <= positions[:, None]
        probs = (scores * self.softmax_scale).masked_fill(~seen, -math.inf).softmax(-1)
        if self.absorbed:
            mixed = torch.einsum("hts,sc->thc", probs, latent)
            out = torch.einsum("thc,hvc->thv", mixed, to_value)
        else:
            values = torch.einsum("sc,hvc->shv", latent, to_value)
            out = torch.einsum("hts,shv->thv", probs, values)
        return self._linear(prefix + "o_proj", out.flatten(1))

    def _query(self, prefix: str, x: Tensor) -> Tensor:
        if not self.config["q_lora_rank"]:
            return self._linear(prefix + "q_proj", x)
        compressed = self._linear(prefix + "q_a_proj", x)
        normed = self._norm(prefix + "q_a_layernorm", compressed, LATENT_EPS)
        return self._linear(prefix + "q_b_proj", normed)

    def _append(self, layer: int, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.latents[layer]):
            latent = torch.cat([self.latents[layer], latent])
            rope_key = torch.cat([self.rope_keys[layer], rope_key])
        self.latents[layer], self.rope_keys[layer] = latent, rope_key
        return latent, rope_key

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gated = F.silu(self._linear(prefix + ".gate_proj", x)) * self._linear(
            prefix + ".up_proj", x
        )
        return self._linear(prefix + ".down_proj", gated)

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        prefix = f"model.layers.{layer}.mlp"
        if f"{prefix}.gate.weight" not in self.weights:
            return self._mlp(prefix, x)
        ids, expert_weights = self._gate(prefix + ".gate", x, self.forced_routes.get(layer))
        self.routes.setdefault(layer, []).append((ids, expert_weights))
        y = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, slot = (ids == expert).nonzero(as_tuple=True)
            out = self._mlp(f"{prefix}.experts.{expert}", x[token])
            y.index_add_(0, token, out * expert_weights[token, slot, None].to(self.dtype))
        return y + self._mlp(prefix + ".shared_experts", x)

    def _gate(self, name: str, x: Tensor, forced: Tensor | None) -> tuple[Tensor, Tensor]:
        """Expert ids [T, k] by falling score and their weights [T, k], float32 in every model."""
        c = self.config
        num_experts, groups, k = c["n_routed_experts"], c["n_group"], c["num_experts_per_tok"]
        logits = x.float() @ self.weights[f"{name}.weight"].float().T
        scores = logits.sigmoid() if c["scoring_func"] == "sigmoid" else logits.softmax(-1)
        bias = self.weights.get(f"{name}.e_score_correction_bias")
        choice = scores if bias is None else scores + bias.float()
        if c["topk_method"] != "greedy" and groups > 1:
            grouped = choice.unflatten(-1, (groups, num_experts // groups))
            best_of = 1 if bias is None else 2
            group_scores = grouped.topk(best_of, -1).values.sum(-1)
            self._note_margin(group_scores, c["topk_group"])
            kept = group_scores.topk(c["topk_group"], -1).indices
            lost = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, kept, False)
            choice = grouped.masked_fill(lost[..., None], -math.inf).flatten(1)
        self._note_margin(choice, k)
        ids = choice.topk(k, -1).indices if forced is None else forced
        weights = scores.gather(1, ids)
        if c["norm_topk_prob"]:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return ids, weights * c["routed_scaling_factor"]

    def _note_margin(self, scores: Tensor, k: int) -> None:
        if scores.shape[1] > k:
            top = scores.topk(k + 1, -1).values
            self.margins.append(top[:, k - 1] - top[:, k])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (0, 1), (2, 3), ... of x [T, H, r]; cos and sin [T, 1, r / 2]."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def yarn(config: dict) -> tuple[Tensor, float, float]:
    """Speed of each pair [r / 2], factor on cos and sin, factor on the softmax scale."""
    width, base = config["qk_rope_head_dim"], float(config["rope_theta"])
    freqs = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    scaling = config.get("rope_scaling")
    if not scaling:
        return freqs, 1.0, 1.0

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns over the original context."""
        length = scaling["original_max_position_embeddings"]
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling["factor"]) + 1.0

    low = max(math.floor(pair_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair_of(scaling["beta_slow"])), width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float32)
    ramp = ((pairs - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    all_dim = magnitude(scaling["mscale_all_dim"])
    gain = magnitude(scaling["mscale"]) / all_dim
    return freqs / scaling["factor"] * ramp + freqs * (1 - ramp), gain, all_dim**2


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor by name; fp8 matrices come as their float32 values."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantise(tensors[weight], tensors.pop(name))
    return tensors


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """[out, in] float32 from e4m3 codes and a scale per 128 x 128 block, partial at the edges."""
    rows, columns = codes.shape
    expanded = scales.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes.float() * expanded[:rows, :columns]


def prompts() -> list[list[int]]:
    """Four prompts of 1, 5, 64 and 150 byte tokens, the same on every machine."""
    rng = np.random.Generator(np.random.PCG64(7))
    return [rng.integers(17, 273, length).tolist() for length in (1, 5, 64, 150)]


@dataclass(frozen=True)
class Golden:
    """What the reference says in float32 about one prompt of T tokens.

    logits [at most 4, vocab]: of the last positions. routes: layer -> (ids [T, k], weights [T, k]).
    latent [T, c + r]: cache of layer 1. token_margin [T]: see Reference. greedy: the next tokens.
    """

    ids: list[int]
    logits: Tensor
    routes: dict[int, tuple[Tensor, Tensor]]
    latent: Tensor
    token_margin: Tensor
    greedy: list[int]


def golden(folder: Path, num_greedy: int = 24) -> list[Golden]:
    """One Golden a prompt of `prompts()`."""
    reference = Reference(folder)
    return [_golden(reference, ids, num_greedy) for ids in prompts()]


def _golden(reference: Reference, ids: list[int], num_greedy: int) -> Golden:
    reference.reset()
    logits = reference.forward(ids)
    routes = {layer: parts[0] for layer, parts in reference.routes.items()}
    latent, margin = reference.latent_cache(1), reference.token_margin()
    return Golden(ids, logits[-4:], routes, latent, margin, reference.generate(ids, num_greedy))
