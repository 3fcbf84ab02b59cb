"""All members as plain objects in one process, joined by in-process channels: no Ray.

For tests, notebooks and `--inline`; the members, frames and checks are those of the cluster.
"""

from __future__ import annotations

import itertools
import secrets
from types import TracebackType

import torch

from cluster.config import ShoalConfig
from cluster.gpus import divide_gpus
from cluster.ingress import IngressMember
from cluster.members import (
    AttentionMember,
    ExpertMember,
    RouterMember,
)
from cluster.placement import PlacementMember
from cluster.site import Site
from experts.device import ComputeDevice

READY_TIMEOUT_S = 600.0
_numbers = itertools.count()


class InlineCluster:
    """Placement, expert workers, routers, attention workers and an ingress of one configuration."""

    def __init__(self, config: ShoalConfig, device: ComputeDevice | None = None) -> None:
        """device: where all workers compute; None: as configured, on the first GPU of the process.

        Raises ConfigError and DeviceError for a device that cannot be had.
        """
        num_gpus = 1 if device is None and torch.cuda.is_available() else 0
        config, self.gpus = divide_gpus(config, num_gpus)
        secret = secrets.token_bytes(32)
        prefix = f"inproc:shoal-{next(_numbers)}"
        self.placement = PlacementMember(config, secret, f"{prefix}-placement")
        site = Site(
            config=config,
            secret=secret,
            directory=lambda: self.placement.endpoint,
            new_endpoint=lambda worker_id: f"{prefix}-{worker_id}",
            device=device,
        )
        self.experts = [
            ExpertMember(site, f"experts-{i}") for i in range(config.experts.num_workers)
        ]
        num_routers = config.router.num_workers if config.router.mode == "deployment" else 0
        self.routers = [RouterMember(site, f"router-{i}") for i in range(num_routers)]
        self.attention = [
            AttentionMember(site, f"attention-{i}") for i in range(config.attention.num_workers)
        ]
        self.ingress = IngressMember(site, "ingress-0")

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Return when requests are served. Raises TimeoutError that says how far things are."""
        self.ingress.wait_ready(timeout_s)

    def close(self) -> None:
        """Take everything down, clients before what they use."""
        self.ingress.close()
        for attention in self.attention:
            attention.close()
        for router in self.routers:
            router.close()
        for experts in self.experts:
            experts.close(hand_over=False)
        self.placement.close()

    def __enter__(self) -> InlineCluster:
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
