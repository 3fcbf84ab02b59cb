"""Muon for the matrices of the layers, AdamW for all else.

Muon steps along the nearest orthogonal matrix of the momentum (Jordan et al. 2024: Newton-Schulz
iterations, quintic). torch.optim.Muon takes 2-D parameters one by one; here the experts of a layer
are one stacked parameter and go through one batched product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from default_model.settings import Recipe

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 4


class Muon(torch.optim.Optimizer):
    """Parameters [.., out, in]; `experts_gate_up` is two matrices an expert, taken apart."""

    def __init__(self, parameters: list[tuple[str, nn.Parameter]], recipe: Recipe) -> None:
        groups = [
            {"params": [weight], "split": 2 if name.endswith("gate_up") else 1}
            for name, weight in parameters
        ]
        super().__init__(groups, {"lr": recipe.matrix_lr, "weight_decay": recipe.weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weight = group["params"][0]
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"]
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            ahead = weight.grad.lerp_(momentum, MOMENTUM)
            rows, columns = weight.shape[-2] // group["split"], weight.shape[-1]
            update = orthogonal(ahead.view(-1, rows, columns)).view_as(weight)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrices: Tensor) -> Tensor:
    """[N, out, in] -> about U V^T of each matrix's U S V^T."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizers:
    """Both optimizers under one learning rate scale."""

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        matrices, others = _split(model)
        embedding = [w for name, w in others if "embed_tokens" in name]
        rest = [w for name, w in others if "embed_tokens" not in name]
        fast_lr = recipe.vector_lr * recipe.embedding_lr_factor
        adamw = torch.optim.AdamW(
            [{"params": embedding, "lr": fast_lr}, {"params": rest}],
            lr=recipe.vector_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self._others = [weight for _, weight in others]
        self._all = [Muon(matrices, recipe), adamw]
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def step(self, lr_scale: float) -> None:
        """One step on the gradients, which are then gone."""
        nn.utils.clip_grad_norm_(self._others, 1.0)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale
            optimizer.step()
            optimizer.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        """What a resumed run needs."""
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue from `state_dict`."""
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


Named = list[tuple[str, nn.Parameter]]


def _split(model: nn.Module) -> tuple[Named, Named]:
    """The matrices of the layers, and the rest: embedding, head, gates and norms."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        special = ("embed_tokens", "lm_head", "gate.weight")
        is_matrix = weight.dim() >= 2 and not any(part in name for part in special)
        (matrices if is_matrix else others).append((name, weight))
    return matrices, others
