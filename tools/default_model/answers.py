"""Greedy answers of a checkpoint folder, by Shoal itself: one process, no Ray."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from attention.messages import SamplingParams, Submit, TokenOutput
from cluster.config import ShoalConfig
from cluster.inline import InlineCluster

MAX_TOKENS = 256
TIMEOUT_S = 600.0


@dataclass(slots=True)
class _Collector:
    """The tokens of one request; `done` is set by its last output."""

    ids: list[int] = field(default_factory=list)
    done: Future[list[int]] = field(default_factory=Future)

    def __call__(self, output: TokenOutput) -> None:
        self.ids += output.token_ids
        if output.error is not None:
            self.done.set_exception(RuntimeError(output.error))
        elif output.finish_reason is not None:
            self.done.set_result(self.ids)


def greedy_answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """The ids that follow each prompt, with the end token where the model ended its turn."""
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    collectors = [_Collector() for _ in prompts]
    with InlineCluster(ShoalConfig(model=folder)) as cluster:
        for number, (prompt, collector) in enumerate(zip(prompts, collectors, strict=True)):
            submit = Submit(request_id=str(number), prompt_ids=prompt, params=params)
            cluster.ingress.pool.submit(submit, collector)
        return [collector.done.result(TIMEOUT_S) for collector in collectors]
