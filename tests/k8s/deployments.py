"""Deployments for tests: small changes to presets, and how to find things in what is rendered."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.deploy.config import DeployConfig, parse_deploy_config
from cluster.deploy.manifest import Manifest, identity
from cluster.deploy.render import render


def deployment(preset: str = "gpu-large", **changes: Any) -> DeployConfig:
    """A preset with changes, `experts={"pods": 1}`."""
    return parse_deploy_config({"preset": preset, **changes})


def rendered(config: DeployConfig) -> dict[str, Manifest]:
    """`Kind/name` -> object."""
    manifests = render(config)
    found = {identity(manifest): manifest for manifest in manifests}
    assert len(found) == len(manifests)
    return found


def ray_service(config: DeployConfig) -> dict[str, Any]:
    """The RayService's spec."""
    return dict(rendered(config)[f"RayService/{config.name}"]["spec"])


def ray_cluster(config: DeployConfig) -> dict[str, Any]:
    """Its rayClusterConfig."""
    return dict(ray_service(config)["rayClusterConfig"])


def serve_settings(config: DeployConfig) -> dict[str, Any]:
    """Its serveConfigV2, parsed."""
    return dict(yaml.safe_load(ray_service(config)["serveConfigV2"]))


def application_args(config: DeployConfig) -> dict[str, Any]:
    """What build_app gets."""
    (application,) = serve_settings(config)["applications"]
    return dict(application["args"])


def group(config: DeployConfig, tier: str) -> dict[str, Any]:
    """A worker group."""
    groups = {g["groupName"]: g for g in ray_cluster(config)["workerGroupSpecs"]}
    return dict(groups[tier])


def templates(config: DeployConfig) -> dict[str, dict[str, Any]]:
    """Pod specs: `head`, and one a tier."""
    cluster = ray_cluster(config)
    specs = {g["groupName"]: g["template"]["spec"] for g in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **specs}
