"""What the first weights do before anything is learnt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from default_model.first_weights import set_first_weights
from default_model.model import DeepseekV3
from default_model.settings import model_config

LENGTH = 128


@pytest.fixture(scope="module")
def model() -> DeepseekV3:
    torch.manual_seed(0)
    model = DeepseekV3(model_config())
    set_first_weights(model)
    return model


@pytest.fixture(scope="module")
def ids(model: DeepseekV3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (4, LENGTH), generator=generator)


@torch.no_grad()
def attention_of_first_layer(
    model: DeepseekV3, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Probabilities [B, H, T, T], taken where the layer hands over its queries and keys."""
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf
        )
        seen.append(scores.softmax(dim=-1))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(ids)
    return seen[0]


def test_the_first_head_looks_at_the_token_before(
    model: DeepseekV3, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    probs = attention_of_first_layer(model, ids, monkeypatch)
    assert probs[:, 0].diagonal(offset=-1, dim1=1, dim2=2).mean() > 0.7


def test_the_other_heads_look_everywhere(
    model: DeepseekV3, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    probs = attention_of_first_layer(model, ids, monkeypatch)
    assert probs[:, 1:].diagonal(offset=-1, dim1=2, dim2=3).mean() < 0.1


@torch.no_grad()
def test_the_first_loss_is_about_that_of_a_guess(model: DeepseekV3, ids: Tensor) -> None:
    """ln 2048 = 7.62."""
    logits = model.logits(model(ids))[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(7.62, abs=0.3)
