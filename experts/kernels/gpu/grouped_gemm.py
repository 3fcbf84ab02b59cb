"""The two products of the routed experts, over the experts that a batch is routed to.

    h[p]         = silu(x[row_ids[p]] . gate^T) * (x[row_ids[p]] . up^T)        for each pair p
    pair_rows[p] = pair_weights[p] * (h[p] . down^T)

gate, up and down are those of the slot slot_of[expert of p]. Only slots of experts with pairs are
read. Accumulation is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from experts.kernels.gpu.permute import SortedPairs
from experts.kernels.gpu.quantise import dequantise_blocks, dequantise_rows


@dataclass(frozen=True, slots=True)
class DeviceWeights:
    """gate_up [S, 2, f, d] and down [S, d, f] in bfloat16, float32 or float8_e4m3fn; with fp8 also
    gate_up_scales [S, 2, ceil(f/128), ceil(d/128)], down_scales [S, ceil(d/128), ceil(f/128)]
    float32. All contiguous. S slots, f: width of an expert, d: width of a row."""

    gate_up: Tensor
    down: Tensor
    gate_up_scales: Tensor | None = None
    down_scales: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.gate_up_scales is not None


def block_rows_for(
    num_pairs: int, num_experts: int, dtype: torch.dtype, *, deterministic: bool = False
) -> int:
    """Rows of a block, from what is known without reading values. dtype: of the weights."""
    if deterministic:
        return 64
    mean = num_pairs / max(1, num_experts)
    return 16 if mean <= 16 else 64 if mean <= 48 else 128


def gate_up_silu_torch(
    x: Tensor,
    x_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    row_ids: Tensor,
    *,
    out_dtype: torch.dtype,
    deterministic: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `gate_up_silu`."""
    num_pairs, width = row_ids.shape[0], weights.gate_up.shape[2]
    out = torch.zeros(num_pairs, width, dtype=out_dtype, device=x.device)
    for slot, of_slot in _pairs_by_slot(pairs, slot_of, num_pairs):
        rows = _rows(x, x_scales, row_ids[of_slot].long())
        gate, up = (_matrix(weights.gate_up, weights.gate_up_scales, slot, i) for i in (0, 1))
        gated = silu(multiply_torch(rows, gate, deterministic))
        out[of_slot] = (gated * multiply_torch(rows, up, deterministic)).to(out_dtype)
    return out


def down_torch(
    h: Tensor,
    h_scales: Tensor | None,
    weights: DeviceWeights,
    slot_of: Tensor,
    pairs: SortedPairs,
    pair_weights: Tensor,
    *,
    deterministic: bool = False,
) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `down`."""
    num_pairs, hidden = pair_weights.shape[0], weights.down.shape[1]
    out = torch.zeros(num_pairs, hidden, device=h.device)
    for slot, of_slot in _pairs_by_slot(pairs, slot_of, num_pairs):
        matrix = _matrix(weights.down, weights.down_scales, slot)
        rows = multiply_torch(_rows(h, h_scales, of_slot), matrix, deterministic)
        out[of_slot] = rows * pair_weights[of_slot, None]
    return out


def multiply_torch(x: Tensor, matrix: Tensor, deterministic: bool) -> Tensor:
    """x [T, K] . matrix [N, K]^T in float32."""
    if not deterministic:
        return x @ matrix.t()
    # BLAS picks its summation order by the shape, so one row at a time is what fixes it.
    out = torch.empty(x.shape[0], matrix.shape[0], device=x.device)
    for row in range(x.shape[0]):
        out[row] = (x[row : row + 1] @ matrix.t())[0]
    return out


def _pairs_by_slot(pairs: SortedPairs, slot_of: Tensor, num_pairs: int) -> list[tuple[int, Tensor]]:
    """Pairs of each slot that is read; not those of experts without a slot."""
    order = pairs.order.view(pairs.num_blocks, pairs.block_rows).long()
    found = []
    for expert in range(slot_of.shape[0]):
        members = order[pairs.block_experts == expert].flatten()
        members = members[members < num_pairs]
        slot = int(slot_of[expert])
        if members.numel() and slot >= 0:
            found.append((slot, members))
    return found


def _rows(x: Tensor, scales: Tensor | None, index: Tensor) -> Tensor:
    return x[index].float() if scales is None else dequantise_rows(x[index], scales[index])


def _matrix(weights: Tensor, scales: Tensor | None, *index: int) -> Tensor:
    return dequantise_blocks(weights[index], None if scales is None else scales[index])
