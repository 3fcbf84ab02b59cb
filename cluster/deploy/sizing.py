"""Model and hardware together: slots, cache and memory of every tier, or why they cannot be.

On GPUs a worker's weights and cache are in the GPU's memory, and the pod's memory holds its
processes; on CPUs both are in the pod's.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ConfigError
from cluster.deploy.config import DeployConfig
from cluster.deploy.hardware import GPUS, Gpu, known_gpu
from cluster.deploy.known_models import known_model
from cluster.deploy.matrices import FLOAT32_BYTES
from cluster.deploy.sections import AttentionGroup, ExpertGroup, Model, Pod, WorkerGroup
from cluster.deploy.sizes import ModelSizes

GIB = 2**30
OBJECT_STORE_BYTES = GIB // 2
"""Of Ray in each pod: Serve's own messages go through it, tensors do not."""
SHM_BYTES = GIB
"""Shared memory of a pod: the object store and as much again."""
NODE_BYTES = GIB
"""Ray's own processes in a pod (raylet, agents) and Serve's proxies, rounded up."""
REPLICA_BYTES = GIB // 2
"""A replica on a CPU before it holds anything: torch 223 MB and Ray 117 MB of imports, and room."""
GPU_REPLICA_BYTES = 6 * GIB
"""A replica with a GPU: CUDA's libraries and context, and buffers that weights pass through."""
CPU_CACHE_BYTES = 512 * 2**20
"""KV cache of an attention worker on a CPU unless cache_tokens says otherwise."""
MIN_CACHE_TOKENS = 4096
"""An attention worker with room for less is refused."""


@dataclass(frozen=True)
class Sizing:
    """What the application and the pods are given."""

    slots_per_worker: int
    """(layer, expert) pairs that an expert worker holds."""
    spare_slots_per_worker: int | None
    """So many more for what would lose its last holder when a pod dies; None: as many as there are
    experts, which costs nothing where slots are views of a file."""
    redundancy: int
    """Slots of the pool for second replicas."""
    kv_cache_bytes: int
    """Of an attention worker."""
    checkpoint_bytes: int
    ingress_memory_bytes: int
    attention_memory_bytes: int
    experts_memory_bytes: int
    """Memory limits of the pods, shared memory included."""


def model_sizes(model: Model) -> ModelSizes:
    """Of the model that is served. Raises CheckpointError for a config.json that is none."""
    if model.config is not None:
        return ModelSizes.of(model.config, weights=model.weights)
    return known_model(str(model.name), model.weights)


def size(config: DeployConfig) -> Sizing:
    """Raises ConfigError, with what would fit, where model and hardware do not go together."""
    sizes = model_sizes(config.model)
    redundancy, slots, spare = _slots(sizes, config.experts)
    cache = _cache_bytes(sizes, config.attention)
    ingress, attention, experts = config.ingress, config.attention, config.experts
    attention_bytes = _replica_bytes(attention, sizes.attention_worker_bytes() + cache)
    experts_bytes = _replica_bytes(experts, sizes.expert_worker_bytes(slots))
    ingress_bytes = (ingress.replicas_per_pod + 1) * REPLICA_BYTES  # one may have Placement, too
    router_bytes = attention.routers_per_pod * REPLICA_BYTES
    return Sizing(
        slots_per_worker=slots,
        spare_slots_per_worker=spare,
        redundancy=redundancy,
        kv_cache_bytes=cache,
        checkpoint_bytes=sizes.attention_side_bytes + sizes.num_experts_total * sizes.expert_bytes,
        ingress_memory_bytes=_pod_bytes("ingress", ingress, ingress_bytes),
        attention_memory_bytes=_pod_bytes("attention", attention, attention_bytes + router_bytes),
        experts_memory_bytes=_pod_bytes("experts", experts, experts_bytes),
    )


def _replica_bytes(group: WorkerGroup, held_bytes: int) -> int:
    """Of the pod's memory for all its workers, each of which holds so much."""
    each = GPU_REPLICA_BYTES if group.gpu else REPLICA_BYTES + held_bytes
    return group.workers_of_a_pod * each


