"""Muon's steps, and what the optimizers leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from default_model.model import DeepseekV3
from default_model.optimizer import Muon, Optimizers, orthogonal
from default_model.settings import Recipe, model_config

RECIPE = Recipe(matrix_lr=0.1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "shape", [(1, 64, 256), (1, 256, 64), (1, 128, 256), (8, 128, 256), (8, 512, 256)]
)
def test_orthogonal_of_twice_as_wide_or_tall_matrices(shape: tuple[int, int, int]) -> None:
    """Measured with 4 iterations: 0.68 to 1.14."""
    singular = torch.linalg.svdvals(orthogonal(random(*shape)))
    assert singular.min() > 0.6 and singular.max() < 1.3


def test_orthogonal_of_square_matrices_leaves_the_weakest_directions_small() -> None:
    """Measured: 4 iterations lift a singular value at most 141 times, and some begin near 0."""
    singular = torch.linalg.svdvals(orthogonal(random(4, 256, 256)))
    assert singular.max() < 1.3
    assert 0.8 < (singular > 0.6).float().mean() < 1


def test_orthogonal_keeps_the_directions() -> None:
    """Of an orthogonal matrix times 5 it is a multiple of that matrix."""
    basis = torch.linalg.qr(random(16, 16)).Q
    result = orthogonal(5 * basis[None])[0]
    factor = (result * basis).sum() / 16
    assert 0.6 < factor < 1.3
    torch.testing.assert_close(result, factor * basis, atol=1e-5, rtol=0)


def stepped(weights: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Parameters after one Muon step for each set of gradients."""
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in weights.items()}
    muon = Muon(list(parameters.items()), RECIPE)
    for step in grads:
        for name, parameter in parameters.items():
            parameter.grad = step[name].clone()
        muon.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def taken_apart(name: str, stacked: Tensor) -> dict[str, Tensor]:
    """The matrices of each expert under names of their own."""
    halves = 2 if name.endswith("gate_up") else 1
    matrices = stacked.view(-1, stacked.shape[1] // halves, stacked.shape[2])
    return {f"{number}.weight": matrix for number, matrix in enumerate(matrices)}


@pytest.mark.parametrize(
    ("name", "shape"), [("experts_gate_up", (3, 16, 24)), ("experts_down", (3, 24, 8))]
)
def test_muon_on_stacked_experts_is_muon_on_each_matrix(
    name: str, shape: tuple[int, int, int]
) -> None:
    weight, grads = random(*shape), [random(*shape, seed=1), random(*shape, seed=2)]
    together = stepped({name: weight}, [{name: grad} for grad in grads])[name]
    alone = stepped(taken_apart(name, weight), [taken_apart(name, grad) for grad in grads])
    for number, matrix in taken_apart(name, together).items():
        torch.testing.assert_close(matrix, alone[number], atol=1e-6, rtol=1e-5)


def test_an_idle_expert_only_decays() -> None:
    """Gradient 0: weight * (1 - 0.1 * 0.01)."""
    weight, grad = random(2, 8, 8), random(2, 8, 8)
    grad[1] = 0
    after = stepped({"experts_down": weight}, [{"experts_down": grad}])["experts_down"]
    torch.testing.assert_close(after[1], weight[1] * 0.999)


def test_a_tall_matrix_takes_longer_steps() -> None:
    """By sqrt(rows / columns) = 2: its update has the columns' length, not the rows'."""
    grad = torch.linalg.qr(random(32, 8)).Q
    zeros = torch.zeros(32, 8)
    tall = stepped({"a": zeros}, [{"a": grad}])["a"]
    wide = stepped({"a": zeros.T}, [{"a": grad.T}])["a"]
    torch.testing.assert_close(tall, 2 * wide.T)


@pytest.mark.usefixtures("tiny")
def test_weights_without_a_gradient_do_not_move() -> None:
    torch.manual_seed(0)
    model = DeepseekV3(model_config())
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.logits(model(torch.arange(32)[None])).square().mean().backward()
    Optimizers(model, RECIPE).step(lr_scale=1.0)
    moved = {name for name, weight in model.named_parameters() if not weight.equal(before[name])}
    assert moved == {name for name in before if not name.startswith("next_token")}
