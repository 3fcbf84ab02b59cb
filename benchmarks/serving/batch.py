"""transformers' generate, the reference engine: batches, not requests that come and go."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from serving.plan import Scenario
from serving.session import Spec
from serving.summary import RequestRecord


class _Clock(BaseStreamer):
    """Notes when each step of a batch ends."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """[batch, prompt] ids once, then [batch] new ids a step."""
        self.times_s.append(time.perf_counter())

    def end(self) -> None:
        pass


class TransformersSystem:
    """Weights in one dtype; each wave of concurrent requests is one batch."""

    def __init__(self, spec: Spec) -> None:
        dtype = getattr(torch, spec.system.rpartition("-")[2])
        self._model: Any = AutoModelForCausalLM.from_pretrained(spec.checkpoint, dtype=dtype)
        self._model.generation_config.eos_token_id = None  # always as many tokens as asked for

    def run(self, scenario: Scenario, seed: int) -> list[RequestRecord]:
        """Do a whole scenario, wave after wave."""
        prompts = scenario.prompts(seed)
        records: list[RequestRecord] = []
        for begin in range(0, len(prompts), scenario.concurrency):
            wave = prompts[begin : begin + scenario.concurrency]
            records += self._generate(wave, scenario.new_tokens)
        return records

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> list[RequestRecord]:
        ids = torch.tensor(prompts)
        clock, due_s = _Clock(), time.perf_counter()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
        return [RequestRecord(due_s, clock.times_s[1:]) for _ in prompts]

    def close(self) -> None:
        """Nothing runs besides this process."""
