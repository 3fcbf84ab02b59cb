"""DeployConfig -> manifests, a pure function: the same configuration gives the same objects."""

from __future__ import annotations

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest


def render(config: DeployConfig) -> list[Manifest]:
    """Every object of a deployment in the order in which they are made. Raises ConfigError."""
    return []
