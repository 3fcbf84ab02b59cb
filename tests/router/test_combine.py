"""Combining: float32, in a fixed order, rows where they belong."""

from __future__ import annotations

import itertools

import torch

from router.combine import sum_by_expert, sum_by_worker


def test_rows_of_workers_are_added_where_they_belong() -> None:
    answers = [
        (torch.tensor([0, 2]), torch.tensor([[1.0, 2], [3, 4]])),
        (None, torch.tensor([[10.0, 10], [20, 20], [30, 30]])),
    ]
    total = sum_by_worker((3, 2), answers)
    assert total.tolist() == [[11, 12], [20, 20], [33, 34]]


def test_a_row_without_answers_is_zero() -> None:
    assert sum_by_worker((2, 1), [(torch.tensor([1]), torch.ones(1, 1))]).tolist() == [[0], [1]]
    assert sum_by_worker((2, 1), []).tolist() == [[0], [0]]


def test_answers_in_bfloat16_are_added_in_float32() -> None:
    """256 + 1 is 256 in bfloat16."""
    answers = [(None, torch.full((1, 1), value, dtype=torch.bfloat16)) for value in (256.0, 1, 1)]
    total = sum_by_worker((1, 1), answers)
    assert total.dtype == torch.float32
    assert total.item() == 258


def test_an_answer_is_not_changed() -> None:
    rows = torch.ones(1, 2)
    sum_by_worker((1, 2), [(None, rows), (None, rows)])
    assert rows.tolist() == [[1, 1]]


def test_pairs_are_added_by_expert_rank_whatever_the_order_of_the_answers() -> None:
    """1e8 + -1e8 + 1 is 1 in this order and 0 in others."""
    rows = {0: 1e8, 1: -1e8, 2: 1.0, 3: 1.0, 4: 1e8, 5: -1e8}
    for order in itertools.permutations(range(6)):
        answers = [(torch.tensor([p]), torch.tensor([[rows[p]]])) for p in order]
        assert sum_by_expert((2, 1), 3, answers).tolist() == [[1.0], [0.0]]


def test_one_answer_may_hold_many_pairs() -> None:
    answers = [
        (torch.tensor([3, 0]), torch.tensor([[4.0], [1.0]])),
        (torch.tensor([1, 2]), torch.tensor([[2.0], [3.0]])),
    ]
    assert sum_by_expert((2, 1), 2, answers).tolist() == [[3.0], [7.0]]
