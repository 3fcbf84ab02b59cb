"""Pools of workers and skewed traffic over their experts. Pure and seeded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from balance.imbalance import Rows
from experts.placement.replan import slots_needed
from experts.placement.space import ExpertSpace

REDUNDANT_SHARE = 8
"""One redundant slot for so many experts: 12.5 %."""


@dataclass(frozen=True)
class Pool:
    """A model's experts on equal workers."""

    name: str
    space: ExpertSpace
    top_k: int
    num_workers: int

    @property
    def redundancy(self) -> int:
        """Slots beyond one for each expert, before rounding up to equal workers."""
        return self.space.num_total // REDUNDANT_SHARE

    @property
    def slots(self) -> dict[str, int]:
        """worker -> slots."""
        space = self.space
        each = slots_needed(space.num_total, self.num_workers, self.redundancy, space.unit_size)
        return {f"worker-{number:02}": each for number in range(self.num_workers)}

    @property
    def redundant_share(self) -> float:
        """What the rounding made of the 12.5 %."""
        return sum(self.slots.values()) / self.space.num_total - 1


def _layers(first: int, number: int) -> tuple[int, ...]:
    return tuple(range(first, first + number))


V3_32 = Pool("V3, 32 workers", ExpertSpace(_layers(3, 58), 256), 8, 32)
V3_64 = Pool("V3, 64 workers", ExpertSpace(_layers(3, 58), 256), 8, 64)
V2_LITE = Pool("V2-Lite, 8 workers", ExpertSpace(_layers(1, 26), 64), 6, 8)


def zipf_windows(
    pool: Pool, exponent: float, tokens: int, seed: int, number: int
) -> Iterator[Rows]:
    """Rows [L, E] of windows of so many tokens, each drawn anew from one skewed traffic.

    An expert's part is as 1 / rank^exponent; every layer ranks its experts differently.
    """
    rng = np.random.default_rng([seed, pool.num_workers, int(100 * exponent)])
    weights = 1.0 / np.arange(1, pool.space.num_experts + 1) ** exponent
    layers = [rng.permutation(weights / weights.sum()) for _ in pool.space.moe_layers]
    for _ in range(number):
        counts = [rng.multinomial(tokens * pool.top_k, layer) for layer in layers]
        yield np.array(counts, dtype=np.float64)
