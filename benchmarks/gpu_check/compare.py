"""A kernel's result against its twin's, on memory that held poison.

Inside `Poisoned()` every tensor that torch allocates without filling it holds NaN (integers: a
value far outside any index), so that a value which no kernel wrote is seen. The error is that of
the worst row, in the norm of the row: |found - twin| / |twin|; rows with hardly anything in them
are measured against a hundredth of the mean row instead, zeros among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOWED = {"float32": 2e-5, "bfloat16": 1e-2, "fp8": 2e-2}
"""By the type of the operands. bfloat16 keeps 8 bits: rounding moves a value by up to 0.4 %, and
either side may round twice. With fp8 the kernels also round what they dequantise to bfloat16, the
twins do not. float32 sums differ by their order."""
EXACT = 0.0
POISON_BYTE_FLOAT, POISON_BYTE_INT = 0xFF, 0x7F
SMALL_ROW = 0.01

_aten = torch.ops.aten
_UNFILLED = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.empty_permuted.default,
}


class Poisoned(TorchDispatchMode):
    """Fills what torch allocates without filling."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _UNFILLED:
            poison(out)
        return out


def poison(tensor: Tensor) -> Tensor:
    """All of its storage. uint8, the bytes of an fp8 cache, is NaN in whatever type it is read."""
    floating = tensor.dtype.is_floating_point or tensor.dtype == torch.uint8
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage.set_(tensor.untyped_storage())
    storage.fill_(POISON_BYTE_FLOAT if floating else POISON_BYTE_INT)
    return tensor


class Difference(NamedTuple):
    """error None: the two cannot be compared; `problem` says why, or what else is wrong."""

    error: float | None
    problem: str = ""


def difference(found: Tensor, expected: Tensor) -> Difference:
    """Of tensors of one shape and dtype; integers: the share of values that differ."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return Difference(
            None,
            f"{tuple(found.shape)} {found.dtype}, the twin has "
            f"{tuple(expected.shape)} {expected.dtype}",
        )
    if not expected.numel():
        return Difference(0.0)
    if not expected.dtype.is_floating_point:
        return _integers(found, expected)
    found, expected = found.detach().double(), expected.detach().double()
    unwritten = int((found.isfinite() != expected.isfinite()).sum())
    if unwritten:
        return Difference(None, f"{unwritten} of {found.numel()} values are poison or not finite")
    return Difference(_worst_row(found.nan_to_num(), expected.nan_to_num()))


def _worst_row(found: Tensor, expected: Tensor) -> float:
    width = expected.shape[-1] if expected.ndim else 1
    found, expected = found.reshape(-1, width), expected.reshape(-1, width)
    norms = expected.norm(dim=1)
    least = SMALL_ROW * float(norms.square().mean().sqrt())
    differences = (found - expected).norm(dim=1)
    if least == 0.0:
        return float(differences.max() > 0)  # all zeros: exactly, or not at all
    return float((differences / norms.clamp_min(least)).max())


def _integers(found: Tensor, expected: Tensor) -> Difference:
    wrong = (found != expected).flatten()
    count = int(wrong.sum())
    if not count:
        return Difference(0.0)
    place = int(wrong.to(torch.uint8).argmax())
    values = int(found.flatten()[place]), int(expected.flatten()[place])
    return Difference(
        count / wrong.numel(),
        f"{count} of {wrong.numel()} values differ, first at {place}: {values[0]}, the twin has "
        f"{values[1]}{_poison_hint(found, values[0])}",
    )


def _poison_hint(found: Tensor, value: int) -> str:
    poisoned = int.from_bytes(bytes([POISON_BYTE_INT]) * found.element_size(), "little")
    return " (poison: never written)" if value == poisoned else ""
