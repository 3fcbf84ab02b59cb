"""The gate: published vectors, ties, and agreement of kernel, torch twin and a per-token oracle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from experts.linear import Weight
from router.errors import NonFiniteInput
from router.gate import GateSpec, GateWeights, route, select_experts_torch

LOGITS = [0.2, 1, -0.5, 0.9, 2, -1, 0.3, 0.4]
BIAS = [0, -0.2, 0.3, 0, -0.4, 0, 0.1, 0.05]
V2_LITE = GateSpec(num_experts=8, top_k=3)
V2 = GateSpec(8, 3, group_score="max", n_group=4, topk_group=2, routed_scaling_factor=16.0)
V3 = GateSpec(8, 3, "sigmoid", "top2_sum", 4, 2, norm_topk_prob=True, routed_scaling_factor=2.5)


def select(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """The kernel on given logits: an identity matrix as the gate's weight."""
    weight = Weight(torch.eye(spec.num_experts))
    return route(logits, GateWeights(weight, bias), spec)


def oracle(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> tuple[list[int], list[float]]:
    """One token, plain Python over float32 scores."""
    scores = logits.softmax(0) if spec.scoring == "softmax" else logits.sigmoid()
    choice = (scores if bias is None else scores + bias).tolist()
    size = spec.num_experts // spec.n_group

    def group_score(g: int) -> float:
        best = sorted(choice[g * size : (g + 1) * size], reverse=True)
        pair = torch.tensor(best[:2]).sum().item() if spec.group_score == "top2_sum" else best[0]
        return pair

    groups = sorted(range(spec.n_group), key=lambda g: (-group_score(g), g))[: spec.topk_group]
    allowed = [e for e in range(spec.num_experts) if e // size in groups]
    ids = sorted(sorted(allowed, key=lambda e: (-choice[e], e))[: spec.top_k])
    weights = [float(scores[e]) for e in ids]
    total = sum(weights) + 1e-20 if spec.norm_topk_prob else 1.0
    return ids, [w / total * spec.routed_scaling_factor for w in weights]


@pytest.mark.parametrize(
    ("spec", "bias", "expected"),
    [
        (V2_LITE, None, {4: 0.419727, 1: 0.154409, 3: 0.139715}),
        (V2, None, {4: 6.715631, 1: 2.470543, 0: 1.110086}),
        (V3, BIAS, {3: 1.068819, 2: 0.567583, 6: 0.863599}),
    ],
)
def test_published_vectors(
    spec: GateSpec, bias: list[float] | None, expected: dict[int, float]
) -> None:
    bias_tensor = None if bias is None else torch.tensor(bias, dtype=torch.float32)
    for choose in (select, select_experts_torch):
        ids, weights = choose(torch.tensor([LOGITS]), bias_tensor, spec)
        assert ids[0].tolist() == sorted(expected)
        assert dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True)) == pytest.approx(
            expected, abs=1e-6
        )


@pytest.mark.parametrize("choose", [select, select_experts_torch])
@pytest.mark.parametrize("spec", [V2_LITE, V2, V3])
def test_equal_logits_choose_the_lowest_experts(spec: GateSpec, choose: object) -> None:
    ids, _ = choose(torch.zeros(2, 8), None, spec)  # type: ignore[operator]
    assert ids.tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("choose", [select, select_experts_torch])
def test_a_tie_at_the_last_place_goes_to_the_lower_index(choose: object) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]])
    ids, _ = choose(logits, None, V2_LITE)  # type: ignore[operator]
    assert ids.tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("choose", [select, select_experts_torch])
def test_equal_groups_keep_the_lower_one(choose: object) -> None:
    logits = torch.tensor([[0.0, 0.0, 2.0, 1.0, 2.0, 1.0, 2.0, 1.0]])
    ids, _ = choose(logits, None, V3)  # type: ignore[operator]
    assert ids.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("choose", [select, select_experts_torch])
def test_lost_groups_stay_lost_when_every_choice_is_negative(choose: object) -> None:
    """Masking with 0.0 instead of -inf would take experts 0 and 1 here."""
    bias = torch.tensor([-3.0, -3, -1, -1, -1, -2, -4, -4])
    ids, _ = choose(torch.zeros(1, 8), bias, V3)  # type: ignore[operator]
    assert ids.tolist() == [[2, 3, 4]]


@pytest.mark.parametrize("choose", [select, select_experts_torch])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_named(choose: object, value: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 5] = value
    with pytest.raises(NonFiniteInput) as caught:
        choose(logits, None, V3)  # type: ignore[operator]
    assert caught.value.row == 1


@pytest.mark.parametrize("spec", [V2_LITE, V2, V3])
def test_no_tokens(spec: GateSpec) -> None:
    ids, weights = select(torch.zeros(0, 8), None, spec)
    assert ids.shape == weights.shape == (0, 3)


def test_weights_of_tiny_scores_stay_finite() -> None:
    """All sigmoids underflow to 0: the 1e-20 keeps 0/0 away."""
    _, weights = select(torch.full((1, 8), -200.0), None, V3)
    assert weights.tolist() == [[0.0, 0.0, 0.0]]


