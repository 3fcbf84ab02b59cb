"""Bringing the rows of the workers back together, in float32 and in an order that is not arrival.

Normal: a worker sends one pre-summed row a token; they are added by worker id. The grouping of the
sum then depends on the placement and so may its last bits.
Deterministic: a worker sends one weighted row a pair; they are added by expert id, so the result
has the same bits under every placement.
"""

from collections.abc import Iterable

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
    total = torch.zeros(shape)
    for row_index, rows in answers:
        if row_index is None:
            total += rows
        else:
            total.index_add_(0, row_index, rows.float())
    return total


def sum_by_expert(
    shape: tuple[int, int], top_k: int, answers: Iterable[tuple[Tensor, Tensor]]
) -> Tensor:
    """answers in any order: (pair_index [N] int64 = row * k + rank by expert id, rows [N, d]).

    Returns [T, d] float32 of `shape`: ((pair 0 + pair 1) + pair 2) + ... for every row. The answers
    must cover all T * k pairs.
    """
    num_tokens, width = shape
    by_pair = torch.empty(num_tokens * top_k, width, dtype=torch.float32)
    for pair_index, rows in answers:
        by_pair.index_copy_(0, pair_index, rows.float())
    by_rank = by_pair.view(num_tokens, top_k, width)
    total = by_rank[:, 0].clone()
    for rank in range(1, top_k):
        total += by_rank[:, rank]
    return total


def renormalise(total: Tensor, weights: Float32s, dropped: Int64s) -> Int64s:
    """Make up for pairs that nobody answered, in place: each row that lacks some is scaled by (sum
    of its k weights) / (sum of those answered), and is zero where none was.

    total [T, d] float32: the sum of the answered pairs; weights [T * k]; dropped: places in them.
    Returns the rows concerned, ascending. The sum is linear in the weights, so scaling it is the
    same as scaling them.
    """
    by_row = weights.reshape(total.shape[0], -1)
    answered = by_row.copy()
    answered.reshape(-1)[dropped] = 0.0
    rows = np.unique(dropped // by_row.shape[1])
    whole, left = by_row[rows].sum(1), answered[rows].sum(1)
    scale = np.divide(whole, left, out=np.zeros_like(left), where=left > 0)
    index = torch.from_numpy(rows)
    total[index] *= torch.from_numpy(scale).unsqueeze(1)
    return rows
