"""Names and shapes of the routed experts in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.checkpoint import Checkpoint
from experts.tensor_shapes import expert_tensor_shapes
from experts.weights import load_expert
from router.tensor_shapes import gate_tensor_shapes
from router.weights import load_gates
from tests.reference import read_weights


@pytest.mark.parametrize("preset", ["v2-lite", "v2", "v3", "kimi-k2", "v3fp8", "v3fp8-ragged"])
def test_every_expert_tensor_is_in_the_checkpoint(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir(preset))
    shapes = expert_tensor_shapes(checkpoint.config)
    checkpoint.require(shapes)
    config = checkpoint.config
    assert len(shapes) == 3 * len(config.moe_layers) * config.n_routed_experts


def test_shapes_are_out_by_in(checkpoint_dir: Callable[[str], Path]) -> None:
    shapes = expert_tensor_shapes(Checkpoint.open(checkpoint_dir("v2-lite")).config)
    assert shapes["model.layers.1.mlp.experts.0.gate_proj.weight"] == (64, 128)
    assert shapes["model.layers.3.mlp.experts.15.down_proj.weight"] == (128, 64)


@pytest.mark.parametrize("preset", ["v2-lite", "v3fp8", "v3fp8-ue8m0"])
def test_an_expert_has_the_values_of_the_file(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    folder = checkpoint_dir(preset)
    expert = load_expert(Checkpoint.open(folder), 1, 3)
    values = read_weights(folder)
    for name, weight in (("gate", expert.gate), ("up", expert.up), ("down", expert.down)):
        stored = values[f"model.layers.1.mlp.experts.3.{name}_proj.weight"]
        assert torch.equal(weight.dequantize(), stored.float())


def test_loading_copies_nothing(checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_dir("v2-lite"))
    first, second = load_expert(checkpoint, 1, 0), load_expert(checkpoint, 1, 0)
    assert first.gate.data.data_ptr() == second.gate.data.data_ptr()
    assert first.gate.data.dtype == torch.bfloat16


@pytest.mark.parametrize(("preset", "has_bias"), [("v2-lite", False), ("v2", False), ("v3", True)])
def test_gates_are_float32_with_the_bias_where_the_model_has_one(
    preset: str, has_bias: bool, checkpoint_dir: Callable[[str], Path]
) -> None:
    folder = checkpoint_dir(preset)
    checkpoint = Checkpoint.open(folder)
    gates, values = load_gates(checkpoint), read_weights(folder)
    assert tuple(gates) == checkpoint.config.moe_layers
    for layer, gate in gates.items():
        prefix = f"model.layers.{layer}.mlp.gate"
        assert gate.weight.data.dtype == torch.float32
        assert torch.equal(gate.weight.data, values[f"{prefix}.weight"].float())
        assert (gate.bias is not None) == has_bias
        if gate.bias is not None:
            assert torch.equal(gate.bias, values[f"{prefix}.e_score_correction_bias"].float())
    assert len(gate_tensor_shapes(checkpoint.config)) == len(gates) * (2 if has_bias else 1)
