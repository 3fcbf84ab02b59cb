"""A kernel against its twin: the same seeded arguments, outputs on poisoned memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_check.compare import ALLOWED, EXACT, Difference, Poisoned, difference
from gpu_check.plan import Unit
from gpu_check.rows import Check

MAX_PROBLEM_CHARS = 400


@dataclass(frozen=True)
class Case:
    """`call(ops)` makes its arguments anew, from a seed, calls the kernel among `ops` and returns
    what is to be compared: the results, and arguments that are changed in place."""

    kernel: str
    shape: str
    dtype: str
    call: Callable[[Any], object]
    allowed: float


def case(
    kernel: str,
    shape: str,
    dtype: str,
    call: Callable[[Any], object],
    allowed: float | None = None,
) -> Case:
    """allowed: that of the dtype, if it is not given."""
    return Case(kernel, shape, dtype, call, ALLOWED[dtype] if allowed is None else allowed)


def alone(kernel: str, shape: str, dtype: str, call: Callable[..., Tensor], twins: Any) -> Case:
    """`call(ops, 1)` is the first row by itself: the same bits as in `call(ops)`, where it is among
    others. Of the twins this is not asked."""

    def num_different(ops: Any) -> Tensor:
        by_itself = call(ops, 1)
        if ops is twins:
            return by_itself.new_zeros((), dtype=torch.int64)
        return (call(ops)[:1] != by_itself).sum()

    return case(kernel, f"{shape}, first row alone", dtype, num_different, EXACT)


def units_of(cases: Iterable[Case], kernels: Any, twins: Any, *, twice: bool) -> Iterator[Unit]:
    """One for each case. twice: whether a second run has to give the same bits."""
    for one in cases:
        name = f"{one.kernel}, {one.shape}, {one.dtype}"
        yield Unit(name, lambda one=one: [check(one, kernels, twins, twice=twice)])


def check(one: Case, kernels: Any, twins: Any, *, twice: bool = True) -> Check:
    """An exception of the kernel is a problem of the check like any other."""
    expected = list(tensors_of(one.call(twins)))
    try:
        with Poisoned():
            found = list(tensors_of(one.call(kernels)))
        worst = _worst(found, expected)
        if twice and not worst.problem and not _same_bits(found, tensors_of(one.call(kernels))):
            worst = Difference(worst.error, "two runs differ")
    except Exception as error:
        worst = Difference(None, f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])
    return Check(one.kernel, one.shape, one.dtype, worst.error, one.allowed, worst.problem)


def tensors_of(result: object) -> Iterator[Tensor]:
    """Those in a tensor, a tuple or list, or a dataclass."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            yield from tensors_of(getattr(result, field.name))


def _worst(found: list[Tensor], expected: list[Tensor]) -> Difference:
    if len(found) != len(expected):
        return Difference(None, f"{len(found)} results, the twin has {len(expected)}")
    each = [difference(*pair) for pair in zip(found, expected, strict=True)]
    problems = [f"result {i}: {one.problem}" for i, one in enumerate(each) if one.problem]
    if problems:
        return Difference(None, "; ".join(problems)[:MAX_PROBLEM_CHARS])
    return Difference(max((one.error or 0.0 for one in each), default=0.0))


def _same_bits(found: Iterable[Tensor], again: Iterable[Tensor]) -> bool:
    pairs = zip(found, again, strict=True)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor
