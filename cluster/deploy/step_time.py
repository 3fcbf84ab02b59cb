"""How long a pool of GPUs takes at least to give every running sequence one token. Pure.

The batch goes through the layers in micro-batches. With more than one of them attention, experts
and network work at the same time, and what takes longest sets the step:

    busiest GPU   micro-batches x its parts; a part takes the longer of computing and reading
    busiest port  micro-batches x the slower of dispatch and return, latency and bytes
    round trip    attention, dispatch, experts and return of one micro-batch, one after the other

Assumed: routing and load are even, kernels run at their sustained rate, all other work is hidden,
every expert is held once. Layers are alike, so a step is summed over all of them at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from cluster.deploy import token_costs
from cluster.deploy.hardware import Gpu, Network
from cluster.deploy.sizes import ModelSizes

Limit = Literal["compute", "bandwidth", "memory", "network", "latency"]
"""bandwidth: of the GPU's memory. memory: room for more sequences would help. latency: more time
for a token would."""


@dataclass(frozen=True)
class Setting:
    """What is served on what, and how fast a token must come."""

    sizes: ModelSizes
    gpu: Gpu
    network: Network
    context_tokens: int
    """Of every sequence, all the time."""
    tpot_s: float
    """Time per output token that must be kept."""


@dataclass(frozen=True)
class Pool:
    """GPUs; if not split, every one has both tiers and both numbers are the same."""

    is_split: bool
    attention_gpus: int
    expert_gpus: int

    @property
    def num_gpus(self) -> int:
        return self.attention_gpus + (self.expert_gpus if self.is_split else 0)


class Bound(NamedTuple):
    """What a step (or a part of it) cannot be shorter than. `limit` None: what a larger batch
    shares among more tokens, so that whatever limits the batch is the limit."""

    seconds: float
    limit: Limit | None
    what: str


def step_bound(setting: Setting, pool: Pool, sequences: int, micro_batches: int) -> Bound:
    """The bound that sets the step with so many sequences on each attention GPU."""
    batch = sequences / micro_batches
    attention, experts = _attention(setting, batch), _experts(setting, pool, batch)
    hops = _hops(setting, pool, batch)
    busy_s = sum(part.seconds for part in (*attention, experts))
    round_trip = Bound(
        busy_s + hops.one_after_the_other_s, None, "one round trip through both tiers"
    )
    if micro_batches == 1:
        return round_trip
    gpus = (attention, [experts]) if pool.is_split else ([*attention, experts],)
    port = Bound(micro_batches * hops.busiest_port_s, "network", "traffic between the tiers")
    return max(round_trip, port, *(_busy(parts, micro_batches) for parts in gpus), key=_seconds)


def _seconds(bound: Bound) -> float:
    return bound.seconds


def _busy(parts: list[Bound], micro_batches: int) -> Bound:
    """A GPU with these parts, named after the longest of them."""
    longest = max(parts, key=_seconds)
    return longest._replace(seconds=micro_batches * sum(part.seconds for part in parts))


def _attention(setting: Setting, batch: float) -> list[Bound]:
    """Of one micro-batch on one attention GPU, all layers."""
    sizes, gpu, context = setting.sizes, setting.gpu, setting.context_tokens
    weights_s = (sizes.attention_matmul_bytes + sizes.head_bytes) / gpu.bandwidth_bytes_per_s
    matmul_s = batch * token_costs.matmul_s(sizes, gpu)
    core_s = batch * token_costs.core_compute_s(sizes, gpu, context)
    read_s = batch * token_costs.core_read_s(sizes, gpu, context)
    return [
        max(
            Bound(matmul_s, "compute", "matrices of the attention side"),
            Bound(weights_s, None, "reading the attention side's weights"),
            key=_seconds,
        ),
        max(
            Bound(core_s, "compute", "core attention"),
            Bound(read_s, "bandwidth", "reading the cache"),
            key=_seconds,
        ),
    ]


def _experts(setting: Setting, pool: Pool, batch: float) -> Bound:
    """Of one micro-batch on one expert GPU, all layers."""
    sizes, gpu, config = setting.sizes, setting.gpu, setting.sizes.config
    tokens = batch * pool.attention_gpus
    num_experts, chosen = config.n_routed_experts, config.num_experts_per_tok
    touched = token_costs.experts_touched(num_experts, chosen, tokens) / num_experts
    all_bytes = sizes.num_experts_total * sizes.expert_bytes
    return max(
        Bound(tokens / pool.expert_gpus * token_costs.expert_s(sizes, gpu), "compute", "experts"),
        Bound(
            touched * all_bytes / pool.expert_gpus / gpu.bandwidth_bytes_per_s,
            None,
            "reading expert weights",
        ),
        key=_seconds,
    )


class Hops(NamedTuple):
    """Dispatch and return of one micro-batch, all layers."""

    one_after_the_other_s: float
    busiest_port_s: float


def _hops(setting: Setting, pool: Pool, batch: float) -> Hops:
    """A port of a split pool carries one of the two in each direction. A colocated one starts both;
    of its bytes only the larger direction is counted, as if the other were free."""
    sizes, network = setting.sizes, setting.network
    if pool.num_gpus == 1:
        return Hops(0.0, 0.0)
    tokens = batch * max(1.0, pool.attention_gpus / pool.expert_gpus)
    if network.is_shared:
        tokens = batch * pool.attention_gpus
    copies = tokens * token_costs.destinations(sizes.config, pool.expert_gpus)
    copies_per_s = network.bytes_per_s / (sizes.num_moe_layers * copies)
    dispatch_s = token_costs.dispatch_bytes(sizes) / copies_per_s
    return_s = token_costs.return_bytes(sizes) / copies_per_s
    latency_s = sizes.num_moe_layers * network.hop_latency_s
    both_s = 2 * latency_s + dispatch_s + return_s
    if network.is_shared:
        return Hops(both_s, both_s)
    starts = 1 if pool.is_split else 2
    return Hops(both_s, starts * latency_s + max(dispatch_s, return_s))
