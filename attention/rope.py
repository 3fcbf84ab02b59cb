"""Rotary position embedding with YaRN, on interleaved pairs.

theta_i = base^(-2i/r), i < r/2. YaRN leaves fast dimensions alone and divides slow ones by
`factor`, with a linear ramp between: dim(t) = r ln(L/(2 pi t)) / (2 ln base), lo =
max(floor(dim(beta_fast)), 0), hi = min(ceil(dim(beta_slow)), r-1). It applies at every position,
not only past L, the original length. Pairs (x0,x1), (x2,x3), .. turn by position * theta_i: (a cos
- b sin, a sin + b cos).

Sources: YaRN (arXiv 2309.00071); DeepSeek-V2/V3 modeling files. Half-split rotation on the same
weights runs and is silently wrong: tests/attention/test_rope.py holds numbers of both steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experts.config import ModelConfig, RopeScaling


def yarn_range(r: int, base: float, scaling: RopeScaling) -> tuple[float, float]:
    """First and last pair index of the ramp (a float when both fall together)."""

    def dim(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return r * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(dim(scaling.beta_fast)), 0)
    high = min(math.ceil(dim(scaling.beta_slow)), r - 1)
    return float(low), high + 0.001 if low == high else float(high)


def frequencies(r: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Angle a position adds to each pair: float32 [r/2]."""
    theta: Tensor = 1.0 / base ** (torch.arange(0, r, 2, dtype=torch.float32) / r)
    if scaling is None:
        return theta
    low, high = yarn_range(r, base, scaling)
    ramp = ((torch.arange(r // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return theta * (1 - ramp) + theta / scaling.factor * ramp


def _mscale(factor: float, k: float) -> float:
    return 0.1 * k * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Factor of the attention scores: (n+r)^-0.5, and with YaRN times m(mscale_all_dim)^2."""
    scale = 1.0 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    scaling = config.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    mscale = _mscale(scaling.factor, scaling.mscale_all_dim)
    return scale * mscale * mscale


def rope_table(config: ModelConfig, num_positions: int) -> Tensor:
    """cos then sin of every position: float32 [num_positions, r] (r/2 of each).

    Angles are float32 products as in the models' own code. One table for all layers, computed once:
    each row has the same bits whatever the batch, which a vectorised cos over a step's positions
    would not promise.
    """
    scaling = config.rope_scaling
    theta = frequencies(config.qk_rope_head_dim, config.rope_theta, scaling)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * theta
    ratio = 1.0
    if scaling is not None:
        ratio = _mscale(scaling.factor, scaling.mscale) / _mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return torch.cat([angles.cos() * ratio, angles.sin() * ratio], dim=1)


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Turn interleaved pairs: x [T, ..., r] by table rows [T, r]; a new tensor like x."""
    half = rows.shape[1] // 2
    shape = (rows.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = rows[:, :half].view(shape), rows[:, half:].view(shape)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
