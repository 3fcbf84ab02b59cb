"""The training loop: resumable, figures every few steps, a checkpoint every two minutes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from default_model.batches import IGNORED, Batch, Batches
from default_model.corpus.domains import DOMAINS
from default_model.first_weights import set_first_weights
from default_model.gate_turn import turn_gates
from default_model.model import DeepseekV3
from default_model.optimizer import Optimizers
from default_model.settings import Recipe, model_config

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
CHECKPOINT_EVERY_S = 120.0
REPORT_EVERY = 20
SMOOTHING = 0.95
PROGRESS = ("step", "num_tokens", "train_s", "gates_turned", "biases_settled")
NUM_TURN_BATCHES = 8
MTP_ROWS = 4
"""One row of this many trains the next-token module."""


class RecipeChanged(ValueError):
    """A run cannot go on under another recipe: `other` is name -> (now, in the checkpoint)."""

    def __init__(self, folder: Path, other: dict[str, tuple[object, object]]) -> None:
        text = ", ".join(f"{name} = {now} (was {was})" for name, (now, was) in other.items())
        super().__init__(f"{folder} holds a run of another recipe: {text}: choose another --run")


@dataclass(slots=True)
class Averages:
    """Smoothed figures of a run."""

    losses: list[float] = field(default_factory=lambda: [float("nan")] * len(DOMAINS))
    mtp_loss: float = float("nan")
    loads: list[Tensor] = field(default_factory=list)

    def update(self, losses: list[float], mtp_loss: float, loads: list[Tensor]) -> None:
        """One step's losses by domain, the next-token module's, and rows by expert and layer."""
        self.losses = [_smooth(a, b) for a, b in zip(self.losses, losses, strict=True)]
        self.mtp_loss = _smooth(self.mtp_loss, mtp_loss)
        shares = [(load / load.sum().clamp_min(1)).cpu() for load in loads]
        old = self.loads or shares
        pairs = zip(old, shares, strict=True)
        self.loads = [SMOOTHING * a + (1 - SMOOTHING) * b for a, b in pairs]

    def max_violations(self) -> list[float]:
        """MaxVio of each layer: the busiest expert's load over the mean, minus one."""
        return [float(load.max() / load.mean().clamp_min(1e-9)) - 1 for load in self.loads]


