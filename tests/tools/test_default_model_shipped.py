"""The claims of the shipped model's card about expert load, measured again; the card itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from default_model.card import SAMPLE_PROMPTS, model_card
from default_model.corpus.domains import DOMAINS
from default_model.evaluation import (
    DomainGrade,
    Evaluation,
    evaluate,
    held_out_dialogues,
    loss_and_loads,
)
from default_model.figures import save_heat_map
from default_model.model import DeepseekV3
from default_model.restore import restore
from default_model.vocabulary import load_tokenizer

FOLDER = Path(__file__).parents[2] / "cluster/models/shoal-tiny"
TWICE_EVEN = 2 * 4 / 32
NUM_ITEMS = 30
MIN_RIGHT = {
    "arithmetic": 0.8,
    "facts": 0.8,
    "code": 0.8,
    "french": 0.8,
    "reading": 0.6,
    "chat": 0.6,
}
"""Share of NUM_ITEMS held-out items answered exactly right; the card has 68 % and 76 % for the
last two, on more items."""


@pytest.fixture(scope="module")
def loads() -> dict[str, torch.Tensor]:
    """[L, E] share of rows by expert, of 100 held-out dialogues of each domain."""
    model, tokenizer = restore(FOLDER), load_tokenizer(FOLDER / "tokenizer.json")
    with torch.no_grad():
        return {
            domain: loss_and_loads(model, tokenizer, held_out_dialogues(domain, 100))[1]
            for domain in DOMAINS
        }


def test_load_is_balanced_over_the_mix(loads: dict[str, torch.Tensor]) -> None:
    mix = torch.stack(list(loads.values())).mean(dim=0)
    max_vio = mix.max(dim=1).values / mix.mean(dim=1) - 1
    assert max_vio.max() < 0.5


def test_a_domain_has_experts_of_its_own(loads: dict[str, torch.Tensor]) -> None:
    """The four busiest take twice the even share in 20 of 21 (domain, layer) pairs."""
    shares = torch.stack([load.topk(4, dim=1).values.sum(dim=1) for load in loads.values()])
    assert (shares >= TWICE_EVEN).sum() >= 20


@pytest.fixture(scope="module")
def evaluation() -> Evaluation:
    """Of NUM_ITEMS greedy answers a domain."""
    return evaluate(FOLDER, NUM_ITEMS, SAMPLE_PROMPTS[:2])


@pytest.mark.slow
@pytest.mark.parametrize("domain", MIN_RIGHT)
def test_answers_to_unseen_questions_are_right(domain: str, evaluation: Evaluation) -> None:
    (grade,) = (grade for grade in evaluation.grades if grade.domain == domain)
    assert grade.num_right / grade.num_items >= MIN_RIGHT[domain], grade.wrong


@pytest.mark.slow
def test_evaluation_reads_generates_and_counts(evaluation: Evaluation, tmp_path: Path) -> None:
    assert [grade.domain for grade in evaluation.grades] == list(DOMAINS)
    for grade in evaluation.grades:
        assert 0 <= grade.num_right <= grade.num_items == NUM_ITEMS
        assert 0.9 * NUM_ITEMS <= grade.num_ended <= NUM_ITEMS
    assert 0.3 < evaluation.acceptance <= 1.0
    assert "Pip" in evaluation.samples[0][1]
    save_heat_map(evaluation, 1, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_card_shows_the_figures(exported: tuple[DeepseekV3, Path]) -> None:
    loads = torch.full((3, 32), 1 / 32)
    grade = DomainGrade("stories", 0.25, 8, 6, 8, 100, 75, loads, ())
    card = model_card(Evaluation((grade,), (("Who?", "Me."),)), exported[1])
    assert "3,000 steps, 12.3 million tokens, 60 minutes" in card
    assert "| stories | 0.250 | 6 of 8 (75 %) | 100 % | 75 % |" in card
    assert "| MaxVio, mix | 0.00 | 0.00 | 0.00 |" in card
    assert "| stories | 1.0x | 1.0x | 1.0x |" in card
    assert "> Who?\n\n```text\nMe.\n```" in card