@st.composite
def gates(draw: st.DrawFn) -> tuple[Tensor, Tensor | None, GateSpec]:
    """Logits and biases on a grid of 1/4, so that ties and negative choices are common."""
    n_group = draw(st.sampled_from([1, 2, 4, 8]))
    size = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    num_experts = n_group * size
    spec = GateSpec(
        num_experts,
        draw(st.integers(1, size * topk_group)),
        draw(st.sampled_from(["softmax", "sigmoid"])),
        draw(st.sampled_from(["max", "top2_sum"])),
        n_group,
        topk_group,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5, 16.0])),
    )
    quarters = st.integers(-12, 12).map(lambda n: n / 4)
    rows = st.lists(quarters, min_size=num_experts, max_size=num_experts)
    logits = torch.tensor(draw(st.lists(rows, min_size=1, max_size=4)), dtype=torch.float32)
    bias = draw(st.none() | rows)
    return logits, None if bias is None else torch.tensor(bias, dtype=torch.float32), spec


@settings(max_examples=100)
@given(gates())
def test_twin_and_oracle_agree(case: tuple[Tensor, Tensor | None, GateSpec]) -> None:
    logits, bias, spec = case
    ids, weights = select_experts_torch(logits, bias, spec)
    for t in range(len(logits)):
        expected_ids, expected_weights = oracle(logits[t], bias, spec)
        assert ids[t].tolist() == expected_ids
        assert weights[t].tolist() == pytest.approx(expected_weights, rel=1e-5)


@settings(max_examples=100)
@given(gates())
def test_kernel_and_twin_agree(case: tuple[Tensor, Tensor | None, GateSpec]) -> None:
    """The two compute exp differently in the last bit, so near ties may differ: compare choices."""
    logits, bias, spec = case
    ids, weights = select(logits, bias, spec)
    twin_ids, twin_weights = select_experts_torch(logits, bias, spec)
    same = (ids == twin_ids).all(dim=1)
    torch.testing.assert_close(weights[same], twin_weights[same], rtol=1e-5, atol=1e-7)
    scores = logits.softmax(1) if spec.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    for t in (~same).nonzero().flatten().tolist():
        chosen, twin = choice[t][ids[t]].sort().values, choice[t][twin_ids[t]].sort().values
        torch.testing.assert_close(chosen, twin, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [V2_LITE, V2, V3])
def test_a_row_does_not_depend_on_its_batch(spec: GateSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(33, 96, generator=generator)
    gate = GateWeights(Weight(torch.randn(8, 96, generator=generator)))
    ids, weights = route(x, gate, spec)
    for t in range(33):
        one_ids, one_weights = route(x[t : t + 1], gate, spec)
        assert torch.equal(one_ids[0], ids[t])
        assert torch.equal(one_weights[0], weights[t])


def as_matrix(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T, E] with each chosen expert's weight: the order of the k is free."""
    return torch.zeros(ids.shape[0], num_experts).scatter(1, ids, weights.float())


SIZES = {"hidden_size": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 8}


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (8, 3)])
def test_agrees_with_transformers_v3(n_group: int, topk_group: int) -> None:
    config = DeepseekV3Config(
        n_routed_experts=32, n_group=n_group, topk_group=topk_group, norm_topk_prob=True,
        routed_scaling_factor=2.5, **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    router = DeepseekV3TopkRouter(config)
    weight = torch.randn(32, 32)
    bias = torch.randn(32) - 1.0  # most choices are negative
    router.weight.data, router.e_score_correction_bias.data = weight, bias
    x = torch.randn(200, 32)
    _, their_weights, their_ids = router(x)
    spec = GateSpec(32, 4, "sigmoid", "top2_sum", n_group, topk_group, True, 2.5)
    ours = as_matrix(*route(x, GateWeights(Weight(weight), bias), spec), 32)
    torch.testing.assert_close(ours, as_matrix(their_ids, their_weights.detach(), 32))


@pytest.mark.parametrize(
    ("topk_method", "n_group", "topk_group"),
    [("greedy", 1, 1), ("group_limited_greedy", 8, 3), ("group_limited_greedy", 1, 1)],
)
def test_agrees_with_transformers_v2(topk_method: str, n_group: int, topk_group: int) -> None:
    config = DeepseekV2Config(
        n_routed_experts=32, n_group=n_group, topk_group=topk_group, topk_method=topk_method,
        routed_scaling_factor=16.0, **SIZES,
    )  # fmt: skip
    torch.manual_seed(0)
    router = DeepseekV2TopkRouter(config)
    weight = torch.randn(32, 32)
    router.weight.data = weight
    x = torch.randn(200, 32)
    _, their_weights, their_ids = router(x)
    score = "none" if topk_method == "greedy" else "max"
    spec = GateSpec(32, 4, "softmax", score, n_group, topk_group, False, 16.0)
    ours = as_matrix(*route(x, GateWeights(Weight(weight)), spec), 32)
    torch.testing.assert_close(ours, as_matrix(their_ids, their_weights.detach(), 32))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 3}, "do not divide"),
        ({"n_group": 4, "topk_group": 5}, "topk_group 5"),
        ({"n_group": 4, "topk_group": 1}, "num_experts_per_tok 3 is not in 1..2"),
    ],
)
def test_a_gate_that_cannot_choose_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSpec(num_experts=8, top_k=3, **fields)  # type: ignore[arg-type]
