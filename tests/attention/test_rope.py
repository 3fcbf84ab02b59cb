"""Rotary embedding: the published YaRN numbers, the rotation of a pair, the softmax scale."""

import math
from typing import Any

import pytest
import torch

from attention.rope import frequencies, rope_table, rotate, softmax_scale, yarn_range
from experts.config import ModelConfig, RopeScaling

V3_SCALING = RopeScaling(
    type="yarn",
    factor=40.0,
    original_max_position_embeddings=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)


def config(scaling: RopeScaling | None, **changed: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "model_type": "deepseek_v3",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "rope_scaling": scaling,
    }
    return ModelConfig(**(fields | changed))


def test_yarn_frequencies_of_deepseek_v3() -> None:
    assert yarn_range(64, 1e4, V3_SCALING) == (10.0, 23.0)
    expected = {
        0: 1.0,
        1: 0.7498942018,
        10: 0.05623413250,
        11: 0.03900692612,
        16: 0.005500000436,
        22: 1.778279402e-4,
        23: 3.333803761e-5,
        31: 3.333803306e-6,
    }
    theta = frequencies(64, 1e4, V3_SCALING)
    for index, value in expected.items():
        assert theta[index].item() == pytest.approx(value, rel=1e-5 if index == 31 else 1e-6)


def test_kimi_ramp_of_equal_betas_spans_one_pair() -> None:
    scaling = V3_SCALING.model_copy(update={"factor": 32.0, "beta_fast": 1.0})
    assert yarn_range(64, 5e4, scaling) == (19.0, 20.0)


def test_equal_ends_of_the_ramp_do_not_divide_by_zero() -> None:
    scaling = V3_SCALING.model_copy(update={"original_max_position_embeddings": 6})
    low, high = yarn_range(64, 1e4, scaling)
    assert (low, high) == (0.0, 0.001)
    assert frequencies(64, 1e4, scaling).isfinite().all()


def test_one_pair_turned_by_one_radian() -> None:
    turned = rotate(torch.tensor([[1.0, 2.0]]), torch.tensor([[math.cos(1), math.sin(1)]]))
    assert turned.tolist()[0] == pytest.approx([-1.1426, 1.9221], abs=1e-4)


def test_pairs_are_interleaved_and_heads_share_a_row() -> None:
    table = rope_table(config(None, qk_rope_head_dim=4), 8)
    x = torch.randn(3, 2, 4)
    rows = table[torch.tensor([5, 0, 7])]
    turned = rotate(x, rows)
    for t, position in enumerate((5, 0, 7)):
        for pair, theta in enumerate((1.0, 1e4**-0.5)):
            angle = position * theta
            a, b = x[t, :, 2 * pair], x[t, :, 2 * pair + 1]
            expected_a = a * math.cos(angle) - b * math.sin(angle)
            torch.testing.assert_close(turned[t, :, 2 * pair], expected_a)
            expected_b = a * math.sin(angle) + b * math.cos(angle)
            torch.testing.assert_close(turned[t, :, 2 * pair + 1], expected_b)


def test_rotation_keeps_dot_products_at_equal_distance() -> None:
    table = rope_table(config(V3_SCALING), 128)
    q, k = torch.randn(1, 64), torch.randn(1, 64)

    def score(i: int, j: int) -> float:
        return (rotate(q, table[i : i + 1]) * rotate(k, table[j : j + 1])).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-3)


@pytest.mark.parametrize(
    ("mscale_all_dim", "expected"), [(1.0, 0.13523378), (0.707, 0.11472139), (0.0, 192**-0.5)]
)
def test_softmax_scale(mscale_all_dim: float, expected: float) -> None:
    scaling = V3_SCALING.model_copy(update={"mscale_all_dim": mscale_all_dim})
    assert softmax_scale(config(scaling)) == pytest.approx(expected, rel=1e-7)
    assert softmax_scale(config(None)) == pytest.approx(192**-0.5, rel=1e-12)


def test_unequal_mscales_scale_the_table() -> None:
    scaling = V3_SCALING.model_copy(update={"mscale_all_dim": 0.0})
    table = rope_table(config(scaling), 2)
    assert table[0, 0].item() == pytest.approx(0.1 * math.log(40) + 1)
