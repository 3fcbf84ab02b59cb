"""Bringing the rows of the workers back together, in float32 and in an order that is not arrival.

Normal: a worker sends one pre-summed row a token; they are added by worker id. The grouping of the
sum then depends on the placement and so may its last bits.
Deterministic: a worker sends one weighted row a pair; they are added by expert id, so the result
has the same bits under every placement.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


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
