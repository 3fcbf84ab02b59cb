"""Section 3: routing of 4096 tokens: gate, plan, rows on their way and the sum of the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gpu_check.accounting import BF16_BYTES, FLOAT32_BYTES, Work
from gpu_check.expert_data import random
from gpu_check.kernel_times import Run, measure
from gpu_check.plan import Context, Unit
from gpu_check.router_data import bias_of, gate_spec, load_of, placement
from gpu_check.rows import Benchmark
from gpu_check.shapes import TINY, V2_LITE, V3, ModelShape
from router.kernels.gpu.ops import RouterOps, router_ops

TOKENS = 4096
SMOKE_TOKENS = 3
PLACES = ((V2_LITE, 1), (V3, 1), (V3, 8))
"""Model and number of workers; V3's groups lie whole on 8."""


def units(context: Context) -> Iterator[Unit]:
    """One for each model and pool."""
    for shape, num_workers in ((TINY, 2),) if context.smoke else PLACES:
        name = f"times of routing, {shape.name}, {num_workers} workers"
        yield Unit(
            name, lambda shape=shape, workers=num_workers: benchmarks(context, shape, workers)
        )


def benchmarks(context: Context, shape: ModelShape, num_workers: int) -> Iterator[Benchmark]:
    """Each step, then all of them in one graph."""
    tokens = SMOKE_TOKENS if context.smoke else TOKENS
    place = f"{shape.name}, {tokens} tokens, {num_workers} workers"
    ours = Routing(context, router_ops("triton"), shape, tokens, num_workers)
    twins = Routing(context, router_ops("torch"), shape, tokens, num_workers)
    for name, run in ours.steps().items():
        work = ours.work[name]
        peers = {"twin": lambda name=name: twins.steps()[name]}
        yield measure(context, name, place, "bfloat16", work, run, peers)
    total = ours.work["gate"].plus(ours.work["dispatch"]).plus(ours.work["combine"])
    name = "gate + dispatch + combine"
    yield measure(context, name, place, "bfloat16", total, ours.all_steps, goal="routing")


class Routing:
    """One batch through the router, step by step, each on what the one before it gave."""

    def __init__(
        self, context: Context, ops: RouterOps, shape: ModelShape, tokens: int, num_workers: int
    ) -> None:
        hidden, experts = shape.hidden_size, shape.n_routed_experts
        self._ops, self._num_workers = ops, num_workers
        self._spec, self._bias = gate_spec(shape), bias_of(context, shape)
        self._x = random(context, 1, tokens, hidden).bfloat16()
        self._gate = random(context, 2, experts, hidden, std=hidden**-0.5).bfloat16()
        self._holders = placement(context, shape, num_workers)
        self._load = load_of(context, num_workers)
        self._chosen = self.gate()
        self._plan = ops.plan_dispatch(*self._chosen[:2], self._holders, self._load, num_workers)
        self._answers = self.dispatch()
        self.work = _work(shape, tokens, num_workers, int(self._plan.row_starts[-1]))

    def gate(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, then the experts."""
        logits = self._ops.gate_logits(self._x, self._gate)
        return self._ops.select_experts(logits, self._bias, self._spec)

    def dispatch(self) -> torch.Tensor:
        """The plan, then the rows in the order in which they are sent."""
        self._plan = self._ops.plan_dispatch(
            *self._chosen[:2], self._holders, self._load, self._num_workers
        )
        return self._ops.pack_rows(self._x, self._plan.row_index)

    def combine(self) -> torch.Tensor:
        """The answers, as long as the rows, to one row a token."""
        return self._ops.combine_rows(self._answers, self._plan.answer_index)

    def all_steps(self) -> None:
        """One after the other."""
        self._chosen = self.gate()
        self.dispatch()
        self.combine()

    def steps(self) -> dict[str, Run]:
        """By name."""
        steps: dict[str, Callable[[], object]] = {
            "gate": self.gate, "dispatch": self.dispatch, "combine": self.combine
        }  # fmt: skip
        return steps


def _work(shape: ModelShape, tokens: int, num_workers: int, num_sent: int) -> dict[str, Work]:
    """num_sent: rows that go to some worker, a row that goes to two counted twice."""
    hidden, experts, top_k = shape.hidden_size, shape.n_routed_experts, shape.num_experts_per_tok
    row = hidden * BF16_BYTES
    chosen = tokens * top_k * (4 + FLOAT32_BYTES)
    logits = tokens * experts * FLOAT32_BYTES
    gate = (tokens + experts) * row + 2 * logits + chosen
    return {
        "gate": Work(gate, 2 * tokens * experts * hidden),
        "dispatch": Work(3 * chosen + (tokens + num_sent) * row, 0),
        "combine": Work(num_sent * row + tokens * (4 * num_workers + 2 * row), 0),
    }