def _pod_bytes(tier: str, pod: Pod, replica_bytes: int) -> int:
    needed = NODE_BYTES + SHM_BYTES + replica_bytes
    if pod.memory_gib is None:
        return -(-needed // GIB) * GIB
    if pod.memory_gib * GIB < needed:
        raise ConfigError(
            f"{tier}.memory_gib = {pod.memory_gib:g}: its processes, weights and shared memory "
            f"take {needed / GIB:.1f} GiB: raise it, or leave it out"
        )
    return round(pod.memory_gib * GIB)


def _slots(sizes: ModelSizes, tier: ExpertGroup) -> tuple[int, int, int | None]:
    """(redundancy, slots and spare slots of a worker)."""
    wanted = sizes.default_redundancy if tier.redundancy is None else tier.redundancy
    if tier.gpu is None:
        return wanted, sizes.slots_per_worker(tier.num_workers, wanted), None
    gpu = known_gpu(tier.gpu)
    room = sizes.slots_that_fit(gpu.usable_bytes)  # in each worker
    most = tier.num_workers * room - sizes.num_experts_total
    if most < 0:
        raise ConfigError(_does_not_fit(sizes, tier, gpu, room))
    if tier.redundancy is not None and tier.redundancy > most:
        raise ConfigError(
            f"experts.redundancy = {tier.redundancy}: {tier.num_workers} {gpu.name} have room for "
            f"{most} replicas beside {sizes.name}'s {sizes.num_experts_total} experts: lower it, "
            "or raise experts.pods"
        )
    redundancy = min(wanted, most)
    slots = sizes.slots_per_worker(tier.num_workers, redundancy)
    return redundancy, slots, _spare_slots(sizes, tier, slots, room)


def _spare_slots(sizes: ModelSizes, tier: ExpertGroup, slots: int, room: int) -> int:
    """What each worker lacks for the others to hold everything when a pod (a worker, where there
    is one pod) dies, as far as there is room."""
    lost = tier.workers_of_a_pod if tier.pods > 1 else 1
    survivors = max(1, tier.num_workers - lost)
    return max(0, min(sizes.slots_per_worker(survivors, 0), room) - slots)


def _does_not_fit(sizes: ModelSizes, tier: ExpertGroup, gpu: Gpu, room: int) -> str:
    total = sizes.num_experts_total
    per_gpu = {g.name: sizes.slots_that_fit(g.usable_bytes) for g in GPUS.values()}
    fits = [f"{-(-total // slots)} {name}" for name, slots in per_gpu.items() if slots]
    pods = f"experts.pods = {-(-total // (room * tier.gpus_per_pod))} or " if room else ""
    return (
        f"experts.pods = {tier.pods}: {tier.num_workers} {gpu.name} ({tier.gpus_per_pod} a pod) "
        f"hold {tier.num_workers * room} of {sizes.name}'s {total} experts "
        f"({total * sizes.expert_bytes / 1e9:.1f} GB, {gpu.usable_bytes / 1e9:.1f} GB usable a "
        f"GPU): {pods}another experts.gpu; all fit on {', '.join(fits)}"
    )


def _cache_bytes(sizes: ModelSizes, tier: AttentionGroup) -> int:
    """Of the KV cache of a worker."""
    if tier.gpu is None:
        wanted = (tier.cache_tokens or 0) * sizes.cache_bytes_per_token(FLOAT32_BYTES)
        return wanted or CPU_CACHE_BYTES
    gpu = known_gpu(tier.gpu)
    free = int(gpu.usable_bytes) - sizes.attention_worker_bytes()
    wanted = (tier.cache_tokens or MIN_CACHE_TOKENS) * sizes.cache_bytes_per_token()
    if wanted > free:
        raise ConfigError(_has_no_room(sizes, tier, gpu, wanted))
    return wanted if tier.cache_tokens else free


def _has_no_room(sizes: ModelSizes, tier: AttentionGroup, gpu: Gpu, cache_bytes: int) -> str:
    weights = sizes.attention_worker_bytes()
    fits = [g.name for g in GPUS.values() if g.usable_bytes >= weights + cache_bytes]
    free_tokens = int(gpu.usable_bytes - weights) // sizes.cache_bytes_per_token()
    lower = f"cache_tokens = {free_tokens} or " if free_tokens >= MIN_CACHE_TOKENS else ""
    return (
        f"attention.gpu = {tier.gpu!r}: {sizes.name}'s attention side takes {weights / 1e9:.1f} GB "
        f"and a cache of {tier.cache_tokens or MIN_CACHE_TOKENS} tokens {cache_bytes / 1e9:.1f}, "
        f"a {gpu.name} has {gpu.usable_bytes / 1e9:.1f} GB usable: {lower}"
        f"one of {', '.join(fits) or 'none that is known'}"
    )
