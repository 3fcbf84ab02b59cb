"""The weights that training begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from default_model.model import Attention, DeepseekV3, Layer
from experts.config import ModelConfig

HEAD_SCALE = 0.02
"""The head begins as the embedding at this scale: a direction copied is a token predicted."""
SHARED = 8.0
"""Length of a direction that all embeddings share; an embedding's own part is about 16 long."""
FAST_PAIRS = 4
"""Rope pairs that tell neighbours apart."""
SHARPNESS = 7.0
"""Length of key and query in each of these pairs: four fifths of the attention on one position."""


@torch.no_grad()
def set_first_weights(model: DeepseekV3) -> None:
    """Unit embeddings, blocks that begin near zero, and one head that looks back one token."""
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            silent = name.endswith(("o_proj.weight", "down_proj.weight", "experts_down"))
            nn.init.normal_(weight, std=1e-3 if silent else weight.shape[-1] ** -0.5)
    embedding = model.embed_tokens.weight
    nn.init.normal_(embedding, std=1.0)
    model.lm_head.weight.copy_(embedding * HEAD_SCALE)
    hidden = model.config.hidden_size
    shared = torch.full((hidden,), SHARED / hidden**0.5)
    embedding += shared
    first = model.layers[0]
    if isinstance(first, Layer):
        _look_back_one(first.self_attn, model.config, shared, model.angles[1].cpu())


def _look_back_one(attention: Attention, c: ModelConfig, shared: Tensor, turn: Tensor) -> None:
    """Let the first head attend to the token before.

    Copying takes two steps, "what stood before me" and "where have I seen it". Training finds the
    second in minutes when the first is there, and neither in an hour when it is not (measured:
    docs/decisions/0005). The direction that all embeddings share is turned into a constant key and
    query over the fast rope pairs, the query turned back by one position. turn: [rope/2] complex,
    the angles of position 1.
    """
    reader = shared / shared.norm()
    pattern = torch.zeros(c.qk_rope_head_dim // 2, dtype=torch.complex64)
    pattern[:FAST_PAIRS] = SHARPNESS
    scale = (1 + SHARED**2 / c.hidden_size) ** 0.5 / SHARED  # undoes the norm before the layer
    key = torch.view_as_real(pattern).flatten() * scale
    query = torch.view_as_real(pattern * turn.conj()).flatten() * scale
    attention.kv_a_proj_with_mqa.weight[c.kv_lora_rank :] = key[:, None] * reader
    attention.q_a_proj.weight[0] = reader
    head = attention.q_b_proj.weight[: c.qk_nope_head_dim + c.qk_rope_head_dim]
    head.zero_()
    head[c.qk_nope_head_dim :, 0] = query
    nn.init.normal_(attention.o_proj.weight[:, : c.v_head_dim], std=c.hidden_size**-0.5)