class Trainer:
    """A run in `folder`; it continues from the folder's checkpoint if there is one."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, recipe: Recipe, device: str) -> None:
        torch.manual_seed(recipe.seed)
        self._folder, self._recipe, self._device = folder, recipe, device
        self._batches = Batches(tokenizer, recipe)
        self.model = DeepseekV3(model_config())
        set_first_weights(self.model)
        self.model.to(device)
        self._optimizers = Optimizers(self.model, recipe)
        self.averages = Averages()
        self.step, self.num_tokens, self.train_s = 0, 0, 0.0
        self.gates_turned = self.biases_settled = False
        if (folder / CHECKPOINT).exists():
            self._resume()

    def run(self) -> Iterator[int]:
        """Train to the recipe's last step; yields the number of steps done after each."""
        saved_at = time.monotonic()
        while self.step < self._recipe.steps:
            started = time.monotonic()
            if self.step >= self._recipe.turn_gates_at * self._recipe.steps:
                self._turn_gates()
            self._train_step()
            self.train_s += time.monotonic() - started
            if self.step % REPORT_EVERY == 0:
                self._log()
            if time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                self.save()
                saved_at = time.monotonic()
            yield self.step
        self._settle_biases()
        self.save()

    def figures(self) -> dict[str, Any]:
        """Where the run stands."""
        losses = dict(zip(DOMAINS, (round(x, 4) for x in self.averages.losses), strict=True))
        return {
            "step": self.step,
            "tokens": self.num_tokens,
            "train_s": round(self.train_s),
            "loss": losses,
            "mtp_loss": round(self.averages.mtp_loss, 4),
            "max_score": round(max(float(a.peaks.max()) for a in self.model.attentions()), 1),
            "max_vio": [round(x, 2) for x in self.averages.max_violations()],
        }

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": self._optimizers.state_dict(),
            "averages": asdict(self.averages),
            "recipe": asdict(self._recipe),
            **{name: getattr(self, name) for name in PROGRESS},
        }
        partial = self._folder / f"{CHECKPOINT}.partial"
        torch.save(state, partial)
        os.replace(partial, self._folder / CHECKPOINT)

    def _resume(self) -> None:
        state = torch.load(self._folder / CHECKPOINT, map_location="cpu")
        other = {
            name: (value, state["recipe"].get(name))
            for name, value in asdict(self._recipe).items()
            if value != state["recipe"].get(name) and name != "steps"
        }
        if other:
            raise RecipeChanged(self._folder, other)
        self.model.load_state_dict(state["model"])
        self._optimizers.load_state_dict(state["optimizers"])
        self.averages = Averages(**state["averages"])
        for name in PROGRESS:
            setattr(self, name, state[name])
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop the lines of steps that the checkpoint has not seen: they come again."""
        log = self._folder / LOG
        if log.exists():
            lines = log.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            log.write_text("".join(f"{line}\n" for line in kept))

    def _turn_gates(self) -> None:
        if self.gates_turned:
            return
        self.gates_turned = True
        unseen = (self._recipe.steps + i for i in range(NUM_TURN_BATCHES))
        batches = [self._batches.batch(step).to(self._device) for step in unseen]
        turn_gates(self.model, batches, self._recipe.turn_strength)

    @torch.no_grad()
    def _settle_biases(self) -> None:
        """Balance the finished gates: while they trained, the biases followed a moving target."""
        if self.biases_settled:
            return
        self.biases_settled = True
        passes = min(self._recipe.settle_passes, self._recipe.steps)
        for number in range(passes):
            unseen = self._recipe.steps + NUM_TURN_BATCHES + number
            batch = self._batches.batch(unseen).to(self._device)
            hidden = self.model(batch.ids, batch.mask)
            self.model.draft_logits(hidden[:, :-1], batch.ids[:, 1:], batch.mask[:, :, :-1, :-1])
            for gate in self.model.gates():
                gate.balance(self._recipe.bias_speed * (1 - number / passes))

    def _train_step(self) -> None:
        batch = self._batches.batch(self.step).to(self._device)
        hidden = self.model(batch.ids, batch.mask)
        losses, domains = self._losses(hidden, batch)
        mtp_loss = self._mtp_loss(hidden, batch)
        (losses.mean() + self._recipe.mtp_weight * mtp_loss).backward()
        self._optimizers.step(lr_scale(self._recipe, self.step))
        loads = [gate.load for gate in self.model.gates()]
        for attention in self.model.attentions():
            attention.clip_scores(self._recipe.max_score)
        for gate in self.model.gates():
            gate.balance(bias_speed(self._recipe, self.step))
        self.averages.update(_by_domain(losses, domains), mtp_loss.item(), loads)
        self.step += 1
        self.num_tokens += batch.ids.numel()

    def _losses(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross entropy [N] and domain [N] of every graded token."""
        graded = batch.targets != IGNORED
        logits = self.model.logits(hidden[graded]).float()
        losses = F.cross_entropy(logits, batch.targets[graded], reduction="none")
        return losses, batch.domains[graded]

    def _mtp_loss(self, hidden: Tensor, batch: Batch) -> Tensor:
        if self.step < self._recipe.mtp_from * self._recipe.steps:
            return hidden.new_zeros(())
        rows = slice(None, None, MTP_ROWS)
        next_ids, mask = batch.ids[rows, 1:], batch.mask[rows, :, :-1, :-1]
        targets = batch.targets[rows, 1:]
        logits = self.model.draft_logits(hidden[rows, :-1], next_ids, mask)
        graded = targets != IGNORED
        return F.cross_entropy(logits[graded].float(), targets[graded])

    def _log(self) -> None:
        with (self._folder / LOG).open("a") as file:
            file.write(json.dumps(self.figures()) + "\n")


def load_run(folder: Path) -> tuple[DeepseekV3, dict[str, Any]]:
    """The model of a run, on the CPU, and how it came about: recipe, steps, tokens, seconds."""
    state = torch.load(folder / CHECKPOINT, map_location="cpu")
    model = DeepseekV3(model_config())
    model.load_state_dict(state["model"])
    story = {name: state[name] for name in ("recipe", "step", "num_tokens", "train_s")}
    return model.eval(), story


def lr_scale(recipe: Recipe, step: int) -> float:
    """Linear warm-up, constant, linear fall over the last `decay_share` of the steps."""
    left = (recipe.steps - step) / (recipe.steps * recipe.decay_share)
    return min(1.0, (step + 1) / recipe.warmup_steps, left)


def bias_speed(recipe: Recipe, step: int) -> float:
    """gamma of the balance: it falls with the learning rate."""
    return recipe.bias_speed * lr_scale(recipe, step)


def _smooth(old: float, new: float) -> float:
    """NaN stands for no figure, and changes none."""
    if new != new:
        return old
    return new if old != old else SMOOTHING * old + (1 - SMOOTHING) * new


def _by_domain(losses: Tensor, domains: Tensor) -> list[float]:
    """Mean loss of each domain, NaN of one that is not in the batch."""
    count = torch.bincount(domains, minlength=len(DOMAINS))
    total = torch.bincount(domains, losses.detach(), minlength=len(DOMAINS))
    return (total / count).tolist()
