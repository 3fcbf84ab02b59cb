"""serveConfigV2: ports, and the application with the settings that follow from the deployment."""

from __future__ import annotations

import math
from typing import Any

from cluster.config import GRPC_SERVICERS, ConfigError, merge, parse_config
from cluster.deploy.config import DeployConfig
from cluster.deploy.manifests.names import (
    API_KEYS_FOLDER,
    API_KEYS_KEY,
    GRPC_PORT,
    SERVE_PORT,
    TIER_LABEL,
    Tier,
)
from cluster.deploy.sections import WorkerGroup
from cluster.deploy.sizing import Sizing

ANY_ADDRESS = "0.0.0.0"  # noqa: S104 - of a pod, whose network decides who reaches it
BETWEEN_PODS = ("tcp", "nixl")
"""Channels that cross machines."""
IMPORT_PATH = "cluster.app:build_app"


def serve_config(config: DeployConfig, sizing: Sizing) -> dict[str, Any]:
    """Ray's ServeDeploySchema. Raises ConfigError for `settings` that ShoalConfig refuses."""
    args = application_args(config, sizing)
    _check(args)
    application = {
        "name": "shoal",
        "route_prefix": "/",
        "import_path": IMPORT_PATH,
        "args": args,
    }
    grpc = {"port": GRPC_PORT, "grpc_servicer_functions": list(GRPC_SERVICERS)}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": ANY_ADDRESS, "port": SERVE_PORT},
        **({"grpc_options": grpc} if config.serves_grpc else {}),
        "logging_config": {"encoding": "JSON"},
        "applications": [application],
    }


def application_args(config: DeployConfig, sizing: Sizing) -> dict[str, Any]:
    """The tree of ShoalConfig: what follows from the deployment, `settings` on top."""
    attention, experts = config.attention, config.experts
    cache = {"engine": {"kv_cache_bytes": sizing.kv_cache_bytes}}
    args = _model(config) | {
        "channel": "tcp",
        "listen": {"host": ANY_ADDRESS, "http_port": SERVE_PORT, "grpc_port": GRPC_PORT},
        "auth": _auth(config),
        "ingress": _shares("ingress", config.ingress.pods, config.ingress.replicas_per_pod),
        "placement": _pinned("ingress"),
        "attention": _pinned("attention") | _tier(attention) | cache,
        "router": _shares("attention", attention.pods, attention.routers_per_pod),
        "experts": _pinned("experts") | _tier(experts) | _slots(sizing),
    }
    return merge(args, config.settings)


def _check(args: dict[str, Any]) -> None:
    """`settings` may be anything that the application takes and that pods can do."""
    try:
        checked = parse_config(args)
    except ConfigError as error:
        raise ConfigError(f"settings: {error}") from None
    if checked.channel not in BETWEEN_PODS:
        raise ConfigError(
            f"settings.channel = {checked.channel!r}: joins processes of one machine, pods need "
            f"{' or '.join(BETWEEN_PODS)}"
        )


def _model(config: DeployConfig) -> dict[str, Any]:
    """Nothing for the embedded model: it is the application's default."""
    given = {"model": config.model.path, "served_model_name": config.model.served_name}
    return {key: value for key, value in given.items() if value is not None}


def _auth(config: DeployConfig) -> dict[str, Any]:
    if config.auth.api_keys:
        return {"keys_file": f"{API_KEYS_FOLDER}/{API_KEYS_KEY}"}
    return {"insecure": True}


def _pinned(tier: Tier) -> dict[str, Any]:
    return {"label_selector": {TIER_LABEL: tier}}


def _shares(tier: Tier, pods: int, per_pod: int) -> dict[str, Any]:
    """Replicas without a GPU reserve nothing, so the first pod that is up would get them all. The
    others would have no replica, hence no proxy, and KubeRay would never call them ready."""
    return _pinned(tier) | {"num_workers": pods * per_pod, "max_per_node": per_pod}


def _tier(group: WorkerGroup) -> dict[str, Any]:
    """Sizes of a tier; its bounds are the worker group's, so that no replica waits for ever."""
    cpus_only = {"max_per_node": group.workers_of_a_pod, "num_gpus": 0}
    return {
        "num_workers": group.num_workers,
        **({"device": "cuda", "num_gpus": 1} if group.gpu else cpus_only),
        # In a pod the number of cores is the node's: threads would be many times too many.
        "num_threads": max(1, math.floor(group.cpus / group.workers_of_a_pod)),
        "scaling": {
            "min_workers": group.num_workers,
            "max_workers": group.max_workers,
            "follows_load": group.max_workers > group.num_workers,
        },
    }


def _slots(sizing: Sizing) -> dict[str, Any]:
    slots = {"redundancy": sizing.redundancy, "slots_per_worker": sizing.slots_per_worker}
    if sizing.spare_slots_per_worker is not None:
        slots["spare_slots_per_worker"] = sizing.spare_slots_per_worker
    return slots
