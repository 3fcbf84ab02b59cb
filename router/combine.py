"""Bringing the rows of the workers back together, in float32 and in an order that is not arrival.

Normal: a worker sends one pre-summed row a token; they are added by worker id. The grouping of the
sum then depends on the placement and so may its last bits.
Deterministic: a worker sends one weighted row a pair; they are added by expert id, so the result
has the same bits under every placement.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from router.dispatch import Float32s, Int64s


def sum_by_worker(
    shape: tuple[int, int], answers: Iterable[tuple[Tensor | None, Tensor]]
) -> Tensor:
    """answers by ascending worker id: (row_index [R] int64, None = every row; rows [R, d]).

    Returns [T, d] float32 of `shape`, zero for a row that no answer names.
    """
    total: Tensor | None = None
    for row_index, rows in answers:
        if total is None and row_index is None:
            total = rows.clone() if rows.dtype is torch.float32 else rows.float()
            continue
        total = torch.zeros(shape) if total is None else total
        if row_index is None:
            total += rows
        else:
            total.index_add_(0, row_index, rows.float())
    return torch.zeros(shape) if total is None else total


def sum_by_expert(
    shape: tuple[int, int], top_k: int, answers: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """answers in any order: (pair_index [N] int64 = row * k + rank by expert id, rows [N, d]).

    Returns [T, d] float32 of `shape`: ((pair 0 + pair 1) + pair 2) + ... for every row; a pair that
    no answer names is zero.
    """
    num_tokens, width = shape
    complete = sum(len(index) for index, _ in answers) == num_tokens * top_k
    by_pair = (torch.empty if complete else torch.zeros)(num_tokens * top_k, width)
    for pair_index, rows in answers:
        by_pair.index_copy_(0, pair_index, rows.float())
    by_rank = by_pair.view(num_tokens, top_k, width)
    total = by_rank[:, 0].clone()
    for rank in range(1, top_k):
        total += by_rank[:, rank]
    return total


def renormalise(num_rows: int, weights: Float32s, dropped: Int64s) -> tuple[Int64s, Float32s]:
    """Make up for pairs that nobody answered: each row that lacks some is to be scaled by (sum of
    its k weights) / (sum of those answered), and is zero where none was.

    weights [T * k]; dropped: places in them. Returns the rows concerned, ascending, and by what to
    multiply their sums of the answered pairs: these are linear in the weights, so scaling them is
    the same as scaling the weights.
    """
    by_row = weights.reshape(num_rows, -1)
    answered = by_row.copy()
    answered.reshape(-1)[dropped] = 0.0
    rows = np.unique(dropped // by_row.shape[1])
    whole, left = by_row[rows].sum(1), answered[rows].sum(1)
    return rows, np.divide(whole, left, out=np.zeros_like(left), where=left > 0)
