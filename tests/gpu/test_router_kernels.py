"""The router's kernels that compute on rows, in Triton's interpreter: gate, pack, combine."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from router.gate import GateSpec
from router.gate import select_experts_torch as host_select
from router.kernels.gpu import gate as gpu_gate
from router.kernels.gpu.combine import combine_rows, combine_rows_torch
from router.kernels.gpu.gate import (
    gate_logits,
    gate_logits_torch,
    select_experts,
    select_experts_torch,
)
from router.kernels.gpu.pack import (
    pack_rows,
    pack_rows_fp8,
    pack_rows_fp8_torch,
    pack_rows_torch,
)
from tests.gpu.poison import poisoned  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("poisoned")

SELECT = [select_experts, select_experts_torch]
LOGITS = [0.2, 1, -0.5, 0.9, 2, -1, 0.3, 0.4]
BIAS = [0, -0.2, 0.3, 0, -0.4, 0, 0.1, 0.05]
SMALL_LITE = GateSpec(8, 3)
SMALL_V2 = GateSpec(8, 3, "softmax", "max", 4, 2, routed_scaling_factor=16.0)
SMALL_V3 = GateSpec(8, 3, "sigmoid", "top2_sum", 4, 2, True, 2.5)
V2_LITE = GateSpec(64, 6)
V2 = GateSpec(160, 6, "softmax", "max", 8, 3, routed_scaling_factor=16.0)
V3 = GateSpec(256, 8, "sigmoid", "top2_sum", 8, 4, True, 2.5)
KIMI = GateSpec(384, 8, "sigmoid", "top2_sum", 1, 1, True, 2.827)
ODD = GateSpec(21, 5, "sigmoid", "top2_sum", 3, 2, True)
SINGLES = GateSpec(6, 2, "sigmoid", "top2_sum", 6, 3)  # groups of one: their sum of two is that one
ALL = GateSpec(5, 5, "softmax", norm_topk_prob=True)


def random_logits(num_rows: int, spec: GateSpec, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [T, E], and a bias [E] with which most sigmoids are negative choices."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, spec.num_experts, generator=generator)
    return logits, torch.randn(spec.num_experts, generator=generator) - 1.0


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize(
    ("spec", "bias", "expected"),
    [
        (SMALL_LITE, None, {4: 0.419727, 1: 0.154409, 3: 0.139715}),
        (SMALL_V2, None, {4: 6.715631, 1: 2.470543, 0: 1.110086}),
        (SMALL_V3, BIAS, {3: 1.068819, 2: 0.567583, 6: 0.863599}),
    ],
)
def test_published_vectors(select, spec: GateSpec, bias, expected: dict[int, float]) -> None:
    bias_tensor = None if bias is None else torch.tensor(bias, dtype=torch.float32)
    ids, weights, bad_row = select(torch.tensor([LOGITS]), bias_tensor, spec)
    assert ids[0].tolist() == sorted(expected)
    chosen = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert chosen == pytest.approx(expected, abs=1e-6)
    assert ids.dtype == bad_row.dtype == torch.int32 and bad_row.tolist() == [1]


@pytest.mark.parametrize("select", SELECT)
def test_ties_go_to_the_lowest(select) -> None:
    """Equal logits; a tie at the last place; equal groups; lost groups stay lost below zero."""
    zeros = torch.zeros(1, 8)
    last = torch.tensor([[0.0, 3.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    groups = torch.tensor([[0.0, 0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]])
    negative = torch.tensor([-3.0, -3, -1, -1, -1, -2, -4, -4])
    for spec in (SMALL_LITE, SMALL_V2, SMALL_V3):
        assert select(zeros, None, spec)[0].tolist() == [[0, 1, 2]]
    assert select(last, None, SMALL_LITE)[0].tolist() == [[1, 2, 4]]
    assert select(groups, None, SMALL_V3)[0].tolist() == [[2, 3, 4]]
    assert select(zeros, negative, SMALL_V3)[0].tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("spec", [V2_LITE, V2, V3, KIMI, ODD, SINGLES, ALL])
def test_chosen_as_on_the_host(spec: GateSpec) -> None:
    logits, bias = random_logits(3, spec)
    logits[2] = (logits[2] * 2).round() / 2  # many ties
    used = bias if spec.scoring == "sigmoid" else None
    ids, weights, bad_row = select_experts(logits, used, spec)
    expected_ids, expected_weights = host_select(logits, used, spec)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-7)
    assert bad_row.tolist() == [3]
    size = spec.num_experts // spec.n_group
    for row in ids.tolist():
        assert len(set(row)) == spec.top_k
        assert len({e // size for e in row}) <= spec.topk_group


@pytest.mark.parametrize("select", SELECT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named_and_harms_no_other(select, value: float) -> None:
    logits, bias = random_logits(4, SMALL_V3)
    expected = select(logits, bias, SMALL_V3)
    logits[1, 5] = logits[3, 0] = value
    ids, weights, bad_row = select(logits, bias, SMALL_V3)
    assert bad_row.tolist() == [1]
    for t in (0, 2):
        assert torch.equal(ids[t], expected[0][t]) and torch.equal(weights[t], expected[1][t])
    assert ((ids >= 0) & (ids < 8)).all() and weights.isfinite().all()


def test_weights_of_tiny_scores_and_an_infinite_bias_stay_usable() -> None:
    """All sigmoids underflow to 0: the 1e-20 keeps 0/0 away. A bias of -inf chooses last."""
    with np.errstate(over="ignore"):
        _, weights, _ = select_experts(torch.full((1, 8), -200.0), None, SMALL_V3)
    assert weights.tolist() == [[0.0, 0.0, 0.0]]
    bias = torch.tensor([-math.inf] * 6 + [0.0, 0.0])
    assert select_experts(torch.zeros(1, 8), bias, GateSpec(8, 4))[0].tolist() == [[0, 1, 6, 7]]


@pytest.mark.parametrize("select", SELECT)
def test_no_rows_to_choose_for(select) -> None:
    ids, weights, bad_row = select(torch.zeros(0, 8), None, SMALL_V2)
    assert ids.shape == weights.shape == (0, 3) and bad_row.tolist() == [0]


@pytest.mark.parametrize("dtypes", ["bf16 bf16", "float32 float32", "float32 bf16", "bf16 float32"])
def test_logits_are_exact_products_summed_in_float32(dtypes: str) -> None:
    x_dtype, weight_dtype = ({"bf16": torch.bfloat16}.get(d, torch.float32) for d in dtypes.split())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 600, generator=generator).to(x_dtype)[:, :550]  # rows that lie apart
    weight = torch.randn(70, 550, generator=generator).to(weight_dtype)
    expected = x.double() @ weight.double().T
    for logits in (gate_logits(x, weight), gate_logits_torch(x, weight)):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize(("dtype", "num_rows"), [(torch.bfloat16, 66), (torch.float32, 18)])
def test_a_row_of_logits_does_not_depend_on_its_batch(
    dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the other rows nor on how the splits of the sum are spread over programs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, 600, generator=generator).to(dtype)
    weight = torch.randn(9, 600, generator=generator).to(dtype)
    logits = gate_logits(x, weight)
    assert torch.equal(gate_logits(x[-1:], weight)[0], logits[-1])
    monkeypatch.setattr(gpu_gate, "PARALLEL_ROWS", 0)
    assert torch.equal(gate_logits(x, weight), logits)


@pytest.mark.parametrize("width", [7, 1024, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_rows_are_copies_and_padding_is_zero(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, width + 3).to(dtype)[:, :width]
    index = torch.tensor([4, -1, 0, 0, 3], dtype=torch.int32)
    packed = pack_rows(x, index)
    assert torch.equal(packed, torch.stack([x[4], torch.zeros_like(x[0]), x[0], x[0], x[3]]))
    assert torch.equal(packed, pack_rows_torch(x, index))


@pytest.mark.parametrize("width", [7, 1100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_packed_codes_are_those_of_quantised_rows(
    width: int, dtype: torch.dtype, ue8m0: bool
) -> None:
    x = (torch.randn(3, width) * torch.logspace(-6, 4, width)).to(dtype)
    index = torch.tensor([2, -1, 0, 2], dtype=torch.int32)
    q, scales = pack_rows_fp8(x, index, ue8m0=ue8m0)
    expected, expected_scales = pack_rows_fp8_torch(x, index, ue8m0=ue8m0)
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(scales, expected_scales) and scales.shape == (4, -(-width // 128))
    assert not q[1].float().any()


def test_packed_row_of_known_codes() -> None:
    x = torch.zeros(1, 256)
    x[0, :4] = torch.tensor([0.1, -1.0, 3.3, 250.0])
    q, scales = pack_rows_fp8(x, torch.tensor([0], dtype=torch.int32))
    assert q.view(torch.uint8)[0, :5].tolist() == [35, 190, 76, 126, 0]
    assert scales[0].tolist() == pytest.approx([250 / 448, 1e-4 / 448])


@pytest.mark.parametrize("combine", [combine_rows, combine_rows_torch])
def test_answers_are_added_in_the_order_of_the_workers(combine) -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order, 1 in another; a row without answers is 0."""
    rows = torch.tensor([[1e8], [1.0], [-1e8], [5.0]]).expand(4, 9).contiguous()
    index = torch.tensor([[0, 1, 2], [0, 2, 1], [-1, -1, -1], [-1, 3, -1]], dtype=torch.int32)
    assert combine(rows, index)[:, 8].tolist() == [0.0, 1.0, 0.0, 5.0]


