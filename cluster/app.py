"""The composition root: binds the members to Ray Serve deployments. Nothing else does.

`build_app` is the import path of a Serve config file too:

    import_path: cluster.app:build_app
    args: {model: /models/deepseek-v3, experts: {num_workers: 8}}

A replica imports its member in its constructor: whoever builds the application serves nothing, and
of the others each needs its own (torch and the kernels alone take four seconds of a core).
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.autoscaling.serve_policies import autoscaling_config
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.config import (
    GRACEFUL_SHUTDOWN_S,
    SECRET_VARIABLE,
    AttentionTier,
    ConfigError,
    ExpertTier,
    Pinned,
    ShoalConfig,
    parse_config,
)
from cluster.frontend.grpc_server import GrpcMethods
from cluster.gpus import divide_gpus
from cluster.observability.logs import log_with_serve
from cluster.observability.ray_metrics import RayExport
from cluster.observability.traces import check_traces
from cluster.serve_targets import TargetWatch, ask_serve
from cluster.site import Site
from experts.messages import Role

if TYPE_CHECKING:
    from cluster.ingress import IngressMember
    from cluster.members import AttentionMember, ExpertMember, RouterMember
    from cluster.placement import PlacementMember

ENDPOINT_TIMEOUT_S = 5.0
ONE_HOST = ("unix", "shm", "cuda")
"""Channels whose endpoints are sockets in a folder."""


def build_app(args: ShoalConfig | dict[str, Any]) -> serve.Application:
    """The application of a configuration. Raises ConfigError."""
    config = args if isinstance(args, ShoalConfig) else parse_config(args)
    check_traces(config.observability)
    config = divide_gpus(config, None).config
    if config.channel in ONE_HOST and config.runtime_dir is None:
        raise ConfigError(
            f"runtime_dir = None: channel {config.channel} needs a folder for its sockets"
        )
    secret = bytes.fromhex(os.environ.get(SECRET_VARIABLE) or secrets.token_hex(32))
    directory = _deploy("Placement", PlacementReplica, config.placement)
    placement = directory.bind(config, secret)
    experts = _deploy_tier("Experts", ExpertReplica, config.experts, ExpertScaling)
    attention = _deploy_tier("Attention", AttentionReplica, config.attention, AttentionScaling)
    tiers = [experts.bind(config, secret, placement), attention.bind(config, secret, placement)]
    if config.router.mode == "deployment":
        router = config.router
        routers = _deploy(
            "Router", RouterReplica, router, router.num_gpus, num_replicas=router.num_workers
        )
        tiers.append(routers.bind(config, secret, placement))
    ingress = _deploy(
        "Ingress",
        serve.ingress()(IngressReplica),
        config.ingress,
        num_replicas=config.ingress.num_workers,
    )
    return ingress.bind(config, secret, placement, tiers)


def _deploy(
    name: str, replica: type, place: Pinned, num_gpus: float | None = None, **size: Any
) -> serve.Deployment:
    """A deployment whose replicas reserve GPUs but no CPUs: one machine must hold all of them."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": num_gpus or 0}
    if place.label_selector:
        options["label_selector"] = place.label_selector
    if place.max_per_node is not None:
        size["max_replicas_per_node"] = place.max_per_node
    with warnings.catch_warnings():  # metrics_interval_s works and has no successor in Ray 2.60
        warnings.simplefilter("ignore", DeprecationWarning)
        return serve.deployment(
            replica,
            name=name,
            ray_actor_options=options,
            max_ongoing_requests=10_000,
            health_check_period_s=2.0,
            health_check_timeout_s=10.0,
            graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
            graceful_shutdown_wait_loop_s=0.2,
            **size,
        )


def _deploy_tier(
    name: str, replica: type, tier: ExpertTier | AttentionTier, kind: type[Scaling]
) -> serve.Deployment:
    """A deployment whose size its policy decides: by the load, by command, or by both."""
    scaling = tier.scaling or kind(max_workers=tier.max_workers, follows_load=False)
    size = autoscaling_config(scaling, tier.num_workers)
    return _deploy(name, replica, tier, tier.num_gpus, autoscaling_config=size)


def _following_load(config: ShoalConfig) -> dict[Role, str]:
    """Tiers whose policy follows the load -> their deployments."""
    following: dict[Role, str] = {}
    if config.experts.follows_load:
        following["experts"] = "Experts"
    if config.attention.follows_load:
        following["attention"] = "Attention"
    return following


def _endpoint_for(config: ShoalConfig, takes_rows: bool) -> Callable[[str], str]:
    """Where a worker of this node listens. takes_rows: whether hidden states come in, the only
    thing that other memory than the socket's is worth while for."""
    if config.channel in ONE_HOST:
        folder = Path(config.runtime_dir or "")
        scheme = config.channel if takes_rows else "unix"
        return lambda worker_id: f"{scheme}:{folder / worker_id}.sock"
    address = ray.util.get_node_ip_address()
    scheme = config.channel if takes_rows else "tcp"
    return lambda worker_id: f"{scheme}:{address}:0"


