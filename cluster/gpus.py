"""Which worker gets how much of a GPU, where nobody said so. Pure; knows neither Ray nor torch.

Attention and expert workers get a whole GPU each if there are enough, else equal parts of one:
with n workers on g GPUs, ceil(n / g) share each. What a tier says (`num_gpus`) stands; a deployed
router gets nothing that is not said.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from cluster.config import (
    GPU_UNIT,
    AttentionTier,
    ComputingTier,
    ConfigError,
    ExpertTier,
    ShoalConfig,
)

WorkerTier = Literal["attention", "experts"]
TIERS: tuple[ComputingTier, ...] = ("attention", "experts", "router")
WORKER_TIERS: tuple[WorkerTier, ...] = ("attention", "experts")


class Division(NamedTuple):
    """The configuration with every `num_gpus` decided, and how, for people; empty if unasked."""

    config: ShoalConfig
    reason: str


def divide_gpus(config: ShoalConfig, num_visible: int | None) -> Division:
    """num_visible: GPUs there are; None: of a cluster, where only what is said counts.

    Raises ConfigError for what cannot be had: workers would wait for it for ever.
    """
    config = _without_gpus_on_cpus(config)
    undecided = [name for name in WORKER_TIERS if _may_take(config, name)]
    num_workers = sum(_most_workers(getattr(config, name)) for name in undecided)
    num_free = _free(config, num_visible) if num_visible is not None else 0
    share = _share(num_workers, num_free)
    if share == 0:
        _check_nobody_insists(config, undecided, num_visible)
    shares: dict[ComputingTier, float] = {
        name: share if name in undecided else 0.0
        for name in TIERS
        if getattr(config, name).num_gpus is None
    }
    reason = _reason(num_workers, num_free, share) if num_visible and num_workers else ""
    return Division(_with_shares(config, shares), reason)


def _without_gpus_on_cpus(config: ShoalConfig) -> ShoalConfig:
    """`device: cpu` wins over any `num_gpus`: nothing is reserved in vain."""
    return _with_shares(config, {n: 0.0 for n in TIERS if config.device_of(n) == "cpu"})


def _with_shares(config: ShoalConfig, shares: dict[ComputingTier, float]) -> ShoalConfig:
    changed: dict[str, Any] = {
        name: getattr(config, name).model_copy(update={"num_gpus": share})
        for name, share in shares.items()
    }
    return config.model_copy(update=changed)


def _may_take(config: ShoalConfig, name: WorkerTier) -> bool:
    """Whether a tier takes GPUs without being told how many."""
    return getattr(config, name).num_gpus is None and config.may_use_gpu(name)


def _most_workers(tier: AttentionTier | ExpertTier) -> int:
    """As many as the load can make it: none of them should wait for a GPU."""
    return tier.scaling.max_workers if tier.scaling else tier.num_workers


def _num_routers(config: ShoalConfig) -> int:
    return config.router.num_workers if config.router.mode == "deployment" else 0


def _free(config: ShoalConfig, num_visible: int) -> int:
    """Whole GPUs that nobody has asked for. Raises ConfigError if more are asked for than exist."""
    asked = {
        "attention": _most_workers(config.attention) * (config.attention.num_gpus or 0),
        "experts": _most_workers(config.experts) * (config.experts.num_gpus or 0),
        "router": _num_routers(config) * (config.router.num_gpus or 0),
    }
    total = sum(asked.values())
    if total > num_visible + GPU_UNIT:
        tiers = ", ".join(f"{name} {number:g}" for name, number in asked.items() if number)
        raise ConfigError(
            f"num_gpus: all workers together ask for {total:g} GPUs ({tiers}), here are "
            f"{num_visible}: lower num_gpus or the number of workers, or set device to cpu"
        )
    return math.floor(num_visible - total + GPU_UNIT)


def _share(num_workers: int, num_gpus: int) -> float:
    """Of one worker; rounded down to what Ray can reserve. 0 if there is nothing to divide."""
    if not num_workers or not num_gpus:
        return 0.0
    sharing = -(-num_workers // num_gpus)
    return round(math.floor(1 / GPU_UNIT / sharing) * GPU_UNIT, 4) if sharing > 1 else 1.0


def _check_nobody_insists(
    config: ShoalConfig, undecided: list[WorkerTier], num_visible: int | None
) -> None:
    """Raises ConfigError if a tier must have a GPU, and nothing was left for it."""
    for name in undecided:
        if config.device_of(name) != "cuda":
            continue
        if num_visible is None:
            raise ConfigError(f"{name}.num_gpus is missing: device cuda needs it in a cluster")
        seen = "others take all that are here" if num_visible else "none is seen here"
        raise ConfigError(f"{name} shall compute on a GPU, {seen}: use --device cpu, or auto")


def _reason(num_workers: int, num_gpus: int, share: float) -> str:
    each = {0.0: "on the CPU", 1.0: "a whole one each"}.get(share, f"num_gpus {share:g} each")
    left = f"{num_gpus} GPU{'s' * (num_gpus != 1)} to divide"
    return f"{left} among {num_workers} attention and expert workers: {each}"