@pytest.mark.parametrize("width", [33, 1025])
def test_combined_rows_have_the_bits_of_the_twin(width: int) -> None:
    rows = torch.randn(6, width).bfloat16()
    index = torch.tensor([[0, 5], [1, -1], [3, 4], [-1, -1], [2, 2]], dtype=torch.int32)
    total = combine_rows(rows, index)
    assert total.dtype == torch.float32 and torch.equal(total, combine_rows_torch(rows, index))
    rounded = combine_rows(rows, index, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    # The interpreter cuts bits off where a GPU rounds.
    torch.testing.assert_close(rounded.float(), total, rtol=2**-7, atol=0)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    index = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="do not fit"):
        gate_logits(torch.zeros(2, 8), torch.zeros(4, 9))
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        gate_logits(torch.zeros(2, 8).half(), torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"logits \[T, 8\]"):
        select_experts(torch.zeros(2, 9), None, SMALL_V3)
    with pytest.raises(ValueError, match="float32"):
        select_experts(torch.zeros(2, 8), torch.zeros(8).bfloat16(), SMALL_V3)
    with pytest.raises(ValueError, match="row_index"):
        pack_rows(torch.zeros(2, 8), index.long())
    with pytest.raises(ValueError, match="index int32"):
        combine_rows(torch.zeros(2, 8), index.view(2, 1).long())