def _site(
    config: ShoalConfig, secret: bytes, placement: DeploymentHandle, takes_rows: bool = False
) -> Site:
    def directory() -> str:
        return str(placement.endpoint.remote().result(timeout_s=ENDPOINT_TIMEOUT_S))

    node = ray.get_runtime_context().get_node_id()
    return Site(config, secret, directory, _endpoint_for(config, takes_rows), node)


class Replica:
    """What all replicas share: logs, metrics, and their end: Serve calls `__del__`."""

    _member: PlacementMember | ExpertMember | RouterMember | AttentionMember | IngressMember

    def __init__(self, config: ShoalConfig, role: str) -> None:
        self._observability = config.observability
        self._worker_id = f"{role}-{serve.get_replica_context().replica_id.unique_id}"
        log_with_serve(self._observability.log_format, self._observability.log_prompts)

    def _tell_ray(self) -> None:
        """From now on Ray's metrics have the member's."""
        if self._observability.metrics:
            self._export = RayExport(self._worker_id, self._member.samples)

    def __del__(self) -> None:
        if hasattr(self, "_export"):  # the constructor may have failed
            self._export.close()
        if hasattr(self, "_member"):
            self._member.close()


class PlacementReplica(Replica):
    """Deployment `Placement`."""

    _member: PlacementMember

    def __init__(self, config: ShoalConfig, secret: bytes) -> None:
        from cluster.placement import PlacementMember

        super().__init__(config, "placement")
        endpoint = _endpoint_for(config, takes_rows=False)(self._worker_id)
        self._member = PlacementMember(config, secret, endpoint)
        self._tell_ray()
        if following := _following_load(config):
            ask = partial(ask_serve, serve.get_replica_context().app_name, following)
            self._targets = TargetWatch(ask, self._member.directory.note_sizes)

    def __del__(self) -> None:
        if hasattr(self, "_targets"):
            self._targets.close()
        super().__del__()

    def endpoint(self) -> str:
        """Where the directory listens; the one call that goes through Serve."""
        return self._member.endpoint


class ExpertReplica(Replica):
    """Deployment `Experts`."""

    _member: ExpertMember

    def __init__(self, config: ShoalConfig, secret: bytes, placement: DeploymentHandle) -> None:
        from cluster.members import ExpertMember
        from experts.kernels.runtime import configure_threads

        super().__init__(config, "experts")
        configure_threads(config.threads("experts"))
        site = _site(config, secret, placement, takes_rows=True)
        self._member = ExpertMember(site, self._worker_id)
        self._tell_ray()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What ExpertLoadPolicy decides by; Serve asks about once a second."""
        return self._member.read_stats().as_metrics()


class RouterReplica(Replica):
    """Deployment `Router`."""

    def __init__(self, config: ShoalConfig, secret: bytes, placement: DeploymentHandle) -> None:
        from cluster.members import RouterMember
        from experts.kernels.runtime import configure_threads

        super().__init__(config, "router")
        configure_threads(1)
        site = _site(config, secret, placement, takes_rows=True)
        self._member = RouterMember(site, self._worker_id)
        self._tell_ray()


class AttentionReplica(Replica):
    """Deployment `Attention`."""

    _member: AttentionMember

    def __init__(self, config: ShoalConfig, secret: bytes, placement: DeploymentHandle) -> None:
        from cluster.members import AttentionMember
        from experts.kernels.runtime import configure_threads

        super().__init__(config, "attention")
        configure_threads(config.threads("attention"))
        self._member = AttentionMember(_site(config, secret, placement), self._worker_id)
        self._tell_ray()

    def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        self._member.check_health()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What AttentionLoadPolicy decides by; Serve asks about once a second."""
        return self._member.read_stats().as_metrics()


class IngressReplica(Replica, GrpcMethods):
    """Deployment `Ingress`: HTTP and gRPC."""

    _member: IngressMember

    def __init__(
        self, config: ShoalConfig, secret: bytes, placement: DeploymentHandle, tiers: list[Any]
    ) -> None:
        from cluster.ingress import IngressMember

        super().__init__(config, "ingress")
        # The tiers are bound so that Serve starts them; requests reach them over channels.
        self._member = IngressMember(_site(config, secret, placement), self._worker_id)
        self.service, self.loads = self._member.service, self._member.loads
        self._tell_ray()

    async def drain(self) -> None:
        """Take nothing new and return when every open request has ended."""
        self.loads.close()
        await self.service.drain()

    def __serve_build_asgi_app__(self) -> Any:
        # Serve's proxy echoes X-Request-Id itself.
        return self._member.http_app(echo_request_id=False)
