"""Gated MLPs: the routed experts of a layer over the slots that hold them, and the dense form.

An expert is down(silu(gate(x)) * up(x)) (facts of the model: dense FFN, shared experts and routed
experts are the same function). A *slot* is a place in a worker where one expert's weights lie; a
*pair* is (row of x, slot, weight), one for each expert that a token was routed to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.runtime import Kernels, kernels
from experts.linear import SUPPORTED_DTYPES, Operand, Weight, linear_torch


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
    def operands(self) -> tuple[Operand, Operand, Operand] | None:
        """gate, up and down for kernels; None when these cannot take one of them."""
        gate, up, down = self.gate.operand, self.up.operand, self.down.operand
        return None if gate is None or up is None or down is None else (gate, up, down)

    @cached_property
    def table(self) -> SlotTable | None:
        """This expert alone, as a table of one slot."""
        if (operands := self.operands) is None:
            return None
        table = SlotTable(1, self)
        table.fill(0, operands)
        return table

    @property
    def kind(self) -> tuple[tuple[int, int], torch.dtype]:
        """What must be the same for all experts of a layer: (f, d) and dtype."""
        return self.gate.shape, self.gate.data.dtype

    @property
    def num_bytes(self) -> int:
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes


class SlotTable:
    """Addresses of the weights in each slot, as compiled kernels read them (drivers.py)."""

    def __init__(self, num_slots: int, like: ExpertWeights) -> None:
        self.kind = SUPPORTED_DTYPES.index(like.gate.data.dtype)
        self.width, self.hidden_size = like.gate.shape
        self.num_slots = num_slots
        self._rows = np.zeros((num_slots, 6), np.int64)  # gate, up, down, their scales; 0: empty
        self.address: int = self._rows.ctypes.data

    def fill(self, slot: int, operands: tuple[Operand, Operand, Operand]) -> None:
        self._rows[slot] = [o.data for o in operands] + [o.scales for o in operands]

    def clear(self, slot: int) -> None:
        self._rows[slot] = 0


class SlotWeights:
    """The experts that a worker holds, by slot.

    Weights stay where the checkpoint mapped them: nothing is stacked or copied. All experts have
    the same shapes and dtype. Filling a slot while another thread computes over other slots is
    safe; emptying or replacing a slot that a running call uses is for the caller to prevent.
    """

    def __init__(self, num_slots: int) -> None:
        self._slots: list[ExpertWeights | None] = [None] * num_slots
        self._table: SlotTable | None = None
        self._not_compiled: set[int] = set()  # slots that the kernels cannot take

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def table(self) -> SlotTable | None:
        """What kernels read; None as long as no slot was filled or one is not for kernels."""
        return None if self._not_compiled else self._table

    def fill(self, slot: int, expert: ExpertWeights) -> None:
        """Put an expert in a slot. Raises ValueError when its shapes differ from the others'."""
        held = next((e for e in self._slots if e is not None), None)
        if held is not None and held.kind != expert.kind:
            raise ValueError(f"slot {slot}: {expert.kind}, the others hold {held.kind}")
        if self._table is None or held is None:
            self._table = SlotTable(self.num_slots, expert)
        operands = expert.operands
        if operands is None:
            self._not_compiled.add(slot)
        else:
            self._table.fill(slot, operands)
        self._slots[slot] = expert

    def clear(self, slot: int) -> None:
        """Empty a slot and drop the reference to its weights."""
        if self._table is not None:
            self._table.clear(slot)
        self._not_compiled.discard(slot)
        self._slots[slot] = None

    def expert(self, slot: int) -> ExpertWeights:
        """Raises ValueError when the slot does not exist or is empty."""
        expert = self._slots[slot] if 0 <= slot < self.num_slots else None
        if expert is None:
            raise ValueError(f"slot {slot} of {self.num_slots} holds no expert")
        return expert


_pack_arguments = struct.Struct("15q").pack


