"""A small copy of the default model's architecture, a tokenizer for it, and what it exports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from default_model import vocabulary
from default_model.export import export
from default_model.model import DeepseekV3
from default_model.settings import CONFIG, Recipe, model_config

TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
}
"""The widths that decide about partial fp8 blocks are those of the model that ships."""
NUM_DIALOGUES = 2100
STORY = {"recipe": asdict(Recipe()), "step": 3000, "num_tokens": 12_288_000, "train_s": 3600.0}
"""How the exported model is said to have come about."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    """Models are tiny from here to the end of the test's file."""
    with pytest.MonkeyPatch.context() as patch:
        _shrink(patch)
        yield


@pytest.fixture
def few_dialogues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers are trained on little while the test runs."""
    monkeypatch.setattr(vocabulary, "NUM_DIALOGUES", NUM_DIALOGUES)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A tokenizer of the tiny model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "NUM_DIALOGUES", NUM_DIALOGUES)
        return vocabulary.train_tokenizer(1, TINY["vocab_size"])


@pytest.fixture(scope="session")
def exported(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[DeepseekV3, Path]:
    """A tiny model with random weights in every part, and its checkpoint folder; read only."""
    folder = tmp_path_factory.mktemp("exported") / "tiny"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        _shrink(patch)
        model = DeepseekV3(model_config()).eval()
        for weight in model.parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
            else:
                nn.init.normal_(weight, mean=1.0, std=0.1)
        nn.init.normal_(model.embed_tokens.weight)
        for gate in model.gates():
            nn.init.normal_(gate.e_score_correction_bias, std=0.1)
        export(model, tokenizer, STORY, folder)
    return model, folder


def _shrink(patch: pytest.MonkeyPatch) -> None:
    for name, value in TINY.items():
        patch.setitem(CONFIG, name, value)
