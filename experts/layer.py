"""Gated MLPs: the routed experts of a layer over the slots that hold them, and the dense form.

An expert is down(silu(gate(x)) * up(x)) (facts of the model: dense FFN, shared experts and routed
experts are the same function). A *slot* is a place in a worker where one expert's weights lie; a
*pair* is (row of x, slot, weight), one for each expert that a token was routed to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.linear import Weight, linear, linear_torch


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """gate [f, d], up [f, d], down [d, f]. Raises ValueError when the shapes do not fit."""

    gate: Weight
    up: Weight
    down: Weight

    def __post_init__(self) -> None:
        if self.up.shape != self.gate.shape or self.down.shape != self.gate.shape[::-1]:
            raise ValueError(
                f"gate {self.gate.shape}, up {self.up.shape}, down {self.down.shape} do not fit"
            )

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[1]

    @property
    def kind(self) -> tuple[tuple[int, int], torch.dtype]:
        """What must be the same for all experts of a layer: (f, d) and dtype."""
        return self.gate.shape, self.gate.data.dtype

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes


class SlotWeights:
    """The experts that a worker holds for one layer (or for all), by slot.

    Weights stay where the checkpoint mapped them: nothing is stacked or copied. All experts have
    the same shapes and dtype. Filling a slot while another thread computes over other slots is
    safe; emptying or replacing a slot that a running call uses is for the caller to prevent.
    """

    def __init__(self, num_slots: int) -> None:
        self._slots: list[ExpertWeights | None] = [None] * num_slots

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    def fill(self, slot: int, expert: ExpertWeights) -> None:
        """Put an expert in a slot. Raises ValueError when its shapes differ from the others'."""
        held = next((e for e in self._slots if e is not None), None)
        if held is not None and held.gate.shape != expert.gate.shape:
            raise ValueError(f"slot {slot}: shape {expert.gate.shape}, others {held.gate.shape}")
        if held is not None and held.gate.data.dtype != expert.gate.data.dtype:
            raise ValueError(
                f"slot {slot}: {expert.gate.data.dtype}, others {held.gate.data.dtype}"
            )
        self._slots[slot] = expert

    def clear(self, slot: int) -> None:
        """Empty a slot and drop the reference to its weights."""
        self._slots[slot] = None

    def expert(self, slot: int) -> ExpertWeights:
        """Raises ValueError when the slot does not exist or is empty."""
        expert = self._slots[slot] if 0 <= slot < self.num_slots else None
        if expert is None:
            raise ValueError(f"slot {slot} of {self.num_slots} holds no expert")
        return expert


def swiglu(x: Tensor, expert: ExpertWeights, *, deterministic: bool = False) -> Tensor:
    """The dense FFN and the shared experts: x [T, d] float32 -> [T, d] float32."""
    gate = linear(x, expert.gate, deterministic=deterministic)
    up = linear(x, expert.up, deterministic=deterministic)
    return linear(silu(gate).mul_(up), expert.down, deterministic=deterministic)


def grouped_swiglu(
    x: Tensor,
    slots: SlotWeights,
    row_ids: Tensor,
    slot_ids: Tensor,
    pair_weights: Tensor,
    *,
    per_pair: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """The routed experts of one layer over the slots held here.

    x [T, d] float32; row_ids [P] int32 < T; slot_ids [P] int32; pair_weights [P] float32.
    Returns [T, d] float32: row t is the sum of weight * expert(x[t]) over the pairs of row t, added
    in float32 in the order in which the pairs are given (give a row's pairs by ascending expert id
    and the sum does not depend on the placement); zero for a row without pairs. With `per_pair`
    the weighted rows [P, d] are returned unsummed. Touches only the slots named in slot_ids.
    Raises ValueError for shapes or dtypes that do not fit, ids out of range and empty slots.
    """
    _check_pairs(x, row_ids, slot_ids, pair_weights)
    return grouped_swiglu_torch(
        x, slots, row_ids, slot_ids, pair_weights, per_pair=per_pair, deterministic=deterministic
    )


def _check_pairs(x: Tensor, row_ids: Tensor, slot_ids: Tensor, pair_weights: Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 2:
        raise ValueError(f"x must be [T, d] float32, got {tuple(x.shape)} {x.dtype}")
    if row_ids.dtype != torch.int32 or slot_ids.dtype != torch.int32:
        raise ValueError(f"ids must be int32, got {row_ids.dtype} and {slot_ids.dtype}")
    if pair_weights.dtype != torch.float32:
        raise ValueError(f"pair_weights must be float32, got {pair_weights.dtype}")
    if not row_ids.shape == slot_ids.shape == pair_weights.shape or row_ids.ndim != 1:
        raise ValueError("row_ids, slot_ids and pair_weights must be [P]")
    if row_ids.numel() and not 0 <= int(row_ids.min()) <= int(row_ids.max()) < x.shape[0]:
        raise ValueError(f"row_ids must lie in 0..{x.shape[0] - 1}")


def grouped_swiglu_torch(
    x: Tensor,
    slots: SlotWeights,
    row_ids: Tensor,
    slot_ids: Tensor,
    pair_weights: Tensor,
    *,
    per_pair: bool = False,
    deterministic: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `grouped_swiglu`."""
    pair_rows = torch.empty(row_ids.shape[0], x.shape[1])
    for slot in slot_ids.unique().tolist():
        pairs = (slot_ids == slot).nonzero().squeeze(1)
        expert, rows = slots.expert(slot), x[row_ids[pairs]]
        gate = linear_torch(rows, expert.gate, deterministic=deterministic)
        up = linear_torch(rows, expert.up, deterministic=deterministic)
        down = linear_torch(silu(gate).mul_(up), expert.down, deterministic=deterministic)
        pair_rows[pairs] = down * pair_weights[pairs, None]
    return pair_rows if per_pair else sum_pairs(pair_rows, row_ids, x.shape[0])


def sum_pairs(pair_rows: Tensor, row_ids: Tensor, num_rows: int) -> Tensor:
    """pair_rows [P, d] float32, row_ids [P] -> [num_rows, d], added in the order of the pairs."""
    out = torch.zeros(num_rows, pair_rows.shape[1])
    # index_add_ promises no order; one addition per rank of a pair within its row does.
    pending = torch.arange(row_ids.shape[0])
    while pending.numel():
        rows = row_ids[pending].long()
        first = torch.full((num_rows,), row_ids.shape[0]).scatter_reduce_(0, rows, pending, "amin")
        leads = first[rows] == pending
        out[rows[leads]] += pair_rows[pending[leads]]
        pending = pending[~leads]
    return out
