"""Where a member runs, and what more than one of them works out of the configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attention.tracing import Tracer, open_tracer
from cluster.config import ShoalConfig
from experts.config import ModelConfig
from experts.messages import Register, Role
from experts.metrics import Sample
from experts.placement.space import ExpertSpace

if TYPE_CHECKING:  # torch: the directory and an ingress do without its three seconds of a core
    from experts.device import ComputeDevice

SampleSource = Callable[[], Sequence[Sample]]


@dataclass(frozen=True)
class Site:
    """Where a member runs: how it finds the directory and how others find it."""

    config: ShoalConfig
    secret: bytes
    directory: Callable[[], str]
    """Endpoint of the directory; asked again whenever the line to it breaks."""
    new_endpoint: Callable[[str], str]
    """Endpoint to listen at, for a worker id."""
    node: str = ""
    device: ComputeDevice | None = None
    """Where all workers compute; None: as the configuration says of each tier. For tests."""

    def register(
        self, role: Role, worker_id: str, endpoint: str, num_slots: int = 0, spare_slots: int = 0
    ) -> Register:
        """What a member tells the directory."""
        return Register(
            role=role,
            worker_id=worker_id,
            endpoint=endpoint,
            pid=os.getpid(),
            node=self.node,
            num_slots=num_slots,
            spare_slots=spare_slots,
        )

    def open_tracer(self, role: Role, worker_id: str) -> Tracer | None:
        """None without traces. Raises TracesUnavailable."""
        return open_tracer(role, worker_id) if self.config.observability.traces else None

    def told(self, samples: SampleSource) -> SampleSource | None:
        """What a member's line to the directory shall tell of them."""
        return samples if self.config.observability.metrics else None


def expert_space(model: ModelConfig) -> ExpertSpace:
    """What has to be placed: whole groups where the model is group-limited."""
    groups = model.n_group if model.is_group_limited else 1
    return ExpertSpace(model.moe_layers, model.n_routed_experts, groups)


def redundancy(config: ShoalConfig, space: ExpertSpace) -> int:
    """Slots for second replicas: as configured, else an eighth of the experts, in whole units."""
    if config.experts.redundancy is not None:
        return config.experts.redundancy
    return -(-space.num_total // (8 * space.unit_size)) * space.unit_size
