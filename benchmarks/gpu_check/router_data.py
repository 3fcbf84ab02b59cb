"""Seeded routing: logits, placements, load."""

from __future__ import annotations

import torch
from torch import Tensor

from gpu_check.plan import Context
from gpu_check.shapes import ModelShape
from router.gate import GateSpec, GroupScore

_GROUP_SCORES: dict[str, GroupScore] = {
    "greedy": "none",
    "group_limited_greedy": "max",
    "noaux_tc": "top2_sum",
}
NUM_LEVELS = 5
NOISE = 1e-5
"""A choice that changes under such noise is one that rounding may change."""


def gate_spec(shape: ModelShape) -> GateSpec:
    """As the model's configuration says."""
    return GateSpec(
        num_experts=shape.n_routed_experts,
        top_k=shape.num_experts_per_tok,
        scoring=shape.scoring_func,
        group_score=_GROUP_SCORES[shape.topk_method],
        n_group=shape.n_group,
        topk_group=shape.topk_group,
        norm_topk_prob=shape.norm_topk_prob,
        routed_scaling_factor=shape.routed_scaling_factor,
    )


def logits_of(context: Context, shape: ModelShape, rows: int, *, ties: bool) -> Tensor:
    """[T, E] float32; ties: of a few levels only, so that most choices are between equals."""
    size, generator = (rows, shape.n_routed_experts), context.generator(20)
    if ties:
        levels = torch.randint(0, NUM_LEVELS, size, device=context.device, generator=generator)
        return levels.float() / 2
    return torch.randn(size, device=context.device, generator=generator)


def bias_of(context: Context, shape: ModelShape) -> Tensor | None:
    """[E] float32, for the models that have one."""
    if shape.topk_method != "noaux_tc":
        return None
    size = shape.n_routed_experts
    return torch.randn(size, device=context.device, generator=context.generator(21)).mul_(0.1)


def noise_like(context: Context, logits: Tensor) -> Tensor:
    """Uniform in -NOISE..NOISE."""
    noise = torch.rand(logits.shape, device=context.device, generator=context.generator(22))
    return noise.mul_(2 * NOISE).sub_(NOISE)


def placement(context: Context, shape: ModelShape, num_workers: int) -> Tensor:
    """holders [E, 2] int32: consecutive experts on a worker, every third one on the next too."""
    experts = torch.arange(shape.n_routed_experts, device=context.device)
    first = experts * num_workers // shape.n_routed_experts
    replicated = (experts % 3 == 0) & (num_workers > 1)
    second = torch.where(replicated, (first + 1) % num_workers, -1)
    return torch.stack([first, second], dim=1).int()


def chosen(context: Context, shape: ModelShape, rows: int) -> tuple[Tensor, Tensor]:
    """topk_ids [T, k] int32 ascending, topk_weights [T, k] float32: evenly at random."""
    generator, top_k = context.generator(23), shape.num_experts_per_tok
    scores = torch.rand(rows, shape.n_routed_experts, device=context.device, generator=generator)
    ids = scores.topk(top_k, dim=1).indices.sort(dim=1).values.int()
    return ids, torch.rand(rows, top_k, device=context.device, generator=generator)


def load_of(context: Context, num_workers: int) -> Tensor:
    """[W] int32: rows that wait at each worker."""
    generator = context.generator(24)
    size = (num_workers,)
    return torch.randint(0, 50, size, device=context.device, generator=generator).int()
