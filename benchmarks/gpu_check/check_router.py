"""Section 2: the kernels of the router against their twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_check.compare import EXACT
from gpu_check.expert_data import random
from gpu_check.kernel_checks import Case, alone, case, units_of
from gpu_check.plan import Context, Unit
from gpu_check.router_data import (
    bias_of,
    chosen,
    gate_spec,
    load_of,
    logits_of,
    noise_like,
    placement,
)
from gpu_check.shapes import MODELS, ODD, TINY, ModelShape
from router.kernels.gpu.dispatch import DispatchPlan
from router.kernels.gpu.ops import RouterOps, router_ops

NUM_WORKERS, SMOKE_WORKERS = (1, 8), (2,)


def units(context: Context, kernels: Any = None) -> Iterator[Unit]:
    """kernels: other than the Triton ones, for tests."""
    twins = router_ops("torch")
    found = cases(context, twins)
    return units_of(found, kernels or router_ops("triton"), twins, twice=not context.smoke)


def cases(context: Context, twins: RouterOps) -> Iterator[Case]:
    """`twins` tell which rows are too close to a tie to be compared."""
    for shape in (TINY,) if context.smoke else (*MODELS, ODD):
        for rows in (1, 5) if context.smoke else (1, 64, 4096):
            place = f"{shape.name}, {rows} rows"
            yield from _gate_cases(context, twins, shape, rows, place)
            yield from _selection_cases(context, twins, shape, rows, place)
            for num_workers in SMOKE_WORKERS if context.smoke else NUM_WORKERS:
                yield from _exchange_cases(context, shape, rows, num_workers, place)


def _gate_cases(
    context: Context, twins: RouterOps, shape: ModelShape, rows: int, place: str
) -> Iterator[Case]:
    hidden, experts = shape.hidden_size, shape.n_routed_experts

    def logits(ops: RouterOps, count: int = rows) -> Tensor:
        x = random(context, 1, rows, hidden).bfloat16()[:count]
        return ops.gate_logits(x, random(context, 2, experts, hidden, std=hidden**-0.5).bfloat16())

    yield case("gate_logits", place, "bfloat16", logits, 2e-5)
    if rows > 1:
        yield alone("gate_logits", place, "bfloat16", logits, twins)


def _selection_cases(
    context: Context, twins: RouterOps, shape: ModelShape, rows: int, place: str
) -> Iterator[Case]:
    spec = gate_spec(shape)

    def select(ops: RouterOps) -> tuple[Tensor, ...]:
        logits, bias = logits_of(context, shape, rows, ties=False), bias_of(context, shape)
        ids, weights, bad_row = ops.select_experts(logits, bias, spec)
        noise = noise_like(context, logits)
        above, below = (twins.select_experts(logits + n, bias, spec)[0] for n in (noise, -noise))
        clear = (above == below).all(dim=1)
        return ids[clear], weights[clear], bad_row

    def select_ties(ops: RouterOps) -> tuple[Tensor, ...]:
        return ops.select_experts(logits_of(context, shape, rows, ties=True), None, spec)

    def select_bad(ops: RouterOps) -> tuple[Tensor, ...]:
        logits = logits_of(context, shape, rows, ties=True)
        logits[rows // 2 :, 1] = torch.nan
        return ops.select_experts(logits, None, spec)

    yield case("select_experts", place, "float32", select)
    yield case("select_experts", f"{place}, ties", "float32", select_ties)
    yield case("select_experts", f"{place}, half of them NaN", "float32", select_bad)


def _exchange_cases(
    context: Context, shape: ModelShape, rows: int, num_workers: int, place: str
) -> Iterator[Case]:
    """Which worker gets which row, the rows on their way, and the sum of the answers."""
    place, hidden = f"{place}, {num_workers} workers", shape.hidden_size
    fan_out = min(shape.num_experts_per_tok, num_workers)

    def dispatch(ops: RouterOps) -> DispatchPlan:
        ids, weights = chosen(context, shape, rows)
        ids[rows // 3] = -1  # a padding row
        holders = placement(context, shape, num_workers)
        return ops.plan_dispatch(ids, weights, holders, load_of(context, num_workers), num_workers)

    def index(*size: int) -> Tensor:
        generator = context.generator(25)
        return torch.randint(-1, rows, size, device=context.device, generator=generator).int()

    def pack(ops: RouterOps) -> Tensor:
        return ops.pack_rows(random(context, 3, rows, hidden).bfloat16(), index(rows * fan_out))

    def pack_fp8(ops: RouterOps) -> tuple[Tensor, Tensor]:
        x = random(context, 3, rows, hidden).bfloat16()
        return ops.pack_rows_fp8(x, index(rows * fan_out))

    def combine(ops: RouterOps) -> Tensor:
        return ops.combine_rows(
            random(context, 4, rows, hidden).bfloat16(), index(rows, num_workers)
        )

    yield case("plan_dispatch", place, "int32", dispatch, EXACT)
    yield case("pack_rows", place, "bfloat16", pack, EXACT)
    yield case("pack_rows_fp8", place, "fp8", pack_fp8, EXACT)
    yield case("combine_rows", place, "bfloat16", combine, EXACT)
