"""Names, shapes and seeded values of the tensors of a small model, in the published layout.

The values of a tensor are a uniform PCG64 stream keyed by (seed, crc32 of its name): the same bits
on every machine, in any order, and a new tensor changes no other. Gains give every sub-layer an
output near 1 and the gate a spread that rounding does not turn.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.tiny_presets import Config

BLOCK = 128  # rows and columns of a block that shares one scale
E4M3_MAX = 448.0
DRAW_CHUNK = 1 << 20  # values drawn at a time, so that float64 never exists for a whole tensor
Shape = tuple[int, ...]


def tensor_shapes(config: Config) -> dict[str, Shape]:
    """Name -> shape of every matrix and vector, in the order of the published files."""
    hidden, vocab, num_layers = (
        config[k] for k in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(num_layers):
        is_moe = i >= config["first_k_dense_replace"] and i % config["moe_layer_freq"] == 0
        shapes |= _layer_shapes(config, i, is_moe)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    for i in range(num_layers, num_layers + config.get("num_nextn_predict_layers", 0)):
        shapes |= _layer_shapes(config, i, is_moe=True) | {
            f"model.layers.{i}.embed_tokens.weight": (vocab, hidden),
            f"model.layers.{i}.enorm.weight": (hidden,),
            f"model.layers.{i}.hnorm.weight": (hidden,),
            f"model.layers.{i}.eh_proj.weight": (hidden, 2 * hidden),
            f"model.layers.{i}.shared_head.norm.weight": (hidden,),
            f"model.layers.{i}.shared_head.head.weight": (vocab, hidden),
        }
    return shapes


def _layer_shapes(config: Config, layer: int, is_moe: bool) -> dict[str, Shape]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    prefix = f"model.layers.{layer}"
    shapes: dict[str, Shape] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
        **_attention_shapes(config, f"{prefix}.self_attn"),
    }
    if not is_moe:
        return shapes | _mlp_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
    num_experts = config["n_routed_experts"]
    shapes[f"{prefix}.mlp.gate.weight"] = (num_experts, hidden)
    if config["topk_method"] == "noaux_tc":
        shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (num_experts,)
    for expert in range(num_experts):
        shapes |= _mlp_shapes(f"{prefix}.mlp.experts.{expert}", hidden, width)
    shared_width = width * config["n_shared_experts"]
    return shapes | _mlp_shapes(f"{prefix}.mlp.shared_experts", hidden, shared_width)


def _attention_shapes(config: Config, prefix: str) -> dict[str, Shape]:
    hidden, heads, q_rank = (
        config[k] for k in ("hidden_size", "num_attention_heads", "q_lora_rank")
    )
    nope, rope, value, rank = (
        config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    q_width = heads * (nope + rope)
    query: dict[str, Shape] = {f"{prefix}.q_proj.weight": (q_width, hidden)}
    if q_rank:
        query = {
            f"{prefix}.q_a_proj.weight": (q_rank, hidden),
            f"{prefix}.q_a_layernorm.weight": (q_rank,),
            f"{prefix}.q_b_proj.weight": (q_width, q_rank),
        }
    return query | {
        f"{prefix}.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        f"{prefix}.kv_a_layernorm.weight": (rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (nope + value), rank),
        f"{prefix}.o_proj.weight": (hidden, heads * value),
    }


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def values(name: str, shape: Shape, seed: int) -> Tensor:
    """A tensor before quantisation: float32 for the bias of a gate, bfloat16 for all else."""
    name = _stream_name(name)
    if name.endswith("norm.weight"):
        return (1.0 + _draw(seed, name, shape, 0.1)).to(torch.bfloat16)
    if name.endswith("e_score_correction_bias"):
        return _draw(seed, name, shape, 0.15)
    return _draw(seed, name, shape, _std(name, shape)).to(torch.bfloat16)


def is_quantised(name: str) -> bool:
    """Which matrices the released fp8 files hold in fp8: all of a layer but gate and eh_proj."""
    is_projection = name.endswith(("_proj.weight", ".kv_a_proj_with_mqa.weight"))
    return is_projection and not name.endswith(".eh_proj.weight")


def _stream_name(name: str) -> str:
    """A next-token module's embedding and head are copies of the model's."""
    if name.endswith(".embed_tokens.weight"):
        return "model.embed_tokens.weight"
    return "lm_head.weight" if name.endswith(".shared_head.head.weight") else name


def _std(name: str, shape: Shape) -> float:
    if name == "model.embed_tokens.weight":
        return 1.0
    gains = {"lm_head.weight": 3.0, "q_b_proj.weight": 2.0, "q_proj.weight": 2.0}
    gains["mlp.gate.weight"] = 1.5
    gain = next((gain for suffix, gain in gains.items() if name.endswith(suffix)), 1.0)
    return gain / math.sqrt(shape[1])


def _draw(seed: int, name: str, shape: Shape, std: float) -> Tensor:
    """Uniform values of standard deviation `std`, float32; 10 ns a value on one core."""
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    out = np.empty(math.prod(shape), dtype=np.float32)
    for start in range(0, out.size, DRAW_CHUNK):
        part = out[start : start + DRAW_CHUNK]
        values = rng.random(part.size)
        values *= 2.0
        values -= 1.0
        values *= std * math.sqrt(3.0)
        part[:] = values
    return torch.from_numpy(out).reshape(shape)


def quantise_blocks(weight: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """float32 [out, in] -> e4m3 [out, in] and scales [ceil(out/128), ceil(in/128)] float32.

    The scale of a block is max|w| / 448, rounded up to a power of two if asked; weight ~ q * scale.
    """
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    height, width = padded.shape
    blocks = padded.view(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / E4M3_MAX
    scales = scales.clamp_min(torch.finfo(torch.float32).tiny)
    if power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    codes = (blocks / scales[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX)
    codes = codes.to(torch.float8_e4m3fn).view(height, width)[:rows, :columns]
    return codes.contiguous(), scales.contiguous()
