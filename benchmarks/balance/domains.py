"""Rows by expert of the default model: real prompts, real routing, one domain at a time."""

from __future__ import annotations

import queue
from pathlib import Path

import numpy as np

from attention.messages import SamplingParams, Submit, TokenOutput
from balance.imbalance import Rows
from balance.traces import Pool
from cluster.config import parse_config
from cluster.inline import InlineCluster
from cluster.site import expert_space
from default_model.corpus.domains import DOMAINS
from default_model.evaluation import held_out_dialogues, prompt_ids
from default_model.vocabulary import load_tokenizer
from experts.config import ModelConfig
from experts.load import LoadCounter
from experts.placement.space import ExpertSpace

LONGER_THAN_A_RUN_S = 86_400.0
MAX_TOKENS = 256
TIMEOUT_S = 600.0


def pools(folder: Path) -> list[Pool]:
    """The default model as it is placed, in whole groups, and what single experts would give."""
    model = ModelConfig.load(folder)
    groups, k = expert_space(model), model.num_experts_per_tok
    singles = ExpertSpace(groups.moe_layers, groups.num_experts)
    return [
        Pool("default model, 2 workers, whole groups", groups, k, 2),
        Pool("default model, 4 workers, whole groups", groups, k, 4),
        Pool("default model, 4 workers, single experts", singles, k, 4),
    ]


def measure(folder: Path, num_prompts: int, num_windows: int) -> dict[str, list[Rows]]:
    """Windows of rows [L, E] of each domain: its held-out prompts by turns, with the answers.

    So a plan made with one window can be judged on prompts that it has not seen.
    """
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    settings = {
        "model": str(folder),
        "router": {"mode": "inline"},
        "experts": {"num_workers": 1, "rebalance": {"enabled": False}},
        "attention": {"engine": {"enable_prefix_caching": False}},
    }
    found = {}
    with InlineCluster(parse_config(settings)) as cluster:
        for domain in DOMAINS:
            dialogues = held_out_dialogues(domain, num_prompts)
            prompts = [prompt_ids(tokenizer, dialogue.turns[:-1]) for dialogue in dialogues]
            parts = [prompts[number::num_windows] for number in range(num_windows)]
            found[domain] = [_rows(cluster, part) for part in parts]
    return found


def _rows(cluster: InlineCluster, prompts: list[list[int]]) -> Rows:
    """[L, E] of answering these prompts."""
    worker = cluster.experts[0].worker
    old = worker.load_counter.totals()
    layers, num_experts = list(old), len(next(iter(old.values())))
    worker.load_counter = LoadCounter(layers, num_experts, LONGER_THAN_A_RUN_S)
    _answer(cluster, prompts)
    return np.array(list(worker.load_counter.totals().values()), dtype=np.float64)


def _answer(cluster: InlineCluster, prompts: list[list[int]]) -> None:
    """Greedy, to the end of each turn. Raises RuntimeError, queue.Empty."""
    ended: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def on_output(output: TokenOutput) -> None:
        if output.finish_reason is not None:
            ended.put(output.error)

    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    for number, prompt in enumerate(prompts):
        submit = Submit(request_id=f"prompt-{number}", prompt_ids=prompt, params=params)
        cluster.ingress.pool.submit(submit, on_output)
    for _ in prompts:
        if (error := ended.get(timeout=TIMEOUT_S)) is not None:
            raise RuntimeError(f"a prompt failed: {error}")
