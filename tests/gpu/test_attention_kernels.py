"""Norms and products of heads on a device, and the table of operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from attention import heads as cpu_heads
from attention import layers
from attention.kernels.gpu.heads import multiply_heads, multiply_heads_torch
from attention.kernels.gpu.ops import attention_ops
from attention.kernels.gpu.rows import (
    add_rms_norm,
    add_rms_norm_torch,
    rms_norm,
    rms_norm_torch,
)

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(
        torch, "empty", lambda *shape, **kinds: torch.full(shape, float("nan"), **kinds)
    )


def error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * weight / (x.square().mean(dim=1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize("function", [rms_norm, rms_norm_torch])
@pytest.mark.parametrize(("x_dtype", "out_dtype"), [(F32, F32), (F32, BF16), (BF16, BF16)])
@pytest.mark.parametrize("width", [3, 100])
def test_rms_norm(
    function: Callable[..., Tensor], x_dtype: torch.dtype, out_dtype: torch.dtype, width: int
) -> None:
    x, weight = torch.randn(5, width + 4).to(x_dtype)[:, 4:], torch.rand(width)
    out = function(x, weight, EPS, out_dtype)
    assert out.dtype == out_dtype and out.shape == x.shape
    assert error(out, normed(x, weight)) < (1e-6 if out_dtype == F32 else 1e-2)


@pytest.mark.parametrize("function", [add_rms_norm, add_rms_norm_torch])
@pytest.mark.parametrize("delta_dtype", [F32, BF16])
def test_add_rms_norm_keeps_the_sum(
    function: Callable[..., Tensor], delta_dtype: torch.dtype
) -> None:
    x, delta, weight = torch.randn(4, 50), torch.randn(4, 50).to(delta_dtype), torch.rand(50)
    total = x + delta
    out = function(x, delta, weight, EPS, F32)
    assert x.equal(total)
    assert error(out, normed(total, weight)) < 1e-6


def test_the_norms_are_the_cpu_functions() -> None:
    x, delta, weight = torch.randn(4, 50), torch.randn(4, 50), torch.rand(50)
    assert rms_norm_torch(x, weight, EPS, F32).equal(layers.rms_norm_torch(x, weight, EPS))
    one, other = x.clone(), x.clone()
    out = add_rms_norm_torch(one, delta, weight, EPS, F32)
    assert out.equal(layers.add_rms_norm_torch(other, delta, weight, EPS)) and one.equal(other)


def product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("tha,hba->thb", x[:, :, : weight.shape[2]].double(), weight.double())


@pytest.mark.parametrize("function", [multiply_heads, multiply_heads_torch])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "width", "length"), [(1, 20, 5), (17, 33, 40)])
def test_multiply_heads(
    function: Callable[..., Tensor], dtype: torch.dtype, rows: int, width: int, length: int
) -> None:
    """x is the front of longer heads, the matrices are parts of a larger one."""
    x = torch.randn(rows, 3, length + 6).to(dtype)
    whole = torch.randn(3, width + 8, length).to(dtype)
    for weight in (whole[:, 8:], whole[:, 8:].transpose(1, 2).contiguous().transpose(1, 2)):
        out = function(x, weight)
        assert out.dtype == dtype and out.shape == (rows, 3, width)
        assert error(out, product(x, weight)) < (1e-6 if dtype == F32 else 1e-2)


def test_the_product_is_the_cpu_function() -> None:
    x, weight = torch.randn(4, 3, 20), torch.randn(3, 9, 16)
    expected = cpu_heads.multiply_heads_torch(x, cpu_heads.HeadWeights(weight))
    assert multiply_heads_torch(x, weight).equal(expected)
    torch.testing.assert_close(expected, cpu_heads.multiply_heads(x, cpu_heads.HeadWeights(weight)))


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    x, weight = torch.randn(70, 2, 40).bfloat16(), torch.randn(2, 20, 40).bfloat16()
    norm = torch.rand(40)
    products, norms = multiply_heads(x, weight), rms_norm(x[:, 0], norm, EPS, BF16)
    for row in (0, 63, 69):
        assert multiply_heads(x[row : row + 1], weight).equal(products[row : row + 1])
        assert rms_norm(x[row : row + 1, 0], norm, EPS, BF16).equal(norms[row : row + 1])


def test_no_rows_is_no_work() -> None:
    weight = torch.randn(2, 5, 4)
    assert multiply_heads(torch.randn(0, 2, 4), weight).shape == (0, 2, 5)
    assert rms_norm(torch.randn(0, 4), torch.rand(4), EPS, BF16).shape == (0, 4)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(4, 2, 8), torch.randn(2, 5, 8)
    for other in (weight[:1], weight.bfloat16(), torch.randn(2, 5, 9)):
        with pytest.raises(ValueError):
            multiply_heads(x, other)
    with pytest.raises(ValueError):
        rms_norm(x[:, 0], torch.rand(7), EPS, F32)
    with pytest.raises(ValueError):
        add_rms_norm(x[:, 0].bfloat16(), x[:, 0], torch.rand(8), EPS, F32)


def test_every_kernel_has_its_twin() -> None:
    kernels, twins = attention_ops("triton"), attention_ops("torch")
    for field in fields(kernels):
        name = getattr(kernels, field.name).__name__
        assert name == field.name
        assert getattr(twins, field.name).__name__ == f"{name}_torch"
    with pytest.raises(ValueError, match="host"):
        attention_ops("host")