def swiglu(x: Tensor, expert: ExpertWeights, *, deterministic: bool = False) -> Tensor:
    """The dense FFN and the shared experts: x [T, d] float32 -> [T, d] float32.

    deterministic: as in `linear`. Raises ValueError for another dtype or width.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != expert.hidden_size:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit width {expert.hidden_size}")
    chosen, table = kernels(), expert.table
    if chosen.compiled and table is not None:
        return _run_dense(chosen, x, table)
    return swiglu_torch(x, expert, deterministic=deterministic)


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
    deterministic: as in `linear`.
    Raises ValueError for shapes or dtypes that do not fit, ids out of range and empty slots.
    """
    _check_pairs(x, row_ids, slot_ids, pair_weights)
    chosen, table = kernels(), slots.table
    if chosen.compiled and table is not None:
        return _run_experts(chosen, x, table, row_ids, slot_ids, pair_weights, per_pair=per_pair)
    return grouped_swiglu_torch(
        x, slots, row_ids, slot_ids, pair_weights, per_pair=per_pair, deterministic=deterministic
    )


def swiglu_torch(x: Tensor, expert: ExpertWeights, *, deterministic: bool = False) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `swiglu`."""
    gate = linear_torch(x, expert.gate, deterministic=deterministic)
    up = linear_torch(x, expert.up, deterministic=deterministic)
    return linear_torch(silu(gate).mul_(up), expert.down, deterministic=deterministic)


def _run_dense(chosen: Kernels, x: Tensor, table: SlotTable) -> Tensor:
    x, (num_rows, hidden) = _dense_rows(x), x.shape
    out = torch.empty(num_rows, hidden)
    chosen.experts(
        _pack_arguments(
            chosen.pool_address, table.kind, table.address, 1, hidden, table.width,
            x.data_ptr(), 4 * x.stride(0), num_rows, num_rows, 0, 0, 0, out.data_ptr(), 0,
        )
    )  # fmt: skip
    return out


def _dense_rows(x: Tensor) -> Tensor:
    """x itself when its rows are contiguous (they may lie apart), else a copy."""
    return x if x.stride(1) == 1 else x.contiguous()


def _run_experts(
    chosen: Kernels,
    x: Tensor,
    table: SlotTable,
    row_ids: Tensor,
    slot_ids: Tensor,
    pair_weights: Tensor,
    *,
    per_pair: bool,
) -> Tensor:
    num_pairs, (num_rows, hidden) = row_ids.shape[0], x.shape
    if hidden != table.hidden_size:
        raise ValueError(f"x is {hidden} wide, the experts {table.hidden_size}")
    x, row_ids, slot_ids = _dense_rows(x), row_ids.contiguous(), slot_ids.contiguous()
    pair_weights = pair_weights.contiguous()
    out = torch.empty(num_pairs if per_pair else num_rows, hidden)
    bad = chosen.experts(
        _pack_arguments(
            chosen.pool_address, table.kind, table.address, table.num_slots, hidden,
            table.width, x.data_ptr(), 4 * x.stride(0), num_rows, num_pairs, row_ids.data_ptr(),
            slot_ids.data_ptr(), pair_weights.data_ptr(), out.data_ptr() if per_pair else 0,
            0 if per_pair else out.data_ptr(),
        )
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(
            f"pair {bad}: row {int(row_ids[bad])} of {num_rows}, slot {int(slot_ids[bad])} of "
            f"{table.num_slots}: no such row, or no expert in that slot"
        )
    return out


def _check_pairs(x: Tensor, row_ids: Tensor, slot_ids: Tensor, pair_weights: Tensor) -> None:
    if x.dtype != torch.float32 or x.ndim != 2:
        raise ValueError(f"x must be [T, d] float32, got {tuple(x.shape)} {x.dtype}")
    if row_ids.dtype != torch.int32 or slot_ids.dtype != torch.int32:
        raise ValueError(f"ids must be int32, got {row_ids.dtype} and {slot_ids.dtype}")
    if pair_weights.dtype != torch.float32:
        raise ValueError(f"pair_weights must be float32, got {pair_weights.dtype}")
    if not row_ids.shape == slot_ids.shape == pair_weights.shape or row_ids.ndim != 1:
        raise ValueError("row_ids, slot_ids and pair_weights must be [P]")


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
    if row_ids.numel() and not 0 <= int(row_ids.min()) <= int(row_ids.max()) < x.shape[0]:
        raise ValueError(f"row_ids must lie in 0..{x.shape[0] - 1}")
    pair_rows = torch.empty(row_ids.shape[0], x.shape[1])
    for slot in sorted(set(slot_ids.tolist())):
        pairs = (slot_ids == slot).nonzero().squeeze(1)
        down = swiglu_torch(x[row_ids[pairs]], slots.expert(slot), deterministic=deterministic)
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
