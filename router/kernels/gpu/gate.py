"""The gate on a GPU: router logits, then the experts of each row with their weights.

    logits = float32(x) float32(Wg)^T                   products of bfloat16 are exact in float32
    select_experts: the formulas of router/gate.py

Sources: (1) DeepSeek-V2 report section 2.2.2; (2) DeepSeek-V3 report section 2.1.2; (3) the
inference code published with it.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from router import gate as host_gate
from router.gate import GateSpec

_SPLIT: Final = 512
"""Columns that are summed together; the sums of the splits are added in order."""
PARALLEL_ROWS: Final = 512
"""Up to so many rows the splits are programs of their own: few rows are few programs, and V3's
14 splits of 7168 columns write 7 MB at most. Not measured on a GPU."""
_INTERPRETED: Final = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter would multiply the bits of bfloat16 as integers."""


@triton.jit(do_not_specialize=["num_rows"])  # one compilation for every batch
def _logits_kernel(
    x, weight, out, num_rows, num_experts, width, num_splits, x_stride,
    SPLITS_EACH: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_K)
    x_rows = x + rows[:, None].to(tl.int64) * x_stride
    weight_rows = weight + experts[:, None] * width
    total = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    first = tl.program_id(2) * SPLITS_EACH
    for split in range(first, tl.minimum(first + SPLITS_EACH, num_splits)):
        part = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for start in range(split * SPLIT, (split + 1) * SPLIT, BLOCK_K):
            column = start + columns[None, :]
            inside = column < width
            a = tl.load(x_rows + column, (rows[:, None] < num_rows) & inside, other=0.0)
            b = tl.load(weight_rows + column, (experts[:, None] < num_experts) & inside, other=0.0)
            if a.dtype != b.dtype or _INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            part = tl.dot(a, b.T, part, input_precision="ieee")
        total += part
    at = (tl.program_id(2).to(tl.int64) * num_rows + rows[:, None]) * num_experts + experts[None, :]
    tl.store(out + at, total, (rows[:, None] < num_rows) & (experts[None, :] < num_experts))


@triton.jit
def _sum_splits_kernel(parts, out, size, num_splits, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        total += tl.load(parts + split * size + at, at < size, other=0.0)
    tl.store(out + at, total, at < size)


@triton.jit
def _select_kernel(
    logits, bias, topk_ids, topk_weights, bad_row, num_experts, scale,
    TOP_K: tl.constexpr, NUM_GROUPS: tl.constexpr, KEEP_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
    SOFTMAX: tl.constexpr, TOP2: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    groups = tl.arange(0, GROUPS)
    member = tl.arange(0, MEMBERS)[None, :]
    size = num_experts // NUM_GROUPS
    expert = groups[:, None] * size + member  # [GROUPS, MEMBERS], ascending where it is real
    real = (groups[:, None] < NUM_GROUPS) & (member < size)
    logit = tl.load(logits + row.to(tl.int64) * num_experts + expert, real, other=0.0)
    is_finite = tl.min((tl.abs(logit) < float("inf")).to(tl.int32)) == 1  # false for a NaN too
    tl.atomic_min(bad_row, row, mask=is_finite == 0)
    logit = tl.where(is_finite, logit, 0.0)
    if SOFTMAX:
        power = tl.where(real, tl.exp(logit - tl.max(tl.where(real, logit, float("-inf")))), 0.0)
        score = power / tl.sum(power)
    else:
        score = 1.0 / (1.0 + tl.exp(-logit))
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + expert, real, other=0.0)
    # -inf is for what may not be chosen, so that ids stay valid whatever the bias is.
    choice = tl.where(real, tl.maximum(choice, -3e38), float("-inf"))
    if KEEP_GROUPS < NUM_GROUPS:
        group_score = tl.max(choice, axis=1)
        if TOP2:
            best = tl.argmax(choice, axis=1)[:, None]
            group_score += tl.max(tl.where(member == best, float("-inf"), choice), axis=1)
        mine, other = group_score[:, None], group_score[None, :]
        is_before = groups[None, :] < groups[:, None]
        better = (other > mine) | ((other == mine) & is_before)
        place = tl.sum(better.to(tl.int32), axis=1)  # [GROUPS]
        choice = tl.where(place[:, None] < KEEP_GROUPS, choice, float("-inf"))
    choice = tl.reshape(choice, (GROUPS * MEMBERS,))
    cells = tl.arange(0, GROUPS * MEMBERS)
    is_chosen = cells < 0
    for _ in range(TOP_K):
        is_best = cells == tl.argmax(choice, axis=0)  # the lowest in ties
        is_chosen = is_chosen | is_best
        choice = tl.where(is_best, float("-inf"), choice)
    expert = tl.reshape(expert, (GROUPS * MEMBERS,))
    chosen_score = tl.where(is_chosen, tl.reshape(score, (GROUPS * MEMBERS,)), 0.0)
    if NORMALISE:
        chosen_score = chosen_score / (tl.sum(chosen_score) + 1e-20)
    at = row * TOP_K + tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(topk_ids + at, expert, is_chosen)
    tl.store(topk_weights + at, chosen_score * scale, is_chosen)


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, d], weight [E, d], bfloat16 or float32 each -> logits [T, E] float32.

    A row's bits depend on the row alone: tiles and splits are the same for every T.
    """
    _check_product(x, weight)
    num_rows, width = x.shape
    num_experts = weight.shape[0]
    num_splits = triton.cdiv(width, _SPLIT)
    tile_rows, tile_experts, depth = _tile(x, weight)
    is_parallel = num_rows <= PARALLEL_ROWS and num_splits > 1
    programs, each = (num_splits, 1) if is_parallel else (1, num_splits)
    logits = torch.empty(num_rows, num_experts, dtype=torch.float32, device=x.device)
    if not num_rows:
        return logits
    parts = logits
    if is_parallel:
        shape = (programs, num_rows, num_experts)
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_rows, tile_rows), triton.cdiv(num_experts, tile_experts), programs)
    _logits_kernel[grid](
        x, weight, parts, num_rows, num_experts, width, num_splits, x.stride(0), each, _SPLIT,
        tile_rows, tile_experts, depth, num_warps=4, num_stages=4,
    )  # fmt: skip
    if is_parallel:
        _sum_splits_kernel[(triton.cdiv(logits.numel(), 512),)](
            parts, logits, logits.numel(), num_splits, 512, num_warps=4
        )
    return logits


def _tile(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Rows, experts and columns a step. Not measured on a GPU."""
    if x.dtype == weight.dtype == torch.bfloat16:
        return 64, 64, 64  # 4 warps are a warpgroup, one product on Hopper; 4 stages of 16 KiB
    return 16, 32, 32  # without matrix instructions larger tiles spill registers


