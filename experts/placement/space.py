"""What is placed: the experts of a model, and the units they are placed in. Pure."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

ExpertKey = tuple[int, int]  # (layer, expert id)
Unit = tuple[int, int]  # (layer, index of the unit in the layer)
Table = Mapping[str, Collection[ExpertKey]]  # worker_id -> experts
Loads = Mapping[int, Sequence[float]]  # layer -> load of each logical expert [E]


class PlacementError(ValueError):
    """The numbers do not allow a placement; str() is one line with the numbers and the remedy."""


@dataclass(frozen=True)
class ExpertSpace:
    """All (layer, expert) pairs of a model and the unit they are placed in.

    `num_groups` is the model's n_group if its routing is group-limited, else 1.
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    num_groups: int = 1

    def __post_init__(self) -> None:
        if not self.moe_layers or self.num_experts < 1:
            layers = len(self.moe_layers)
            raise PlacementError(f"nothing to place: {layers} layers of {self.num_experts} experts")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise PlacementError(f"{self.num_experts} experts, {self.num_groups} unequal groups")

    @property
    def unit_size(self) -> int:
        """Experts that are placed together."""
        return self.num_experts // self.num_groups if self.num_groups > 1 else 1

    @property
    def num_total(self) -> int:
        """Logical experts over all layers."""
        return len(self.moe_layers) * self.num_experts

    def units(self) -> Iterator[Unit]:
        return itertools.product(self.moe_layers, range(self.num_experts // self.unit_size))

    def unit_of(self, key: ExpertKey) -> Unit:
        return key[0], key[1] // self.unit_size

    def experts_of(self, unit: Unit) -> Iterator[ExpertKey]:
        layer, index = unit
        return ((layer, index * self.unit_size + i) for i in range(self.unit_size))

    def __contains__(self, key: ExpertKey) -> bool:
        return key[0] in self._layers and 0 <= key[1] < self.num_experts

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.moe_layers)


def unit_loads(space: ExpertSpace, loads: Loads) -> dict[Unit, float]:
    """Load of each unit; a layer that nobody measured has none. Raises PlacementError."""
    total: dict[Unit, float] = {}
    idle = [0.0] * space.num_experts
    for layer in space.moe_layers:
        row = np.asarray(loads.get(layer, idle), dtype=np.float64)
        if row.shape != (space.num_experts,) or not np.isfinite(row).all() or (row < 0).any():
            raise PlacementError(
                f"loads of layer {layer}: needs {space.num_experts} finite numbers, none negative"
            )
        by_unit = row.reshape(-1, space.unit_size).sum(axis=1).tolist()
        total.update({(layer, index): load for index, load in enumerate(by_unit)})
    return total
