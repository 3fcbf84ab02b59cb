"""The training loop: schedules, balance, resuming, and that a tiny model learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from default_model import training
from default_model.model import Gate
from default_model.settings import Recipe, model_config
from default_model.training import (
    Averages,
    RecipeChanged,
    Trainer,
    bias_speed,
    load_run,
    lr_scale,
)

NewTrainer = Callable[..., Trainer]


@pytest.fixture(scope="module")
def new_trainer(tiny: None, tokenizer: Tokenizer) -> NewTrainer:
    """`new_trainer(folder, steps=6)`: a trainer of a tiny model."""

    def new(folder: Path, **recipe: Any) -> Trainer:
        folder.mkdir(exist_ok=True)
        defaults = {"rows": 2, "length": 64, "warmup_steps": 2}
        return Trainer(folder, tokenizer, Recipe(**defaults | recipe), "cpu")

    return new


@dataclass(frozen=True)
class Course:
    """Losses by domain and MaxVio of the main MoE layer, after the first step and the last."""

    losses: tuple[list[float], list[float]]
    max_vio: tuple[float, float]


@pytest.fixture(scope="module")
def course(new_trainer: NewTrainer, tmp_path_factory: pytest.TempPathFactory) -> Course:
    """60 steps that begin with all rows on the two experts of the first group."""
    folder = tmp_path_factory.mktemp("course")
    trainer = new_trainer(folder, steps=60, rows=4, warmup_steps=10, bias_speed=0.05, mtp_from=1.0)
    trainer.model.gates()[0].e_score_correction_bias[:2] = 1.0
    seen = []
    for _ in trainer.run():
        seen.append((trainer.averages.losses, trainer.averages.max_violations()[0]))
    return Course(*zip(seen[0], seen[-1], strict=True))


@pytest.mark.parametrize(
    ("step", "scale"),
    [(0, 1 / 50), (24, 0.5), (49, 1.0), (500, 1.0), (750, 1.0), (875, 0.5), (999, 0.004)],
)
def test_learning_rate_rises_stays_and_falls(step: int, scale: float) -> None:
    recipe = Recipe(steps=1000, warmup_steps=50, decay_share=0.25)
    assert lr_scale(recipe, step) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("step", "speed"),
    [(0, 0.0006), (49, 0.03), (750, 0.03), (875, 0.015), (975, 0.003)],
)
def test_the_bias_follows_the_learning_rate(step: int, speed: float) -> None:
    recipe = Recipe(steps=1000, warmup_steps=50, bias_speed=0.03)
    assert bias_speed(recipe, step) == pytest.approx(speed)


@pytest.mark.usefixtures("tiny")
def test_the_bias_of_busy_experts_falls_and_of_idle_ones_rises() -> None:
    gate = Gate(model_config())
    gate.load = torch.tensor([0.0, 3.0, 9.0, 4.0, 4.0, 4.0, 4.0, 4.0])  # 4 in the mean
    gate.balance(0.25)
    assert gate.e_score_correction_bias.tolist() == [0.25, 0.25, -0.25, 0, 0, 0, 0, 0]


def test_a_domain_that_is_not_in_a_batch_keeps_its_figure() -> None:
    averages = Averages(losses=[2.0] * 7)
    nan = float("nan")
    averages.update([nan, 1.0, *[nan] * 5], 0.0, [])
    assert averages.losses == pytest.approx([2.0, 1.95, *[2.0] * 5])  # 0.95 * 2 + 0.05 * 1


def test_a_resumed_run_is_the_same_run(
    new_trainer: NewTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The next-token module, whose weights have no optimizer state before, begins at step 3."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)
    assert list(new_trainer(tmp_path / "whole", steps=6).run()) == [1, 2, 3, 4, 5, 6]
    assert list(islice(new_trainer(tmp_path / "parts", steps=6).run(), 3)) == [1, 2, 3]
    assert list(new_trainer(tmp_path / "parts", steps=6).run()) == [4, 5, 6]
    whole, parts = (torch.load(tmp_path / f / training.CHECKPOINT) for f in ("whole", "parts"))
    for part in ("model", "averages"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0, equal_nan=True)
    for ours, theirs in zip(parts["optimizers"], whole["optimizers"], strict=True):
        torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
    assert parts["num_tokens"] == whole["num_tokens"] == 6 * 2 * 64


def test_a_finished_run_has_nothing_left_to_do(new_trainer: NewTrainer, tmp_path: Path) -> None:
    list(new_trainer(tmp_path, steps=1).run())
    assert list(new_trainer(tmp_path, steps=1).run()) == []


def test_the_checkpoint_holds_the_model_that_was_trained(
    new_trainer: NewTrainer, tmp_path: Path
) -> None:
    trainer = new_trainer(tmp_path, steps=1)
    list(trainer.run())
    model, story = load_run(tmp_path)
    torch.testing.assert_close(model.state_dict(), trainer.model.state_dict(), rtol=0, atol=0)
    assert (story["step"], story["num_tokens"], story["recipe"]["rows"]) == (1, 2 * 64, 2)


def test_a_run_goes_on_under_its_own_recipe_only(new_trainer: NewTrainer, tmp_path: Path) -> None:
    """More steps are no other recipe."""
    list(new_trainer(tmp_path, steps=1).run())
    assert new_trainer(tmp_path, steps=3).step == 1
    with pytest.raises(RecipeChanged, match=r"rows = 3 \(was 2\)"):
        new_trainer(tmp_path, steps=1, rows=3)


def test_the_next_token_module_waits_for_its_turn(new_trainer: NewTrainer, tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, steps=2, mtp_from=0.5)
    weights = trainer.model.next_token.state_dict()
    first = {name: weight.clone() for name, weight in weights.items()}
    run = trainer.run()
    next(run)
    assert all(weights[name].equal(first[name]) for name in first)
    next(run)
    assert not weights["eh_proj.weight"].equal(first["eh_proj.weight"])


def test_sixty_steps_teach_a_tiny_model(course: Course) -> None:
    """Smoothed, by domain; stories do not fit into rows of 64. Measured: 6.2, then 3.1 to 4.4."""
    falls = [first - last for first, last in zip(*course.losses, strict=True)]
    assert min(fall for fall in falls if not isnan(fall)) > 1


def test_sixty_steps_balance_the_experts(course: Course) -> None:
    """Two of eight experts with all rows have four times the mean: MaxVio 3. Measured: then 0.3."""
    first, last = course.max_vio
    assert first == 3.0 and last < 1
