"""The claim that holds the checkpoint."""

from __future__ import annotations

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest
from cluster.deploy.manifests.names import manifest
from cluster.deploy.sizing import GIB, Sizing

ROOM = 1.1
"""Of a new claim, as a multiple of the checkpoint's size."""


def claims(config: DeployConfig, sizing: Sizing) -> list[Manifest]:
    """Nothing for an embedded model, a folder of the nodes, or a claim that exists."""
    claim = config.storage.claim
    if claim is None or not claim.create or config.model.is_embedded:
        return []
    size_gib = claim.size_gib or -(-int(ROOM * sizing.checkpoint_bytes) // GIB)
    spec = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": f"{size_gib}Gi"}},
    }
    if claim.storage_class is not None:
        spec["storageClassName"] = claim.storage_class
    return [manifest("v1", "PersistentVolumeClaim", config, claim.name, spec=spec)]
