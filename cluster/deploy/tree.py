"""Presets -> the Kustomize tree k8s/, as text: pure, written by tools/generate_k8s.py.

base/ holds what is the same in all presets, overlays/ what each has of its own, components/ what a
deployment may have besides. `kubectl kustomize` of an overlay gives what `render` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.deploy.config import DeployConfig
from cluster.deploy.manifest import Manifest, dump, dump_one
from cluster.deploy.manifests import monitoring, redis
from cluster.deploy.manifests.boards import WRITTEN_BY
from cluster.deploy.render import COMPONENTS, PARTS, enabled_components
from cluster.deploy.sections import GcsRedis
from cluster.deploy.sizing import size

HEADER = f"# {WRITTEN_BY}\n"
API_VERSIONS = {
    "Kustomization": "kustomize.config.k8s.io/v1beta1",
    "Component": "kustomize.config.k8s.io/v1alpha1",
}
REDIS_COMPONENT, MONITORING_COMPONENT = "gcs-redis", "monitoring"
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
    return {path: _with_header(path, text) for path, text in files.items()}


def _with_header(path: str, text: str) -> str:
    """JSON has no comments; the dashboards say it in their description."""
    return text if path.endswith(".json") else HEADER + text


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
    if name == MONITORING_COMPONENT:
        return _monitoring(config)
    more = {}
    if name == REDIS_COMPONENT:
        # JSON6902: a strategic merge would replace whole lists of a custom resource.
        path = "/spec/rayClusterConfig/gcsFaultToleranceOptions"
        patch = [{"op": "add", "path": path, "value": redis.gcs_options(config)}]
        target = {"kind": "RayService", "name": config.name}
        more = {"patches": [{"target": target, "patch": dump_one(patch)}]}
    parts = {name: COMPONENTS[name](config)}
    return _folder(f"components/{name}", parts, more, kind="Component")


def _monitoring(config: DeployConfig) -> dict[str, str]:
    """Dashboards are files of their own, for people who load them by hand; so are the settings of
    a Prometheus without an operator."""
    folder = f"components/{MONITORING_COMPONENT}"
    made = COMPONENTS[MONITORING_COMPONENT](config)
    boards = [object_ for object_ in made if object_["kind"] == "ConfigMap"]
    others = [object_ for object_ in made if object_["kind"] != "ConfigMap"]
    more = {"configMapGenerator": [_generator(board) for board in boards]}
    files = _folder(folder, {MONITORING_COMPONENT: others}, more, kind="Component")
    for board in boards:
        files |= {f"{folder}/dashboards/{name}": text for name, text in board["data"].items()}
    by_hand = monitoring.by_hand()
    return files | {f"{folder}/prometheus/{name}": text for name, text in by_hand.items()}


def _generator(board: Manifest) -> dict[str, Any]:
    """What makes Kustomize read a ConfigMap from files. Its name stays: nothing refers to it."""
    metadata = board["metadata"]
    return {
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "files": [f"dashboards/{name}" for name in board["data"]],
        "options": {"disableNameSuffixHash": True, "labels": metadata["labels"]},
    }


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
