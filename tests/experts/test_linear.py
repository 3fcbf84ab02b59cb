"""Products with weights as files hold them: right, and the same bits in every company."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.kernels import runtime
from experts.linear import Weight, linear, linear_torch
from tests.experts.weight_builders import KINDS, TORCH, num_threads, random_weight

SHAPES = [(1, 1), (9, 37), (64, 512), (130, 300), (67, 1100), (260, 128), (4, 2048)]
"""(out, in): ragged against tiles of 4, lanes of 16, scale blocks of 128 and parts of 512."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_kernels_are_compiled_here() -> None:
    assert runtime.kernels().compiled, runtime.kernels().reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 6, 7, 13, 150])
def test_kernel_agrees_with_a_float64_product(
    kind: str, shape: tuple[int, int], num_rows: int
) -> None:
    w, x = random_weight(kind, *shape), torch.randn(num_rows, shape[1])
    exact = x.double() @ w.dequantize().double().t()
    tolerance = 1e-6 * float(w.dequantize().abs().max()) * shape[1] ** 0.5 * 4
    torch.testing.assert_close(linear(x, w).double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_twin_agrees_with_the_kernel(kind: str, deterministic: bool) -> None:
    w, x = random_weight(kind, 130, 300), torch.randn(5, 300)
    twin = linear_torch(x, w, deterministic=deterministic)
    torch.testing.assert_close(twin, linear(x, w), rtol=1e-5, atol=1e-4)


def test_torch_computes_when_the_kernels_are_not_there() -> None:
    w, x = random_weight("bfloat16", 20, 30), torch.randn(3, 30)
    with runtime.override(TORCH):
        assert torch.equal(linear(x, w), linear_torch(x, w))


@pytest.mark.parametrize("num_rows", [1, 40])
def test_every_finite_code_of_e4m3_is_decoded_exactly(num_rows: int) -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    data = codes.view(torch.float8_e4m3fn)[:, None].expand(254, 254).contiguous()
    scale = torch.tensor([[1.5, 2.0**-12], [255.0, 2.0**-20]])
    w = Weight(data, scale)
    picked = torch.arange(num_rows) * 6
    x = torch.nn.functional.one_hot(picked, 254).float()
    assert torch.equal(linear(x, w), w.dequantize()[:, picked].t())


@settings(max_examples=25, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits_in_every_batch(kind: str, data: st.DataObject) -> None:
    out, length = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 1200))
    num_rows = data.draw(st.integers(1, 60))
    order = data.draw(st.permutations(range(num_rows)))
    part = order[: data.draw(st.integers(1, num_rows))]
    w, x = random_weight(kind, out, length), torch.randn(num_rows, length)
    assert torch.equal(linear(x[part], w, deterministic=True), linear(x, w)[part])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [2, 3])
def test_rows_have_the_same_bits_with_any_number_of_threads(kind: str, threads: int) -> None:
    w = random_weight(kind, 700, 600)
    batches = [torch.randn(rows, 600) for rows in (1, 5, 30)]
    with num_threads(1):
        alone = [linear(x, w) for x in batches]
    with num_threads(threads):
        shared = [linear(x, w) for x in batches]
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_twin_has_the_same_bits_in_every_batch_when_asked(kind: str) -> None:
    w, x = random_weight(kind, 130, 300), torch.randn(17, 300)
    alone = torch.cat([linear_torch(row[None], w, deterministic=True) for row in x])
    assert torch.equal(linear_torch(x, w, deterministic=True), alone)


def test_rows_of_x_may_lie_apart() -> None:
    w, wide = random_weight("bfloat16", 12, 40), torch.randn(8, 100)
    for view in (wide[:, 30:70], wide[::2, 5:45], wide.t()[:40, :].t(), wide[:, :80:2]):
        assert torch.equal(linear(view, w), linear(view.contiguous(), w))


def test_python_threads_may_multiply_at_the_same_time() -> None:
    w, batches = random_weight("bfloat16", 300, 500), [torch.randn(20, 500) for _ in range(4)]
    expected = [linear(x, w) for x in batches]
    equal = [0] * len(batches)

    def multiply(i: int) -> None:
        equal[i] = sum(torch.equal(linear(batches[i], w), expected[i]) for _ in range(50))

    with num_threads(2):
        callers = [threading.Thread(target=multiply, args=(i,)) for i in range(len(batches))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert equal == [50] * len(batches)


def test_scale_beyond_the_kernels_range_is_for_torch() -> None:
    w = random_weight("fp8", 10, 20)
    assert w.scale_inv is not None
    large = Weight(w.data, w.scale_inv * 0 + 1000)
    x = torch.randn(2, 20)
    assert large.operand is None
    assert torch.equal(linear(x, large), linear_torch(x, large))


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 31), torch.zeros(30), torch.zeros(2, 30).bfloat16(), torch.zeros(2, 1, 30)]
)
def test_x_that_does_not_fit_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        linear(x, random_weight("float32", 4, 30))


@pytest.mark.parametrize(
    ("data", "scale", "complaint"),
    [
        (torch.zeros(2, 3, dtype=torch.float16), None, "dtype"),
        (torch.zeros(6), None, "matrix"),
        (torch.zeros(3, 2).t(), None, "matrix"),
        (torch.zeros(2, 3), torch.ones(1, 1), "scale_inv belongs"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), None, "scale_inv belongs"),
        (torch.zeros(129, 3).to(torch.float8_e4m3fn), torch.ones(1, 1), r"\(2, 1\)"),
        (torch.zeros(2, 3).to(torch.float8_e4m3fn), torch.ones(1, 1).double(), "float32"),
        (torch.zeros(200, 200).to(torch.float8_e4m3fn), torch.ones(2, 2).t(), "row-major"),
    ],
)
def test_weight_that_is_not_one_is_refused(
    data: torch.Tensor, scale: torch.Tensor | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Weight(data, scale)


def test_dequantised_rows_take_the_scales_of_their_blocks() -> None:
    w = Weight(torch.ones(130, 129).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    rows = w.dequantize_rows(127, 130)
    assert rows[:, [0, 128]].tolist() == [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    assert w.num_bytes == 130 * 129 + 16
