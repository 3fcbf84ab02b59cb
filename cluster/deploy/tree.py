"""Presets -> the Kustomize tree k8s/, as text: pure, written by tools/generate_k8s.py.

base/ holds what is the same in all presets, overlays/ what each has of its own, components/ what a
deployment may have besides. `kubectl kustomize` of an overlay gives what `render` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest, dump, dump_one
from cluster.deploy.manifests import redis
from cluster.deploy.render import COMPONENTS, PARTS, enabled_components
from cluster.deploy.sections import GcsRedis
from cluster.deploy.sizing import size

HEADER = "# Written by tools/generate_k8s.py from cluster/deploy: change that, then run it.\n"
API_VERSIONS = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}
REDIS_COMPONENT = "gcs-redis"
Parts = dict[str, list[Manifest]]


def tree(configs: Mapping[str, DeployConfig]) -> dict[str, str]:
    """Path below k8s/ -> text. `configs`: overlay -> its configuration, of one name and namespace.

    Raises ConfigError.
    """
    overlays = {overlay: _parts(config) for overlay, config in configs.items()}
    shared = _shared(overlays)
    files = _folder("base", shared, {})
    for component in COMPONENTS:
        files |= _component(component, next(iter(configs.values())))
    for overlay, config in configs.items():
        own = {name: part for name, part in overlays[overlay].items() if name not in shared}
        used = [f"../../components/{name}" for name in enabled_components(config)]
        more = {"components": used} if used else {}
        files |= _folder(f"overlays/{overlay}", own, more, ["../../base"])
    return {path: HEADER + text for path, text in files.items()}


def _parts(config: DeployConfig) -> Parts:
    """Part -> objects, as they are before a component changes any."""
    plain = config.model_copy(update={"gcs_redis": GcsRedis(enabled=False)})
    sizing = size(plain)
    parts = {name: part(plain, sizing) for name, part in PARTS.items()}
    return {name: objects for name, objects in parts.items() if objects}


def _shared(overlays: Mapping[str, Parts]) -> Parts:
    first, *others = overlays.values()
    return {name: part for name, part in first.items() if all(o.get(name) == part for o in others)}


def _component(name: str, config: DeployConfig) -> dict[str, str]:
    more = {}
    if name == REDIS_COMPONENT:
        # JSON6902: a strategic merge would replace whole lists of a custom resource.
        path = "/spec/rayClusterConfig/gcsFaultToleranceOptions"
        patch = [{"op": "add", "path": path, "value": redis.gcs_options(config)}]
        target = {"kind": "RayService", "name": config.name}
        more = {"patches": [{"target": target, "patch": dump_one(patch)}]}
    parts = {name: COMPONENTS[name](config)}
    return _folder(f"components/{name}", parts, more, kind="Component")


def _folder(
    folder: str,
    parts: Parts,
    more: dict[str, Any],
    below: list[str] | None = None,
    kind: str = "Kustomization",
) -> dict[str, str]:
    """A file a part, and the kustomization that lists them after `below`."""
    files = {f"{folder}/{name}.yaml": dump(part) for name, part in parts.items()}
    listed = [*(below or []), *(f"{name}.yaml" for name in parts)]
    kustomization = {"apiVersion": API_VERSIONS[kind], "kind": kind, "resources": listed, **more}
    return files | {f"{folder}/kustomization.yaml": dump_one(kustomization)}
