"""Compiled row and head kernels against their plain-torch twins, on odd shapes too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from attention.heads import HeadWeights, multiply_heads, multiply_heads_torch
from attention.layers import (
    add_rms_norm,
    add_rms_norm_torch,
    rms_norm,
    rms_norm_torch,
    rotate_query_and_cache_latent,
    rotate_query_and_cache_latent_torch,
)
from experts.kernels.runtime import Kernels, override
from tests.attention.harness import Rig, Sequences
from tests.reference import Reference, prompts


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def plain_torch() -> Iterator[None]:
    with override(Kernels("plain torch: a test")):
        yield


@pytest.mark.parametrize("width", [1, 7, 64, 96, 200])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_rms_norm(rows: int, width: int) -> None:
    x, weight, delta = torch.randn(rows, width), torch.randn(width), torch.randn(rows, width)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_torch(x, weight, 1e-5))
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(
        add_rms_norm(ours, delta, weight, 1e-6), add_rms_norm_torch(theirs, delta, weight, 1e-6)
    )
    assert ours.equal(theirs)


def test_rms_norm_by_hand() -> None:
    assert rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.0).tolist()[0] == (
        pytest.approx([3 / 12.5**0.5, 8 / 12.5**0.5])
    )


@pytest.mark.parametrize(("heads", "nope", "rope", "latent"), [(1, 1, 2, 1), (3, 5, 6, 33)])
def test_rotation_and_cache_write(heads: int, nope: int, rope: int, latent: int) -> None:
    rows = 4
    arguments = {
        "q": torch.randn(rows, heads, nope + rope),
        "kv_a": torch.randn(rows, latent + rope),
        "kv_a_norm": torch.randn(latent),
        "rope": torch.randn(9, rope),
        "positions": torch.tensor([8, 0, 3, 3], dtype=torch.int32),
        "slots": torch.tensor([5, 1, 0, 11]),
        "cache": torch.zeros(12, latent + rope),
    }
    twin = {name: value.clone() for name, value in arguments.items()}
    rotate_query_and_cache_latent(**arguments)
    rotate_query_and_cache_latent_torch(**twin)
    torch.testing.assert_close(arguments["q"], twin["q"])
    torch.testing.assert_close(arguments["cache"], twin["cache"])
    assert arguments["cache"][2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "heads", "width", "length"), [(1, 1, 1, 1), (2, 3, 33, 20), (13, 4, 96, 64)]
)
def test_products_of_heads(
    rows: int, heads: int, width: int, length: int, dtype: torch.dtype
) -> None:
    """Of a view of a larger matrix and of rows with something behind them, as in the model."""
    weights = HeadWeights(torch.randn(heads, width + 5, length).to(dtype)[:, 2 : 2 + width])
    x = torch.randn(rows, heads, length + 7)
    torch.testing.assert_close(
        multiply_heads(x, weights), multiply_heads_torch(x, weights), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "data", [torch.zeros(2, 3, 4, dtype=torch.float16), torch.zeros(2, 4, 3).transpose(1, 2)]
)
def test_head_weights_of_another_kind_are_refused(data: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="float32 or bfloat16|row-major"):
        HeadWeights(data)


def test_the_model_runs_on_plain_torch_too(plain_torch: None, rig: Callable[[str], Rig]) -> None:
    sequences = Sequences(rig("v3").model(), prompts()[:3])
    for found, ids in zip(sequences.run(30, naive=False), prompts(), strict=False):
        assert (found - Reference(rig("v3").folder).forward(ids)).abs().max() <= 2e-4
