"""The exported folder: what others read from it is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cluster.model_store import check_model
from cluster.tiny_weights import is_quantised, tensor_shapes
from default_model.export import published_tensors
from default_model.model import DeepseekV3
from default_model.restore import restore
from default_model.settings import CONFIG, model_config
from tests.huggingface import load_model
from tests.reference import Reference

MAX_LOGIT_ERROR = 2e-4
Exported = tuple[DeepseekV3, Path]


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(17, 512, (1, 150), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def trained_logits(exported: Exported, ids: Tensor) -> Tensor:
    """[150, vocab] of the training model holding the weights of the file."""
    model = restore(exported[1])
    with torch.no_grad():
        return model.logits(model(ids))[0]


def test_transformers_computes_the_same_logits(
    exported: Exported, ids: Tensor, trained_logits: Tensor
) -> None:
    with torch.no_grad():
        logits = load_model(exported[1])(ids).logits[0]
    assert (logits - trained_logits).abs().max() <= MAX_LOGIT_ERROR


def test_the_reference_computes_the_same_logits(
    exported: Exported, ids: Tensor, trained_logits: Tensor
) -> None:
    logits = Reference(exported[1]).forward(ids[0].tolist())
    assert (logits - trained_logits).abs().max() <= MAX_LOGIT_ERROR


def test_shoal_finds_nothing_wrong(exported: Exported) -> None:
    assert check_model(exported[1]).eos_token_ids == (1,)


def test_the_file_holds_the_published_tensors_and_their_scales(exported: Exported) -> None:
    shapes = tensor_shapes(config_of(exported[1]))
    scales = {
        f"{name}_scale_inv": tuple(-(-size // 128) for size in shape)
        for name, shape in shapes.items()
        if is_quantised(name)
    }
    with safe_open(exported[1] / "model.safetensors", framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert stored == shapes | scales


def test_the_model_that_ships_has_the_published_tensors() -> None:
    state = DeepseekV3(model_config()).state_dict()
    tensors = published_tensors(state, CONFIG["num_hidden_layers"])
    assert {name: tuple(tensor.shape) for name, tensor in tensors} == tensor_shapes(CONFIG)


def test_the_file_holds_what_was_trained_up_to_fp8(exported: Exported) -> None:
    """e4m3 keeps three bits after the first: half a step is 1/16 of a value, 1/17 seen from it."""
    trained, read = exported[0].state_dict(), restore(exported[1]).state_dict()
    assert trained.keys() == read.keys()
    for name, weight in trained.items():
        smallest = weight.abs().max() * 2**-14
        assert ((weight - read[name]).abs() <= weight.abs() / 16 + smallest).all(), name


def test_the_row_blocks_of_a_partial_matrix_share_one_scale(exported: Exported) -> None:
    """160 rows: transformers takes its two blocks to be of 80 rows, where they are 128 and 32."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"
    with safe_open(exported[1] / "model.safetensors", framework="pt") as file:
        scales = file.get_tensor(name)
    assert scales.shape == (2, 1) and scales[0] == scales[1]
