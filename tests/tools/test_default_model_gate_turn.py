"""Turning the gates toward the domains: which experts, which directions, and what stays."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from default_model.batches import Batches
from default_model.corpus.domains import DOMAINS
from default_model.first_weights import set_first_weights
from default_model.gate_turn import domain_directions, own_experts, turn_gates
from default_model.model import DeepseekV3
from default_model.settings import Recipe, model_config


def test_domains_take_their_most_typical_experts_by_turns() -> None:
    """Shares .4 .3 .2 .1 and .1 .1 .1 .7 over their means .25 .2 .15 .4 are 1.6 1.5 1.33 .25 and
    .4 .5 .67 1.75: 0, then 3, then 1, then 2 is left."""
    rows = torch.tensor([[4.0, 3.0, 2.0, 1.0], [10.0, 10.0, 10.0, 70.0]])
    assert own_experts(rows) == [[0, 1], [3, 2]]


def test_typical_is_not_busiest() -> None:
    """Expert 0 has most rows of both domains; 1 and 2 are what only one of them uses."""
    rows = torch.tensor([[8.0, 2.0, 0.0, 0.0], [8.0, 0.0, 2.0, 0.0]])
    assert [experts[0] for experts in own_experts(rows)] == [1, 2]


def test_a_domain_without_rows_gets_experts_too() -> None:
    own = own_experts(torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]))
    assert [len(experts) for experts in own] == [2, 2]
    assert sorted(own[0] + own[1]) == [0, 1, 2, 3]


def clouds() -> tuple[Tensor, Tensor]:
    """[200, 3], [200]: domains 0 and 1 around (4, 0, 9) and (-4, 0, 9), spread 1."""
    domains = torch.arange(200) % 2
    centres = torch.tensor([[4.0, 0.0, 9.0], [-4.0, 0.0, 9.0]])
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    return centres[domains] + noise, domains


def test_directions_tell_two_clouds_apart() -> None:
    inputs, domains = clouds()
    directions = domain_directions(inputs, domains)
    assert directions.shape == (len(DOMAINS), 3)
    outputs = (inputs - inputs.mean(dim=0)) @ directions.T
    assert (outputs[:, 0] > 0).equal(domains == 0)
    assert (outputs[:, 1] > 0).equal(domains == 1)
    torch.testing.assert_close(outputs[:, :2].std(dim=0), torch.ones(2))


def test_a_domain_without_rows_has_no_direction() -> None:
    assert domain_directions(*clouds())[2:].count_nonzero() == 0


@pytest.mark.usefixtures("tiny")
def test_only_the_gates_of_the_main_layers_turn(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = DeepseekV3(model_config())
    set_first_weights(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = Batches(tokenizer, Recipe(rows=2, length=64))
    turn_gates(model, [batches.batch(step) for step in range(2)], 0.7)
    after = model.state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == {
        "layers.1.mlp.gate.weight"
    }
    assert all(weight.isfinite().all() for weight in after.values())
