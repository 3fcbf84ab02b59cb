"""Experts by slot: the sum a token gets, whatever the kernel, the batch and the placement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels import runtime
from experts.layer import (
    ExpertWeights,
    SlotWeights,
    grouped_swiglu,
    grouped_swiglu_torch,
    swiglu,
    swiglu_torch,
)
from experts.linear import Weight, linear
from tests.experts.weight_builders import KINDS, TORCH, num_threads, random_expert, random_slots

HIDDEN, WIDTH = 144, 40


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def every_token_to_every_slot(num_tokens: int, slot_ids: list[int]) -> tuple[Tensor, Tensor]:
    rows = torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(len(slot_ids))
    return rows, torch.tensor(slot_ids, dtype=torch.int32).repeat(num_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 6, 7, 50])
def test_swiglu_is_down_of_gated_up(kind: str, num_tokens: int) -> None:
    expert, x = random_expert(kind, HIDDEN, WIDTH), torch.randn(num_tokens, HIDDEN)
    expected = linear(silu(linear(x, expert.gate)) * linear(x, expert.up), expert.down)
    torch.testing.assert_close(swiglu(x, expert), expected, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(swiglu_torch(x, expert), expected, rtol=1e-5, atol=1e-2)


def test_gate_is_right_over_the_whole_range_of_floats() -> None:
    g = torch.cat([torch.linspace(-120, 120, 2001), torch.tensor([float("nan"), 1e15, -1e30])])
    identity = Weight(torch.eye(1))
    expert = ExpertWeights(identity, identity, identity)
    exact = g.double() * torch.sigmoid(g.double()) * g.double()
    torch.testing.assert_close(
        swiglu(g[:, None], expert)[:, 0].double(), exact, rtol=5e-7, atol=1e-30, equal_nan=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_tokens", "num_pairs"), [(1, 1), (1, 4), (5, 9), (40, 200), (3, 0)])
def test_kernel_agrees_with_its_torch_twin(kind: str, num_tokens: int, num_pairs: int) -> None:
    slots, x = random_slots(kind, HIDDEN, WIDTH, 5), torch.randn(num_tokens, HIDDEN)
    rows = torch.randint(num_tokens, (num_pairs,), dtype=torch.int32)
    slot_ids = torch.randint(5, (num_pairs,), dtype=torch.int32)
    weights = torch.rand(num_pairs)
    for per_pair in (False, True):
        ours = grouped_swiglu(x, slots, rows, slot_ids, weights, per_pair=per_pair)
        twin = grouped_swiglu_torch(x, slots, rows, slot_ids, weights, per_pair=per_pair)
        torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("chosen", [None, TORCH])
def test_row_is_the_sum_of_its_pairs_in_their_order(chosen: runtime.Kernels | None) -> None:
    slots, x = random_slots("bfloat16", HIDDEN, WIDTH, 6), torch.randn(9, HIDDEN)
    rows, slot_ids = every_token_to_every_slot(9, [4, 0, 5])
    weights = torch.rand(27)
    with runtime.override(chosen or runtime.kernels()):
        pairs = grouped_swiglu(x, slots, rows, slot_ids, weights, per_pair=True)
        summed = grouped_swiglu(x, slots, rows, slot_ids, weights)
    by_token = pairs.view(9, 3, HIDDEN)
    assert torch.equal(summed, by_token[:, 0] + by_token[:, 1] + by_token[:, 2])


def test_token_without_pairs_gets_zero() -> None:
    slots = random_slots("float32", HIDDEN, WIDTH, 2)
    out = grouped_swiglu(torch.randn(3, HIDDEN), slots, int32(1), int32(0), torch.ones(1))
    assert out[[0, 2]].count_nonzero() == 0
    assert out[1].count_nonzero() == HIDDEN


def test_weight_of_a_pair_multiplies_its_row() -> None:
    expert = ExpertWeights(*(Weight(torch.ones(1, 1)) for _ in range(3)))
    slots = SlotWeights(1)
    slots.fill(0, expert)
    out = grouped_swiglu(
        torch.tensor([[2.0]]), slots, int32(0, 0), int32(0, 0), torch.tensor([1.0, 0.5])
    )
    assert out.item() == pytest.approx(1.5 * 2 * 2 / (1 + torch.e**-2))


@settings(max_examples=20, deadline=None)
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_pair_has_the_same_bits_in_every_batch_and_slot(kind: str, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 20))
    place = data.draw(st.permutations(range(4)))
    slots, moved = random_slots(kind, HIDDEN, WIDTH, 4), SlotWeights(4)
    for slot in range(4):
        moved.fill(place[slot], slots.expert(slot))
    x = torch.randn(num_tokens, HIDDEN)
    rows, slot_ids = every_token_to_every_slot(num_tokens, [0, 1, 2, 3])
    weights = torch.rand(len(rows))
    whole = grouped_swiglu(x, slots, rows, slot_ids, weights, per_pair=True, deterministic=True)
    order = data.draw(st.permutations(range(len(rows))))
    part = torch.tensor(order[: data.draw(st.integers(1, len(rows)))])
    there = torch.tensor(place, dtype=torch.int32)[slot_ids[part]]
    some = grouped_swiglu(x, moved, rows[part], there, weights[part], per_pair=True)
    assert torch.equal(some, whole[part])


@pytest.mark.parametrize("num_tokens", [1, 30])
def test_layer_has_the_same_bits_with_any_number_of_threads(num_tokens: int) -> None:
    slots, x = random_slots("bfloat16", 320, 192, 4), torch.randn(num_tokens, 320)
    rows, slot_ids = every_token_to_every_slot(num_tokens, [0, 1, 2, 3])
    weights = torch.rand(len(rows))
    results = []
    for threads in (1, 2, 3):
        with num_threads(threads):
            results.append(grouped_swiglu(x, slots, rows, slot_ids, weights))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_inactive_slots_are_not_computed() -> None:
    slots = random_slots("float32", HIDDEN, WIDTH, 3)
    nan = Weight(torch.full((WIDTH, HIDDEN), torch.nan))
    slots.fill(1, ExpertWeights(nan, nan, Weight(torch.full((HIDDEN, WIDTH), torch.nan))))
    x, rows = torch.randn(2, HIDDEN), int32(0, 1)
    assert grouped_swiglu(x, slots, rows, int32(0, 2), torch.ones(2)).isfinite().all()
    assert grouped_swiglu(x, slots, rows, int32(0, 1), torch.ones(2)).isnan().any()


@pytest.mark.parametrize("chosen", [None, TORCH])
@pytest.mark.parametrize(
    ("rows", "slot_ids"),
    [((0, 3), (0, 0)), ((0, -1), (0, 0)), ((0, 0), (0, 3)), ((0, 0), (0, -1)), ((0, 0), (0, 2))],
)
def test_pair_without_row_or_expert_is_refused(
    chosen: runtime.Kernels | None, rows: tuple[int, ...], slot_ids: tuple[int, ...]
) -> None:
    slots = random_slots("float32", HIDDEN, WIDTH, 3)
    slots.clear(2)
    with runtime.override(chosen or runtime.kernels()), pytest.raises(ValueError, match="row|slot"):
        grouped_swiglu(torch.randn(3, HIDDEN), slots, int32(*rows), int32(*slot_ids), torch.ones(2))


@pytest.mark.parametrize("chosen", [None, TORCH])
def test_slots_without_any_expert_answer_an_empty_batch_only(
    chosen: runtime.Kernels | None,
) -> None:
    slots, x = SlotWeights(2), torch.randn(1, 8)
    with runtime.override(chosen or runtime.kernels()):
        empty = grouped_swiglu(x, slots, int32(), int32(), torch.ones(0))
        assert empty.tolist() == [[0.0] * 8]
        with pytest.raises(ValueError, match="holds no expert"):
            grouped_swiglu(x, slots, int32(0), int32(1), torch.ones(1))


@pytest.mark.parametrize(
    ("x", "rows", "slot_ids", "weights"),
    [
        (torch.zeros(2, HIDDEN).double(), int32(0), int32(0), torch.ones(1)),
        (torch.zeros(2, HIDDEN + 1), int32(0), int32(0), torch.ones(1)),
        (torch.zeros(2, HIDDEN), int32(0).long(), int32(0), torch.ones(1)),
        (torch.zeros(2, HIDDEN), int32(0), int32(0).long(), torch.ones(1)),
        (torch.zeros(2, HIDDEN), int32(0), int32(0), torch.ones(1).double()),
        (torch.zeros(2, HIDDEN), int32(0, 1), int32(0), torch.ones(1)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    x: Tensor, rows: Tensor, slot_ids: Tensor, weights: Tensor
) -> None:
    with pytest.raises(ValueError):
        grouped_swiglu(x, random_slots("float32", HIDDEN, WIDTH, 1), rows, slot_ids, weights)


def test_experts_of_another_shape_or_dtype_are_refused() -> None:
    slots = random_slots("float32", HIDDEN, WIDTH, 2)
    for other in (random_expert("float32", HIDDEN, 48), random_expert("bfloat16", HIDDEN, WIDTH)):
        with pytest.raises(ValueError, match="the others hold"):
            slots.fill(1, other)
    with pytest.raises(ValueError, match="do not fit"):
        ExpertWeights(*(Weight(torch.ones(2, 3)) for _ in range(3)))


def test_slots_take_another_shape_once_they_are_empty() -> None:
    slots = random_slots("float32", HIDDEN, WIDTH, 1)
    slots.clear(0)
    slots.fill(0, random_expert("bfloat16", 16, 8))
    assert grouped_swiglu(torch.ones(1, 16), slots, int32(0), int32(0), torch.ones(1)).shape == (
        1,
        16,
    )


def test_expert_beyond_the_kernels_range_is_computed_by_torch() -> None:
    slots, expert = random_slots("fp8", HIDDEN, WIDTH, 2), random_expert("fp8", HIDDEN, WIDTH)
    assert expert.gate.scale_inv is not None
    large = Weight(expert.gate.data, expert.gate.scale_inv * 0 + 300)
    slots.fill(1, ExpertWeights(large, expert.up, expert.down))
    x = torch.randn(1, HIDDEN)
    ours = grouped_swiglu(x, slots, int32(0), int32(1), torch.ones(1))
    assert slots.table is None
    assert torch.equal(ours, swiglu_torch(x, slots.expert(1)))
    slots.clear(1)
    assert slots.table is not None
