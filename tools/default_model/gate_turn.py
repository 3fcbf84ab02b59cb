"""Turn the gates once toward what tells the domains apart.

Left alone, gates this small sort tokens, not texts: a full stop visits the same experts in a story
and in a sum, and the four busiest experts of a domain take 1.9 times the even share on average
(docs/decisions/0005). What a text is about is there all the same: a linear map of a gate's input
names the domain of four tokens in five. This adds that map, scaled, to the gate's rows: each domain
gets for its own the experts that it already uses most. Training goes on from there as before,
without an auxiliary loss, balanced by the biases alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from default_model.batches import Batch
from default_model.corpus.domains import DOMAINS
from default_model.model import DeepseekV3, Gate
from default_model.settings import PAD_ID

TINY = 1e-9
"""Instead of nothing: of a domain without rows or an expert without them."""
RIDGE = 0.1
"""Of the mean variance: keeps the least squares from using what hardly varies."""


@torch.no_grad()
def turn_gates(model: DeepseekV3, batches: Sequence[Batch], strength: float) -> None:
    """Change the weights of the main layers' gates; `strength` in logits per standard deviation."""
    num_domains = len(DOMAINS)
    domains = torch.cat([_domains_of_inputs(batch) for batch in batches])
    for gate, inputs, ids in _observe(model, batches):
        rows = torch.bincount(
            (domains[:, None] * len(gate.weight) + ids.long()).flatten(),
            minlength=num_domains * len(gate.weight),
        ).view(num_domains, -1)
        directions = domain_directions(inputs, domains)
        for domain, experts in enumerate(own_experts(rows.float())):
            gate.weight[experts] += strength * directions[domain].to(gate.weight)


def domain_directions(inputs: Tensor, domains: Tensor) -> Tensor:
    """[N, d], [N] -> [D, d]: least squares to each domain's indicator, outputs of unit variance."""
    centered = inputs - inputs.mean(dim=0)
    covariance = centered.T @ centered / len(inputs)
    ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance))
    indicator = F.one_hot(domains, len(DOMAINS)).float()
    moments = centered.T @ (indicator - indicator.mean(dim=0)) / len(inputs)
    solution = torch.linalg.solve(covariance + ridge, moments)  # [d, D]
    return (solution / (centered @ solution).std(dim=0).clamp_min(TINY)).T


def own_experts(rows: Tensor) -> list[list[int]]:
    """[D, E] rows -> the experts of each domain, by turns its most typical one still free."""
    num_domains, num_experts = rows.shape
    shares = rows / rows.sum(dim=1, keepdim=True).clamp_min(1)
    typical = shares / shares.mean(dim=0).clamp_min(TINY)
    own: list[list[int]] = [[] for _ in range(num_domains)]
    for _ in range(num_experts // num_domains):
        for domain in range(num_domains):
            expert = int(typical[domain].argmax())
            own[domain].append(expert)
            typical[:, expert] = -1.0
    return own


def _observe(model: DeepseekV3, batches: Sequence[Batch]) -> list[tuple[Gate, Tensor, Tensor]]:
    """Each main gate with its inputs [N, d] and choices [N, k] over all batches, no padding."""
    gates = model.gates()[:-1]
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in gates]

    def observer(number: int) -> Callable[[Gate, tuple[Tensor], tuple[Tensor, Tensor]], None]:
        return lambda gate, args, out: seen[number].append((args[0], out[0]))

    hooks = [gate.register_forward_hook(observer(number)) for number, gate in enumerate(gates)]
    for batch in batches:
        model(batch.ids, batch.mask)
    for hook in hooks:
        hook.remove()
    real = torch.cat([(batch.ids != PAD_ID).flatten() for batch in batches]).cpu()
    return [
        (gate, *(torch.cat(part).float().cpu()[real] for part in zip(*rows, strict=True)))
        for gate, rows in zip(gates, seen, strict=True)
    ]


def _domains_of_inputs(batch: Batch) -> Tensor:
    """[N] of every real token; `Batch.domains` are those of the targets, one position ahead."""
    domains = torch.cat([batch.domains[:, :1], batch.domains[:, :-1]], dim=1)
    return domains[batch.ids != PAD_ID].cpu()
