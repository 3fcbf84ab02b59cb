"""What the shipped file can do, measured on items that training never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from default_model.answers import greedy_answers
from default_model.batches import ASSISTANT_ID, IGNORED, collate, encode
from default_model.corpus.base import Dialogue, Role
from default_model.corpus.domains import DOMAINS
from default_model.model import DeepseekV3
from default_model.restore import restore
from default_model.settings import EOS_ID, PAD_ID
from default_model.vocabulary import load_tokenizer

ROWS_AT_ONCE = 32
TOP = 4
DRAWS_PER_ITEM = 20
NUM_WRONG_SHOWN = 2


@dataclass(frozen=True, slots=True)
class DomainGrade:
    """One domain on its held-out items."""

    domain: str
    loss: float
    """Nats a token of the assistant's turns, teacher-forced."""
    num_items: int
    num_right: int
    num_ended: int
    """Answers that ended with the end token before the limit."""
    num_drafts: int
    num_accepted: int
    """Tokens of greedy answers that the next-token module had proposed one step ahead."""
    loads: Tensor
    """[L, E] share of the domain's rows that go to each expert of each MoE layer."""
    wrong: tuple[tuple[str, str], ...]
    """Some (question, wrong answer)."""

    @property
    def top_shares(self) -> list[float]:
        """Share of each layer's rows that the domain's busiest TOP experts take."""
        return self.loads.topk(TOP, dim=1).values.sum(dim=1).tolist()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All domains, and the samples for the card."""

    grades: tuple[DomainGrade, ...]
    samples: tuple[tuple[str, str], ...]

    @property
    def max_violations(self) -> list[float]:
        """MaxVio of each MoE layer over the mix, every domain with the same number of tokens."""
        mix = torch.stack([grade.loads for grade in self.grades]).mean(dim=0)  # [L, E]
        return (mix.max(dim=1).values / mix.mean(dim=1) - 1).tolist()

    @property
    def acceptance(self) -> float:
        """Share of the next-token module's proposals that greedy decoding takes."""
        accepted = sum(grade.num_accepted for grade in self.grades)
        return accepted / sum(grade.num_drafts for grade in self.grades)


@torch.no_grad()
def evaluate(folder: Path, num_items: int, sample_prompts: Sequence[str]) -> Evaluation:
    """Grade a checkpoint folder on up to `num_items` held-out dialogues of each domain."""
    model, tokenizer = restore(folder), load_tokenizer(folder / "tokenizer.json")
    items = {domain: held_out_dialogues(domain, num_items) for domain in DOMAINS}
    prompts = [prompt_ids(tokenizer, d.turns[:-1]) for part in items.values() for d in part]
    asked = [prompt_ids(tokenizer, [("user", text)]) for text in sample_prompts]
    answers = greedy_answers(folder, prompts + asked)
    grades, start = [], 0
    for domain, dialogues in items.items():
        own = slice(start, start + len(dialogues))
        grades.append(_grade(model, tokenizer, domain, dialogues, prompts[own], answers[own]))
        start = own.stop
    texts = [_text(tokenizer, answer) for answer in answers[len(prompts) :]]
    return Evaluation(tuple(grades), tuple(zip(sample_prompts, texts, strict=True)))


def held_out_dialogues(domain: str, count: int) -> list[Dialogue]:
    """At most `count` different items, the same at every call; a small domain has fewer."""
    found: dict[tuple[object, ...], Dialogue] = {}
    for number in range(DRAWS_PER_ITEM * count):
        dialogue = DOMAINS[domain](Random(f"evaluation {domain} {number}"), True)
        found.setdefault(tuple(_plain(text) for _, text in dialogue.turns), dialogue)
        if len(found) == count:
            break
    return list(found.values())


def _plain(text: str) -> str:
    """A turn without what `casual` changes: the same question asked politely is the same item."""
    for greeting in ("Hi! ", "Hello! ", "Hey, ", "Please "):
        text = text.removeprefix(greeting)
    return text.rstrip("?.").lower()


def prompt_ids(tokenizer: Tokenizer, turns: Sequence[tuple[Role, str]]) -> list[int]:
    """`<bos> (<User> text <Assistant> text <eos>)* <User> text <Assistant>`."""
    return [*encode(tokenizer, Dialogue(tuple(turns))).ids, ASSISTANT_ID]


def _grade(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    domain: str,
    dialogues: list[Dialogue],
    prompts: list[list[int]],
    answers: list[list[int]],
) -> DomainGrade:
    texts = [_text(tokenizer, answer) for answer in answers]
    right = [d.is_right(text) for d, text in zip(dialogues, texts, strict=True)]
    loss, loads = loss_and_loads(model, tokenizer, dialogues)
    drafts = [_count_accepted(model, p, a) for p, a in zip(prompts, answers, strict=True)]
    wrong = [
        (dialogue.turns[-2][1], text)
        for dialogue, text, ok in zip(dialogues, texts, right, strict=True)
        if not ok
    ]
    return DomainGrade(
        domain=domain,
        loss=loss,
        num_items=len(dialogues),
        num_right=sum(right),
        num_ended=sum(answer[-1] == EOS_ID for answer in answers),
        num_drafts=sum(total for _, total in drafts),
        num_accepted=sum(accepted for accepted, _ in drafts),
        loads=loads,
        wrong=tuple(wrong[:NUM_WRONG_SHOWN]),
    )


def loss_and_loads(
    model: DeepseekV3, tokenizer: Tokenizer, dialogues: list[Dialogue]
) -> tuple[float, Tensor]:
    """Mean loss of the assistant's tokens, and the share of rows by expert [L, E]."""
    total, count, loads = 0.0, 0, torch.zeros(0)
    encoded = [encode(tokenizer, dialogue) for dialogue in dialogues]
    for start in range(0, len(encoded), ROWS_AT_ONCE):
        part = encoded[start : start + ROWS_AT_ONCE]
        longest = max(len(one.ids) for one in part)
        batch = collate([[one] for one in part], longest - 1)
        hidden = model(batch.ids, batch.mask)
        graded = batch.targets != IGNORED
        losses = F.cross_entropy(
            model.logits(hidden[graded]), batch.targets[graded], reduction="sum"
        )
        total, count = total + losses.item(), count + int(graded.sum())
        counts = _rows_by_expert(model, batch.ids != PAD_ID)
        loads = counts if start == 0 else loads + counts
    return total / count, loads / loads.sum(dim=1, keepdim=True)


def _rows_by_expert(model: DeepseekV3, real: Tensor) -> Tensor:
    """[L, E] of the last pass, padding left out; the next-token module's gate is not among them."""
    return torch.stack(
        [
            torch.bincount(gate.topk_ids[real.flatten()].flatten(), minlength=len(gate.weight))
            for gate in model.gates()[:-1]
        ]
    ).float()


def _count_accepted(model: DeepseekV3, prompt: list[int], answer: list[int]) -> tuple[int, int]:
    """(accepted, proposed): proposals for the answer's tokens after its first."""
    ids = torch.tensor([prompt + answer])
    hidden = model(ids[:, :-2])
    drafts = model.draft_logits(hidden, ids[:, 1:-1]).argmax(dim=-1)[0]  # of tokens 2, 3, ..
    first = len(prompt) + 1
    proposed, true = drafts[first - 2 :], ids[0, first:]
    return int((proposed == true).sum()), len(true)


def _text(tokenizer: Tokenizer, answer: list[int]) -> str:
    text: str = tokenizer.decode(answer, skip_special_tokens=True)
    return text
