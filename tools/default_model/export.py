"""From a trained model to the files that ship: published names, fp8 blocks, tokenizer, configs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from cluster.tiny_tokenizer import tokenizer_config
from cluster.tiny_weights import BLOCK, E4M3_MAX, is_quantised, quantise_blocks
from default_model.model import DeepseekV3
from default_model.settings import BOS_ID, CONFIG, EOS_ID, PAD_ID

GENERATION: dict[str, Any] = {
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
    "do_sample": False,
}
"""Greedy unless a request says otherwise: most of what this model knows has one right answer."""


TRAINING = "training.json"


def export(model: DeepseekV3, tokenizer: Tokenizer, story: dict[str, Any], folder: Path) -> int:
    """Write the checkpoint folder; returns the bytes of `model.safetensors`.

    `story` is how the model came about (`training.load_run`), kept beside it as `training.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    save_file(dict(stored_tensors(model)), weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors makes files that only their owner may read
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {
        TRAINING: story,
        "config.json": CONFIG,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": tokenizer_config(CONFIG["max_position_embeddings"]),
    }
    for name, value in texts.items():
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return weights.stat().st_size


def stored_tensors(model: DeepseekV3) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file: fp8 with scales, bfloat16, and float32 for the gates' biases."""
    for name, tensor in published_tensors(model.state_dict(), model.config.num_hidden_layers):
        tensor = tensor.float().cpu()
        if is_quantised(name):
            codes, scales = _fp8(tensor)
            yield name, codes
            yield f"{name}_scale_inv", scales
        elif name.endswith("e_score_correction_bias"):
            yield name, tensor.clone()
        else:
            yield name, tensor.to(torch.bfloat16)


def _fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes and block scales; a matrix with partial blocks has the same scale in all of them.

    transformers 5.23 takes the height of a block to be rows / blocks: of kv_a_proj_with_mqa's 160
    rows it would multiply 48 by the other block's scale, and say nothing.
    """
    codes, scales = quantise_blocks(matrix, power_of_two=False)
    if all(size % BLOCK == 0 for size in matrix.shape):
        return codes, scales
    scale = scales.max()
    codes = (matrix / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale.expand_as(scales).contiguous()


def published_tensors(state: dict[str, Tensor], num_layers: int) -> Iterator[tuple[str, Tensor]]:
    """(name as DeepSeek publishes it, view) of the tensors of a model's state.

    The next-token module's embedding and head are the main model's, written twice as in V3.
    """
    for name, tensor in state.items():
        if name.startswith("lm_head"):
            yield name, tensor
            yield f"model.layers.{num_layers}.shared_head.head.weight", tensor
            continue
        if name.startswith("embed_tokens"):
            yield f"model.layers.{num_layers}.{name}", tensor
        yield from _unstacked(f"model.{name}".replace("next_token", f"layers.{num_layers}"), tensor)


def _unstacked(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of each expert; any other tensor as it is."""
    stem, _, stacked = name.rpartition(".experts_")
    if not stem:
        yield name, tensor
        return
    for expert, matrices in enumerate(tensor):
        prefix = f"{stem}.experts.{expert}"
        if stacked == "down":
            yield f"{prefix}.down_proj.weight", matrices
        else:
            gate, up = matrices.chunk(2)
            yield f"{prefix}.gate_proj.weight", gate
            yield f"{prefix}.up_proj.weight", up