def gate_logits_torch(x: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch twin of `gate_logits`: one product a row, whatever the batch."""
    _check_product(x, weight)
    by_row = x.float().unsqueeze(1)  # [T, 1, d]
    return torch.bmm(by_row, weight.float().T.expand(x.shape[0], -1, -1)).squeeze(1)


def select_experts(
    logits: Tensor, bias: Tensor | None, spec: GateSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [T, E] float32, bias [E] float32 (it only chooses) -> the k experts of each row.

    Returns topk_ids [T, k] int32, ascending in each row, topk_weights [T, k] float32, and bad_row
    [1] int32: the first row whose logits are not all finite, T if there is none. Such a row is
    answered as if its logits were zero, so that nothing after it reads a wild index.
    """
    _check_logits(logits, bias, spec)
    num_rows, num_experts = logits.shape
    topk_ids = torch.empty(num_rows, spec.top_k, dtype=torch.int32, device=logits.device)
    topk_weights = torch.empty(num_rows, spec.top_k, dtype=torch.float32, device=logits.device)
    bad_row = torch.full((1,), num_rows, dtype=torch.int32, device=logits.device)
    size = num_experts // spec.n_group
    if num_rows:
        # A warp a row: 384 experts are 16 values a lane, and no step leaves the warp.
        _select_kernel[(num_rows,)](
            logits,
            logits if bias is None else bias,
            topk_ids,
            topk_weights,
            bad_row,
            num_experts,
            spec.routed_scaling_factor,
            TOP_K=spec.top_k,
            NUM_GROUPS=spec.n_group,
            KEEP_GROUPS=spec.topk_group,
            GROUPS=triton.next_power_of_2(spec.n_group),
            MEMBERS=triton.next_power_of_2(size),
            SOFTMAX=spec.scoring == "softmax",
            TOP2=spec.group_score == "top2_sum" and size > 1,
            NORMALISE=spec.norm_topk_prob,
            HAS_BIAS=bias is not None,
            num_warps=1,
        )
    return topk_ids, topk_weights, bad_row


def select_experts_torch(
    logits: Tensor, bias: Tensor | None, spec: GateSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin of `select_experts`."""
    _check_logits(logits, bias, spec)
    if not logits.shape[0]:
        none = logits.new_empty(0, spec.top_k)
        return none.int(), none, logits.new_zeros(1).int()
    finite = logits.isfinite().all(dim=1)  # [T]
    logits = logits.masked_fill(~finite.unsqueeze(1), 0.0)
    topk_ids, topk_weights = host_gate.select_experts_torch(logits, bias, spec)
    bad_row = finite.int().cumprod(0).sum(0, keepdim=True)
    return topk_ids.int(), topk_weights, bad_row.int()


def _check_product(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit")
    if not {x.dtype, weight.dtype} <= {torch.bfloat16, torch.float32}:
        raise ValueError(f"x and weight are bfloat16 or float32, got {x.dtype}, {weight.dtype}")
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("rows of x and the weight must be contiguous")


def _check_logits(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> None:
    if logits.ndim != 2 or logits.shape[1] != spec.num_experts or not logits.is_contiguous():
        raise ValueError(f"logits [T, {spec.num_experts}] must be contiguous rows, "
                         f"got {tuple(logits.shape)}")  # fmt: skip
    if logits.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
        raise ValueError("logits and bias must be float32")
