"""Section 2: the kernels of the experts' tier against their twins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experts.kernels.gpu.grouped_gemm import block_rows_for
from experts.kernels.gpu.ops import ExpertOps, expert_ops
from experts.kernels.gpu.permute import SortedPairs
from gpu_check.accounting import blocks
from gpu_check.compare import EXACT
from gpu_check.expert_data import CODE_STD, Local, Routed, WeightKind, device_weights, random, route
from gpu_check.kernel_checks import Case, alone, case, units_of
from gpu_check.plan import Context, Unit
from gpu_check.shapes import ODD, TINY, V2, V2_LITE, V3, ModelShape

LOCALS = (Local(V2_LITE, 64, 6), Local(V2, 40, 2), Local(V3, 32, 2), Local(ODD, 24, 3))
SMOKE_LOCALS = (Local(TINY, 4, 2),)


class Rows(NamedTuple):
    """How many, and over which share of the experts: the others get none."""

    num: int
    share: float = 1.0

    def __str__(self) -> str:
        experts = "" if self.share == 1.0 else f" to {self.share:.0%} of the experts"
        return f"{self.num} rows{experts}"


ROWS = (Rows(1), Rows(33, 0.25), Rows(64), Rows(4096))
SMOKE_ROWS = (Rows(1), Rows(5, 0.5))


def units(context: Context, kernels: Any = None) -> Iterator[Unit]:
    """kernels: other than the Triton ones, for tests."""
    twins = expert_ops("torch")
    found = cases(context, twins)
    return units_of(found, kernels or expert_ops("triton"), twins, twice=not context.smoke)


def cases(context: Context, twins: ExpertOps) -> Iterator[Case]:
    """`twins` prepare what a kernel gets from the ones before it."""
    for local in SMOKE_LOCALS if context.smoke else LOCALS:
        yield from _row_cases(context, twins, local.shape)
        for rows in SMOKE_ROWS if context.smoke else ROWS:
            yield from _permute_cases(context, local, rows)
            for kind, fp8_rows in _types(context, local):
                yield from _product_cases(context, twins, local, rows, kind, fp8_rows)


def _types(context: Context, local: Local) -> Iterator[tuple[WeightKind, bool]]:
    """(weights, whether the rows are fp8 too)"""
    yield "bfloat16", False
    yield "fp8", False
    if context.has_fp8:
        yield "fp8", True
    if local.shape is ODD:
        yield "float32", False


def _row_cases(context: Context, twins: ExpertOps, shape: ModelShape) -> Iterator[Case]:
    """Kernels that know nothing of experts."""
    hidden, width = shape.hidden_size, shape.moe_intermediate_size
    for count in (1, 7) if context.smoke else (1, 300, 4096):
        place = f"{shape.name}, {count} x"
        for ue8m0 in (False, True):
            yield case(
                "quantise_rows",
                f"{place} {hidden}{' ue8m0' * ue8m0}",
                "fp8",
                lambda ops, n=count, u=ue8m0: ops.quantise_rows(
                    random(context, 1, n, hidden).bfloat16(), ue8m0=u
                ),
                EXACT,
            )
        yield case(
            "silu_mul",
            f"{place} {2 * width}",
            "bfloat16",
            lambda ops, n=count: ops.silu_mul(random(context, 2, n, 2 * width).bfloat16()),
        )
        yield from _linear_cases(context, twins, shape, count)


def _linear_cases(
    context: Context, twins: ExpertOps, shape: ModelShape, count: int
) -> Iterator[Case]:
    """The latent's product: 576 outputs, which no 128 divides."""
    hidden, out = shape.hidden_size, shape.latent_width
    place = f"{shape.name}, {count} x {hidden} to {out}"

    def x(num_rows: int = count) -> Tensor:
        return random(context, 3, count, hidden).bfloat16()[:num_rows]

    def same_bits(ops: ExpertOps, num_rows: int = count) -> Tensor:
        weight = random(context, 4, out, hidden, std=hidden**-0.5).bfloat16()
        return ops.linear(x(num_rows), weight, deterministic=True)

    def fp8(ops: ExpertOps, fp8_matmul: bool) -> Tensor:
        weight, scales = _fp8_weight(context, out, hidden)
        return ops.linear(x(), weight, scales, fp8_matmul=fp8_matmul)

    yield case("linear", f"{place}, deterministic", "bfloat16", same_bits)
    if count > 1:
        yield alone("linear", f"{place}, deterministic", "bfloat16", same_bits, twins)
    yield case("linear", place, "fp8", lambda ops: fp8(ops, False))
    if context.has_fp8:
        yield case("linear", f"{place}, fp8 rows", "fp8", lambda ops: fp8(ops, True))


