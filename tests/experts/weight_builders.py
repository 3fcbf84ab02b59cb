"""Random weights of every kind that a file may hold, and who computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from experts.kernels import runtime
from experts.layer import ExpertWeights, SlotWeights
from experts.linear import Weight

KINDS: Final = ("float32", "bfloat16", "fp8")
TORCH: Final = runtime.Kernels("chosen by a test")


def random_weight(kind: str, out: int, length: int, seed: int = 0) -> Weight:
    """[out, length], about standard normal."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(out, length, generator=generator)
    if kind == "float32":
        return Weight(data)
    if kind == "bfloat16":
        return Weight(data.bfloat16())
    blocks = -(-out // 128), -(-length // 128)
    scale = torch.rand(blocks, generator=generator) * 0.02 + 0.001
    return Weight((data * 100).to(torch.float8_e4m3fn), scale)


def random_expert(kind: str, hidden: int, width: int, seed: int = 0) -> ExpertWeights:
    sides = ((width, hidden), (width, hidden), (hidden, width))
    return ExpertWeights(*(random_weight(kind, *sides[i], 10 * seed + i) for i in range(3)))


def random_slots(kind: str, hidden: int, width: int, num_slots: int) -> SlotWeights:
    slots = SlotWeights(num_slots)
    for slot in range(num_slots):
        slots.fill(slot, random_expert(kind, hidden, width, slot))
    return slots


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Kernels and torch with `count` threads."""
    before = torch.get_num_threads()
    runtime.configure_threads(count)
    try:
        yield
    finally:
        runtime.configure_threads(before)
