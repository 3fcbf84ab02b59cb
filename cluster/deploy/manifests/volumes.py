"""What is mounted into the pods: the model, shared memory, API keys."""

from __future__ import annotations

from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifests.names import API_KEYS_FOLDER, api_keys_secret
from cluster.deploy.sizing import SHM_BYTES

Volume = tuple[dict[str, Any], dict[str, Any]]
"""(volume of the pod, mount of its container)"""
SHM = "/dev/shm"  # noqa: S108 - where Ray keeps its object store


def quantity(size_bytes: float) -> str:
    """In the largest binary unit that needs no fraction."""
    for unit, size in (("Gi", 2**30), ("Mi", 2**20), ("Ki", 2**10)):
        if size_bytes % size == 0:
            return f"{int(size_bytes // size)}{unit}"
    return str(int(size_bytes))


def shared_memory() -> Volume:
    """KubeRay's own has no limit; what is in it counts as the container's memory."""
    volume = {
        "name": "shared-mem",
        "emptyDir": {"medium": "Memory", "sizeLimit": quantity(SHM_BYTES)},
    }
    return volume, {"name": "shared-mem", "mountPath": SHM}


def model(config: DeployConfig) -> list[Volume]:
    """Nothing for the embedded model, which is in the image."""
    storage = config.storage
    if config.model.is_embedded:
        return []
    mount = {"name": "models", "mountPath": storage.mount_path, "readOnly": True}
    if storage.claim is not None:
        source = {"persistentVolumeClaim": {"claimName": storage.claim.name, "readOnly": True}}
    else:
        source = {"hostPath": {"path": storage.host_path, "type": "Directory"}}
    return [({"name": "models", **source}, mount)]


def api_keys(config: DeployConfig) -> list[Volume]:
    """As a file, which follows the Secret; an environment variable would not."""
    if not config.auth.api_keys:
        return []
    secret = {"secretName": api_keys_secret(config), "defaultMode": 0o440}
    mount = {"name": "api-keys", "mountPath": API_KEYS_FOLDER, "readOnly": True}
    return [({"name": "api-keys", "secret": secret}, mount)]