def _fp8_weight(context: Context, out: int, hidden: int) -> tuple[Tensor, Tensor]:
    """[out, hidden], with its scales."""
    codes = random(context, 4, out, hidden, std=CODE_STD).clamp_(-448, 448)
    grid = (blocks(out), blocks(hidden))
    scales = torch.rand(grid, device=context.device, generator=context.generator(5)).add_(0.5)
    return codes.to(torch.float8_e4m3fn), scales.mul_(hidden**-0.5 / CODE_STD)


def _permute_cases(context: Context, local: Local, rows: Rows) -> Iterator[Case]:
    """Sorting the pairs, and the sum that undoes it."""
    place = f"{local}, {rows}"

    def sort(ops: ExpertOps) -> SortedPairs:
        expert_ids = _routed(context, local, rows).expert_ids
        expert_ids[::5] = -1  # pairs that are dropped, on either side of the range
        expert_ids[3::7] = local.num_experts
        return ops.sort_pairs(expert_ids, local.num_experts, 16)

    def add(ops: ExpertOps) -> Tensor:
        routed = _routed(context, local, rows)
        pair_rows = random(context, 6, routed.num_pairs, local.shape.hidden_size)
        return ops.sum_pairs(pair_rows, routed.row_starts)

    yield case("sort_pairs", place, "int32", sort, EXACT)
    yield case("sum_pairs", place, "float32", add, EXACT)


def _product_cases(
    context: Context,
    twins: ExpertOps,
    local: Local,
    rows: Rows,
    kind: WeightKind,
    fp8_rows: bool,
) -> Iterator[Case]:
    """The grouped products."""
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    place = f"{local}, {rows}{', fp8 rows' * fp8_rows}"

    def operand(values: Tensor) -> tuple[Tensor, Tensor | None]:
        return twins.quantise_rows(values.to(dtype)) if fp8_rows else (values.to(dtype), None)

    def sorted_pairs(routed: Routed) -> SortedPairs:
        block_rows = block_rows_for(routed.num_pairs, local.num_experts, dtype)
        return twins.sort_pairs(routed.expert_ids, local.num_experts, block_rows)

    def gate_up(ops: ExpertOps) -> Tensor:
        routed, weights = _routed(context, local, rows), device_weights(context, local, kind, 7)
        x = operand(random(context, 8, rows.num, local.shape.hidden_size))
        pairs = sorted_pairs(routed)
        return ops.gate_up_silu(*x, weights, routed.slot_of, pairs, routed.row_ids, out_dtype=dtype)

    def down(ops: ExpertOps) -> Tensor:
        routed, weights = _routed(context, local, rows), device_weights(context, local, kind, 7)
        h = operand(random(context, 9, routed.num_pairs, local.shape.moe_intermediate_size))
        pairs = sorted_pairs(routed)
        return ops.down(*h, weights, routed.slot_of, pairs, routed.pair_weights)

    yield case("gate_up_silu", place, kind, gate_up)
    yield case("down", place, kind, down)


def _routed(context: Context, local: Local, rows: Rows) -> Routed:
    num_used = max(local.top_k, int(rows.share * local.num_experts))
    return route(context, local, rows.num, 10, num_used=num_used)
