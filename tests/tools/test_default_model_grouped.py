"""The grouped experts against a loop over tokens, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from default_model.grouped import GroupedSwiglu

NUM_EXPERTS, WIDTH, HIDDEN = 5, 3, 4
CHOICES = pytest.mark.parametrize(
    "ids",
    [
        [[0, 3], [3, 4], [0, 4], [3, 1], [0, 1]],  # expert 2 has no rows
        [[1, 4]],  # one token
        [[2], [2], [2], [2]],  # one expert has all rows
        [[0], [4]],  # the first and the last
    ],
    ids=["idle", "one token", "one expert", "ends"],
)


def arguments(num_tokens: int, top_k: int) -> list[Tensor]:
    """x [T, d], weights [T, k], gate_up [E, 2w, d], down [E, d, w]."""
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (num_tokens, HIDDEN),
        (num_tokens, top_k),
        (NUM_EXPERTS, 2 * WIDTH, HIDDEN),
        (NUM_EXPERTS, HIDDEN, WIDTH),
    ]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def grouped(ids: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    y: Tensor = GroupedSwiglu.apply(x, ids, weights, gate_up, down)
    return y


def plain(ids: Tensor, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for t, chosen in enumerate(ids.tolist()):
        parts = []
        for k, e in enumerate(chosen):
            hidden = gate_up[e] @ x[t]
            activated = F.silu(hidden[:WIDTH]) * hidden[WIDTH:]
            parts.append(weights[t, k] * (down[e] @ activated))
        rows.append(torch.stack(parts).sum(dim=0))
    return torch.stack(rows)


@CHOICES
def test_values_are_those_of_a_loop(ids: list[list[int]]) -> None:
    values = arguments(len(ids), len(ids[0]))
    chosen = torch.tensor(ids)
    torch.testing.assert_close(grouped(chosen, *values), plain(chosen, *values))


@CHOICES
def test_gradients_are_those_of_a_loop(ids: list[list[int]]) -> None:
    values = arguments(len(ids), len(ids[0]))
    chosen = torch.tensor(ids)
    upstream = torch.arange(1.0, 1 + HIDDEN, dtype=torch.float64).expand(len(ids), HIDDEN)
    ours = torch.autograd.grad(grouped(chosen, *values), values, upstream)
    theirs = torch.autograd.grad(plain(chosen, *values), values, upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@CHOICES
def test_gradients_are_those_of_small_differences(ids: list[list[int]]) -> None:
    values = arguments(len(ids), len(ids[0]))
    chosen = torch.tensor(ids)
    assert torch.autograd.gradcheck(lambda *v: grouped(chosen, *v), values)


def test_an_idle_expert_has_zero_gradients() -> None:
    values = arguments(2, 1)
    grouped(torch.tensor([[0], [4]]), *values).sum().backward()
    gate_up, down = values[2:]
    assert gate_up.grad is not None and down.grad is not None
    assert not gate_up.grad[1:4].any() and not down.grad[1:4].any()
