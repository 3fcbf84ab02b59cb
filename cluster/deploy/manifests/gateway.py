"""Routes of the Gateway API to the Service's two ports."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import GRPC_PORT, SERVE_PORT, manifest, serve_service

API_VERSION = "gateway.networking.k8s.io/v1"
GRPC_SERVICES = ("shoal.v1.Inference", "grpc.health.v1.Health")


def routes(config: DeployConfig) -> list[Manifest]:
    """Answers stream for as long as a model writes: no time limit."""
    http = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
        "timeouts": {"request": "0s", "backendRequest": "0s"},
        "backendRefs": [_backend(config, SERVE_PORT)],
    }
    grpc = {
        "matches": [{"method": {"service": service}} for service in GRPC_SERVICES],
        "backendRefs": [_backend(config, GRPC_PORT)],
    }
    gateway = config.gateway
    found = [_route(config, "HTTPRoute", gateway.hostname, http)]
    if config.serves_grpc:
        found.append(_route(config, "GRPCRoute", gateway.grpc_hostname, grpc))
    return found


def _route(config: DeployConfig, kind: str, hostname: str, rule: dict[str, Any]) -> Manifest:
    parent = {"name": config.gateway.name, "namespace": config.gateway.namespace}
    spec = {"parentRefs": [parent], "hostnames": [hostname], "rules": [rule]}
    return manifest(API_VERSION, kind, config, config.name, spec=spec)


def _backend(config: DeployConfig, port: int) -> dict[str, Any]:
    return {"name": serve_service(config), "port": port}
