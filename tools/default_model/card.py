"""The model card, `README.md` of the model's folder: `card.md.j2` filled with an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from default_model.evaluation import TOP, DomainGrade, Evaluation
from default_model.export import TRAINING
from default_model.restore import restore
from default_model.settings import CONFIG

SAMPLE_PROMPTS = (
    "Tell me a story about a brave fox named Pip.",
    "What is 37 + 45?",
    "What is the capital of Japan?",
    "Write a Python function that adds 7 to a number.",
    'How do you say "the red house" in French?',
    "Tom has a red ball. Mia has a blue kite. Who has the kite?",
    "Who are you?",
    "What is a mixture of experts?",
    "Tell me about black holes.",
)


def model_card(evaluation: Evaluation, folder: Path) -> str:
    """Markdown about the checkpoint in `folder`, from its evaluation and its own files."""
    environment = Environment(  # noqa: S701 (Markdown of our own, no HTML of others)
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    first = CONFIG["first_k_dense_replace"]
    return environment.get_template("card.md.j2").render(
        config=CONFIG,
        run=json.loads((folder / TRAINING).read_text(encoding="utf-8")),
        num_parameters=sum(weight.numel() for weight in restore(folder).parameters()),
        num_bytes=(folder / "model.safetensors").stat().st_size,
        grades=[_grade_fields(grade) for grade in evaluation.grades],
        samples=evaluation.samples,
        acceptance=evaluation.acceptance,
        max_violations=[f"{value:.2f}" for value in evaluation.max_violations],
        layers=[first + i for i in range(len(evaluation.max_violations))],
        top=TOP,
    )


def _grade_fields(grade: DomainGrade) -> dict[str, Any]:
    """What the tables of the card show of a domain."""
    even_share = TOP / CONFIG["n_routed_experts"]
    return {
        "domain": grade.domain,
        "loss": grade.loss,
        "num_items": grade.num_items,
        "num_right": grade.num_right,
        "num_ended": grade.num_ended,
        "num_drafts": grade.num_drafts,
        "num_accepted": grade.num_accepted,
        "wrong": grade.wrong,
        "multiples": [f"{share / even_share:.1f}x" for share in grade.top_shares],
    }
