"""Kernels of the expert tier that move, sort and convert: in Triton's interpreter, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attention.kernels.gpu.cache_layout import CacheLayout, encode_rows
from experts.kernels.gpu.combine import sum_pairs, sum_pairs_torch, sum_parts
from experts.kernels.gpu.permute import max_blocks, sort_pairs, sort_pairs_torch
from experts.kernels.gpu.quantise import (
    dequantise_blocks,
    dequantise_rows,
    quantise_rows,
    quantise_rows_torch,
)

QUANTISE = [quantise_rows, quantise_rows_torch]
SORT = [sort_pairs, sort_pairs_torch]


def codes(q: Tensor) -> list[list[int]]:
    return q.view(torch.uint8).tolist()


@pytest.mark.parametrize("quantise", QUANTISE)
def test_quantised_row_of_known_codes(quantise) -> None:
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([0.1, -1.0, 3.3, 250.0])
    q, scales = quantise(row)
    assert codes(q)[0][:5] == [35, 190, 76, 126, 0]
    assert scales.item() == pytest.approx(250 / 448)
    back = dequantise_rows(q, scales)[0, :4].tolist()
    assert back == pytest.approx([0.0959124, -0.9765625, 3.3482144, 250.0])
    assert quantise(row, ue8m0=True)[1].item() == 1.0


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_codes_are_those_of_torch(dtype: torch.dtype, ue8m0: bool) -> None:
    x = torch.randn(3, 1300, generator=torch.Generator().manual_seed(1))
    x = (x * torch.logspace(-7, 4, 1300)).to(dtype)  # subnormal codes too
    x[1] = 0.0
    rows = torch.empty(3, 1400, dtype=dtype)[:, :1300].copy_(x)  # rows that lie apart
    q, scales = quantise_rows(rows, ue8m0=ue8m0)
    expected, expected_scales = quantise_rows_torch(x, ue8m0=ue8m0)
    assert codes(q) == codes(expected)
    assert torch.equal(scales, expected_scales) and scales.shape == (3, 11)
    assert torch.equal(scales[1], torch.full((11,), 2.0**-22 if ue8m0 else 1e-4 / 448))


class Divisors(TorchDispatchMode):
    """What torch divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_):
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


def test_twins_divide_on_a_gpu_as_the_kernels_do() -> None:
    """By a number, torch on CUDA multiplies with its inverse: half of the scales would differ in
    their last bit. So what is divided by has to be a tensor of the device."""
    layout = CacheLayout(512, 64, torch.float8_e4m3fn)
    with Divisors() as divisors:
        quantise_rows_torch(torch.ones(2, 256, device="meta"))
        encode_rows(torch.ones(2, 576, device="meta"), layout)
    assert len(divisors.seen) == 4
    assert all(isinstance(by, Tensor) and by.device.type == "meta" for by in divisors.seen)


