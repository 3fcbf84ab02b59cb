"""The ways to size the expert tier, as settings of the application.

The emulated device computes `pairs_per_s` (token, expert) pairs a second and has slots for
1 / COPY of the experts. `num_devices` of them carry the peak at `target_busy`.

static  `num_devices` workers of one device each, always.
copies  whole replicas: a worker stands for COPY devices, which hold all experts together, with
        their speed added up. It is better than real: inside a copy the load is perfectly even, and
        COPY devices start as fast as one. Scaled by the same policy, a copy at a time.
shoal   workers of one device each, scaled one by one; the experts are spread and replicated over
        however many there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

COPY = 4
"""Devices that hold all experts together: of the default model one routing group of each layer."""


SCALING_BUSY = 0.45
"""What the pools that scale aim at. They can be fuller than the static one, which has to have room
for the busiest moment of the day; a batch waits for its busiest worker, so not much fuller."""


@dataclass(frozen=True)
class Fleet:
    """What all three have in common."""

    model: str
    num_experts: int
    """(layer, expert) pairs of the model."""
    unit_size: int
    """Experts that are placed together."""
    num_devices: int
    pairs_per_s: float
    target_busy: float
    """At the peak, if all of them carry it."""


@dataclass(frozen=True)
class Provisioning:
    """One way: a tree of settings, and how many devices one expert worker stands for."""

    name: str
    title: str
    devices_per_worker: int
    settings: dict[str, Any]


def static(fleet: Fleet) -> Provisioning:
    """As many devices as the peak needs."""
    experts = _one_device(fleet) | {"num_workers": fleet.num_devices}
    return Provisioning("static", "static peak", 1, _settings(fleet, experts))


def copies(fleet: Fleet) -> Provisioning:
    """Whole copies of all experts."""
    most = math.ceil(fleet.num_devices / COPY)
    experts = {
        "slots_per_worker": fleet.num_experts,
        "emulated_pairs_per_s": fleet.pairs_per_s * COPY,
        "num_workers": 1,
        "scaling": _scaling(1, most, step_down=1),
    }
    return Provisioning("copies", "whole replicas", COPY, _settings(fleet, experts))


def shoal(fleet: Fleet) -> Provisioning:
    """Worker by worker."""
    experts = _one_device(fleet) | {
        "num_workers": COPY,
        "scaling": _scaling(COPY, fleet.num_devices, step_down=COPY),
    }
    return Provisioning("shoal", "Shoal, worker by worker", 1, _settings(fleet, experts))


ALL = {"static": static, "copies": copies, "shoal": shoal}


def device_slots(fleet: Fleet) -> int:
    """Of one device: its part of a copy, in whole units."""
    return math.ceil(fleet.num_experts / fleet.unit_size / COPY) * fleet.unit_size


def _one_device(fleet: Fleet) -> dict[str, Any]:
    return {
        "slots_per_worker": device_slots(fleet),
        "emulated_pairs_per_s": fleet.pairs_per_s,
    }


def _scaling(lowest: int, highest: int, step_down: int) -> dict[str, Any]:
    """Delays that suit a day of minutes, a wait for devices that take tens of ms for a batch."""
    return {
        "min_workers": lowest,
        "max_workers": highest,
        "target_busy": SCALING_BUSY,
        "downscale_busy": 0.75 * SCALING_BUSY,
        "max_step_down": step_down,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 6.0,
        "settle_s": 3.0,
        "window_s": 3.0,
        "report_every_s": 1.0,
        "max_queue_p95_ms": 200.0,
    }


def _settings(fleet: Fleet, experts: dict[str, Any]) -> dict[str, Any]:
    """Everything but the experts' tier is the same for all."""
    common = {
        "num_threads": 1,
        "load_window_s": 10.0,
        "rebalance": {"every_s": 3.0},
    }
    return {
        "router": {"mode": "inline", "worker": {"hop_timeout_s": 10.0}},
        "attention": {
            "num_workers": 2,
            "num_threads": 1,
            "engine": {
                "max_num_seqs": 32,
                "max_num_batched_tokens": 32,
                "enable_prefix_caching": False,
                "kv_cache_bytes": 64 * 2**20,
            },
        },
        "experts": common | experts,
    }
