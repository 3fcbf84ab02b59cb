"""A model over in-process experts, and ways to drive it: by tokens, or through an engine."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention.build import build_engine
from attention.config import AttentionConfig
from attention.engine import Engine
from attention.messages import SamplingParams, Submit, TokenOutput
from attention.model import Decoder, DecoderModel
from attention.request import Request
from attention.runner import build_batch
from attention.scheduler import ScheduledRequest
from attention.weights import load_weights
from experts.checkpoint import Checkpoint
from experts.device import ComputeDevice
from router.client import MoeClient
from tests.router.pool import Pool, spread

BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True)


class Rig:
    """One checkpoint with its experts in this process."""

    def __init__(self, folder: Path, num_workers: int = 1):
        self.folder = folder
        self.checkpoint = Checkpoint.open(folder)
        self.config = self.checkpoint.config
        self.pool = Pool(self.checkpoint, spread(self.checkpoint, num_workers))

    def close(self) -> None:
        self.pool.close()

    def model(self, num_blocks: int = 128, deterministic: bool = False) -> DecoderModel:
        cache = torch.zeros(
            self.config.num_hidden_layers, num_blocks, BLOCK_SIZE, self.config.latent_width
        )
        return DecoderModel(
            self.config,
            load_weights(self.checkpoint),
            self.pool.router(deterministic=deterministic),
            cache,
            max_model_len=num_blocks * BLOCK_SIZE,
            deterministic=deterministic,
        )

    def engine(
        self, device: ComputeDevice | None = None, moe: MoeClient | None = None, **settings: Any
    ) -> Engine:
        """moe: the router of this pool if not given."""
        defaults = {"num_kv_blocks": 64, "block_size": BLOCK_SIZE, "max_num_seqs": 8}
        config = AttentionConfig(**(defaults | settings))
        moe = moe or self.pool.router(deterministic=config.deterministic)
        return build_engine(self.checkpoint, moe, config, device)


class Sequences:
    """Sequences of one model's cache that are fed chunk by chunk; no engine, no sampling."""

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]]):
        self.model = model
        self.requests, next_block = [], 0
        for index, ids in enumerate(prompts):
            request = Request.create(Submit(request_id=f"s{index}", prompt_ids=list(ids)), 10**6)
            num_blocks = -(-len(ids) // BLOCK_SIZE)
            # scattered: neighbours in a sequence are not neighbours in the cache
            request.block_ids = array("i", range(next_block, next_block + num_blocks))[::-1]
            next_block += num_blocks
            self.requests.append(request)
        self.logits: list[list[Tensor]] = [[] for _ in prompts]

    def step(self, chunks: dict[int, int], naive: Iterable[int] = ()) -> None:
        """Compute chunks[i] tokens of sequence i, in the naive form for i in `naive`."""
        items = {i: ScheduledRequest(self.requests[i], size) for i, size in chunks.items()}
        order = [i for i in chunks if i not in naive] + [i for i in chunks if i in naive]
        absorbed = [items[i] for i in order if i not in naive]
        batch = build_batch(absorbed, [items[i] for i in order if i in naive], BLOCK_SIZE)
        logits = self.model.logits(self.model.forward(batch))
        for i, rows in zip(order, logits.split([chunks[i] for i in order]), strict=True):
            self.logits[i].append(rows)
            self.requests[i].num_computed_tokens += chunks[i]

    def run(self, chunk: int, naive: bool) -> list[Tensor]:
        """All sequences in lock step, `chunk` tokens each at a time; logits [T, V] of each."""
        while open_ := [i for i, r in enumerate(self.requests) if r.remaining_tokens]:
            sizes = {i: min(chunk, self.requests[i].remaining_tokens) for i in open_}
            self.step(sizes, naive=open_ if naive else ())
        return [torch.cat(rows) for rows in self.logits]


def submit(
    name: str, prompt_ids: Sequence[int], params: SamplingParams = GREEDY, **more: Any
) -> Submit:
    return Submit(request_id=name, prompt_ids=list(prompt_ids), params=params, **more)


class Answers:
    """Runs an engine and collects what it says, by request id."""

    def __init__(self, engine: Engine, submits: Iterable[Submit] = ()):
        self.engine = engine
        self.outputs: dict[str, list[TokenOutput]] = {}
        for request in submits:
            engine.add(request)

    def step(self) -> list[TokenOutput]:
        outputs = self.engine.step()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        return outputs

    def run(self) -> Answers:
        while self.engine.has_work:
            self.step()
        return self

    def tokens(self, name: str) -> list[int]:
        return [token for output in self.outputs.get(name, []) for token in output.token_ids]

    def all_tokens(self) -> dict[str, list[int]]:
        return {name: self.tokens(name) for name in self.outputs}

    def last(self, name: str) -> TokenOutput:
        return self.outputs[name][-1]


class FakeClock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Flaky:
    """A runner that fails on chosen steps, the first is 1."""

    def __init__(self, runner: Any, errors: dict[int, Exception]):
        self.runner, self.errors, self.steps = runner, errors, 0
        self.waits: list[float | None] = []

    def run(self, schedule: Any, wait_until_s: float | None = None) -> Any:
        self.steps += 1
        self.waits.append(wait_until_s)
        if error := self.errors.get(self.steps):
            raise error
        return self.runner.run(schedule)