def test_every_code_survives_and_ties_round_to_even() -> None:
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    every = torch.where(every.isnan(), 0.0, every)
    between = every[:127] + (every[1:128] - every[:127]) / 2  # halfway to the next code
    x = torch.cat([every, between, -between, torch.full((2,), 448.0)])[:512].view(4, 128)
    x[:, 0] = 448.0  # so that the scale is 1
    assert codes(quantise_rows(x)[0]) == codes(x.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("quantise", QUANTISE)
def test_a_row_that_is_not_finite_shows_it(quantise) -> None:
    x = torch.ones(2, 128)
    x[1, 5] = float("nan")
    back = dequantise_rows(*quantise(x))
    assert back[0].isfinite().all() and back[1, 5].isnan()


def test_blocks_of_a_weight_have_their_scales_to_the_ragged_edge() -> None:
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    values = dequantise_blocks(weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert values[127, [127, 128]].tolist() == [1.0, 2.0]
    assert values[129, [0, 199]].tolist() == [3.0, 4.0]


def test_sorted_pairs_by_hand() -> None:
    ids = torch.tensor([2, 0, 2, 9, 2, -1, 0], dtype=torch.int32)  # 9 and -1 are dropped
    pairs = sort_pairs(ids, 3, 2)
    assert pairs.order.tolist()[:8] == [1, 6, 0, 2, 4, 7, 3, 5]  # 7: padding
    assert pairs.block_experts.tolist() == [0, 2, 2, 3, -1]
    assert pairs.order.tolist()[8:] == [7, 7]


@pytest.mark.parametrize(
    ("num_pairs", "num_experts", "block_rows", "limit"),
    [(1, 1, 16, None), (700, 9, 64, None), (700, 9, 16, 650), (50, 384, 16, 0), (40, 1, 128, None)],
)
def test_sort_is_the_stable_one(
    num_pairs: int, num_experts: int, block_rows: int, limit: int | None
) -> None:
    generator = torch.Generator().manual_seed(num_pairs)
    ids = torch.randint(-1, num_experts + 1, (num_pairs,), generator=generator).int()
    device_limit = None if limit is None else torch.tensor([limit], dtype=torch.int32)
    found = sort_pairs(ids, num_experts, block_rows, device_limit)
    expected = sort_pairs_torch(ids, num_experts, block_rows, device_limit)
    assert torch.equal(found.order, expected.order)
    assert torch.equal(found.block_experts, expected.block_experts)
    assert found.num_blocks == max_blocks(num_pairs, num_experts, block_rows)
    assert found.order[found.order < num_pairs].sort().values.tolist() == list(range(num_pairs))


@pytest.mark.parametrize("sort", SORT)
def test_no_pairs_no_blocks(sort) -> None:
    pairs = sort(torch.empty(0, dtype=torch.int32), 4, 16)
    assert pairs.num_blocks == 0 and pairs.order.numel() == 0


def test_blocks_suffice_for_the_worst_spread() -> None:
    # One pair each for 3 experts and the dropped ones, the other 13 with expert 0: 4 + 1 blocks.
    ids = torch.tensor([0] * 13 + [1, 2, 7], dtype=torch.int32)
    pairs = sort_pairs(ids, 3, 4)
    assert pairs.num_blocks == max_blocks(16, 3, 4) == 7
    assert pairs.block_experts.tolist() == [0, 0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize("add_up", [sum_pairs, sum_pairs_torch])
def test_pairs_of_a_row_are_added_in_their_order(add_up) -> None:
    rows = torch.tensor([1e8, 1.0, -1e8, 1e8, -1e8, 1.0, 5.0])[:, None] * torch.ones(7, 1100)
    starts = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)
    out = add_up(rows, starts)
    # (1e8 + 1) - 1e8 is 0 in float32, (1e8 - 1e8) + 1 is 1; row 1 has no pairs.
    assert out[:, 0].tolist() == [0.0, 0.0, 1.0, 5.0] and torch.equal(out[:, 0], out[:, 1099])
    assert add_up(rows, starts, torch.bfloat16).dtype == torch.bfloat16


def test_parts_are_added_in_their_order() -> None:
    parts = torch.tensor([[1e8, 1.0, -1e8], [1e8, -1e8, 1.0]])[:, :, None] * torch.ones(2, 3, 70)
    assert sum_parts(parts, torch.float32)[:, 69].tolist() == [0.0, 1.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="x must be rows"):
        quantise_rows(torch.ones(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match="expert_ids must be"):
        sort_pairs(torch.zeros(3, dtype=torch.int64), 2, 16)
    with pytest.raises(ValueError, match="num_pairs must be one int32"):
        sort_pairs(torch.zeros(3, dtype=torch.int32), 2, 16, torch.tensor([3]))
    with pytest.raises(ValueError, match="pair_rows must be"):
        sum_pairs(torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(ValueError, match="row_starts must be"):
        sum_pairs(torch.ones(2, 3), torch.zeros(2))
