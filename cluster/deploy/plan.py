"""What a number of GPUs can serve of a model, at most, and how to divide them. Pure.

Figures are bounds at full efficiency. What is known of running systems reaches `REPORTED` of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import gcd, isfinite
from typing import Self

from cluster.config import ConfigError
from cluster.deploy import token_costs
from cluster.deploy.hardware import Gpu, Network
from cluster.deploy.layout import Layout, best_colocated, best_split, cache_room_bytes
from cluster.deploy.sizes import ModelSizes
from cluster.deploy.step_time import Pool, Setting

REPORTED = (0.25, 0.30)
"""Share of such a bound that deployments report; see `plan_report.FORMULAS`."""
MAX_GPUS = 1024


@dataclass(frozen=True)
class Nodes:
    """`count` machines of `gpus` GPUs each."""

    count: int
    gpus: int

    @property
    def num_gpus(self) -> int:
        return self.count * self.gpus

    def __str__(self) -> str:
        return f"{self.count} x {self.gpus}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "4x8". Raises ConfigError."""
        given = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,2})", text, re.ASCII)
        if given is None:
            raise ConfigError(f"nodes = {text!r}: expected MACHINESxGPUS as in 4x8")
        nodes = cls(*map(int, given.groups()))
        if nodes.num_gpus > MAX_GPUS:
            raise ConfigError(
                f"nodes = {text!r}: {nodes.num_gpus} GPUs, at most {MAX_GPUS} are planned"
            )
        return nodes


@dataclass(frozen=True)
class Suggestion:
    """The tiers of deploy.yaml, from `layout`: pods of `gpus_per_pod` GPUs, a worker each."""

    layout: Layout
    gpus_per_pod: tuple[int, int]
    """Of an attention pod and of an expert pod."""
    redundancy: int
    """Slots for second replicas: an eighth of the experts, or as many as fit."""
    slots_per_worker: int

    @property
    def pods(self) -> tuple[int, int]:
        pool, (attention, experts) = self.layout.pool, self.gpus_per_pod
        return pool.attention_gpus // attention, pool.expert_gpus // experts


@dataclass(frozen=True)
class Plan:
    """Everything that `shoal plan` says."""

    setting: Setting
    nodes: Nodes
    price_per_gpu_hour: float
    colocated: Layout
    split: Layout | None
    """The best division; None with a single GPU."""
    suggestion: Suggestion | None
    """The best division into whole nodes, or into pods of one node; None if none works."""

    @property
    def layouts(self) -> dict[str, Layout]:
        named = {"split": self.split, "colocated": self.colocated}
        return {name: layout for name, layout in named.items() if layout is not None}

    @property
    def works(self) -> bool:
        return any(layout.sequences for layout in self.layouts.values())

    @property
    def gpu_ratio(self) -> float:
        """Attention GPUs for an expert GPU when computing is all that counts."""
        return token_costs.gpu_ratio(
            self.setting.sizes, self.setting.gpu, self.setting.context_tokens
        )

    @property
    def port_limit(self) -> float:
        """Tokens/s through the port of an expert GPU; inf for a single GPU."""
        devices = self.split.pool.expert_gpus if self.split else 0
        if not devices:
            return float("inf")
        spread = token_costs.destinations(self.setting.sizes.config, devices)
        return token_costs.port_limit(self.setting.sizes, self.setting.network, spread)

    @property
    def useful_gpu_ratio(self) -> float:
        """Of attention GPUs for an expert GPU that has no more than its port lets through."""
        sizes, gpu = self.setting.sizes, self.setting.gpu
        attention_s = token_costs.attention_s(sizes, gpu, self.setting.context_tokens)
        return min(self.gpu_ratio, self.port_limit * attention_s)

    @property
    def min_expert_gpus(self) -> int | None:
        """That hold every expert once; None if no number does."""
        sizes, usable = self.setting.sizes, self.setting.gpu.usable_bytes
        if not sizes.slots_that_fit(usable):
            return None
        return sizes.expert_workers_needed(usable, redundancy=0)

    def cache_tokens(self, layout: Layout) -> int:
        """Room on one attention GPU."""
        room = cache_room_bytes(self.setting, layout.pool)
        return max(0, int(room // self.setting.sizes.cache_bytes_per_token()))

    def cost_per_million(self, layout: Layout) -> float | None:
        """Price of a million output tokens at the bound; None if the layout does not work."""
        rate = layout.tokens_per_s_per_gpu
        return self.price_per_gpu_hour / (rate * 3600) * 1e6 if rate else None


def plan(
    sizes: ModelSizes,
    gpu: Gpu,
    nodes: Nodes,
    context_tokens: int,
    tpot_ms: float,
    network: Network,
    price_per_gpu_hour: float,
) -> Plan:
    """Raises ConfigError for a context that the model does not have, and for no numbers."""
    for name, value in (("tpot_ms", tpot_ms), ("price", price_per_gpu_hour)):
        if not isfinite(value):
            raise ConfigError(f"{name} = {value}: expected a number")
    longest = sizes.config.max_position_embeddings
    if context_tokens > longest:
        raise ConfigError(
            f"context = {context_tokens}: {sizes.name} has at most {longest} positions"
        )
    setting = Setting(sizes, gpu, network, context_tokens, tpot_ms / 1e3)
    total = nodes.num_gpus
    return Plan(
        setting,
        nodes,
        price_per_gpu_hour,
        colocated=best_colocated(setting, total),
        split=best_split(setting, total) if total > 1 else None,
        suggestion=_suggest(setting, nodes),
    )


def _suggest(setting: Setting, nodes: Nodes) -> Suggestion | None:
    """Whole nodes for a tier where there are several, as a pod then has its node to itself."""
    if nodes.num_gpus < 2:
        return None
    layout = best_split(setting, nodes.num_gpus, nodes.gpus if nodes.count > 1 else 1)
    if not layout.sequences:
        layout = best_split(setting, nodes.num_gpus)
    if not layout.sequences:
        return None
    pool, sizes = layout.pool, setting.sizes
    room = sizes.slots_that_fit(setting.gpu.usable_bytes) * pool.expert_gpus
    redundancy = min(sizes.default_redundancy, room - sizes.num_experts_total)
    return Suggestion(
        layout,
        (_gpus_per_pod(pool.attention_gpus, nodes), _gpus_per_pod(pool.expert_gpus, nodes)),
        redundancy,
        sizes.slots_per_worker(pool.expert_gpus, redundancy),
    )


def _gpus_per_pod(tier_gpus: int, nodes: Nodes) -> int:
    """The largest pods of equal size that fit a node."""
    return tier_gpus if nodes.count == 1 else gcd(tier_gpus, nodes.gpus)


def colocated_traffic_limit(setting: Setting, pool: Pool) -> float:
    """Tokens/s per GPU if none of a token's experts is on its own GPU, so that a port carries what
    it dispatches and what it returns: below this the colocated bound is generous."""
    sizes, network = setting.sizes, setting.network
    if pool.num_gpus == 1:
        return float("inf")
    spread = token_costs.destinations(sizes.config, pool.num_gpus)
    both = token_costs.dispatch_bytes(sizes) + token_costs.return_bytes(sizes)
    ports = pool.num_gpus if network.is_shared else 1
    return network.bytes_per_s / ports / (sizes.num_moe_layers * spread * both)
