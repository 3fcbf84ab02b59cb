"""What KubeRay 1.7 refuses of a RayService although its schema allows it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests.k8s.api_server.errors import Json

LONGEST_NAME = 47
DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
DURATION = re.compile(r"(\d+(\.\d+)?(h|m|s|ms))+")
TOKEN_AUTH_RAY = (2, 52)
PRIORITY_RAY = (2, 56)
RESOURCE_PARAMETERS = {"num-cpus", "num-gpus", "memory", "resources"}
REDIS_VARIABLES = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_external_storage_namespace"}


def refusal(service: Json) -> str | None:
    """The first rule that `service` breaks; None if the operator would go on."""
    rules: tuple[Callable[[Json], Iterator[str]], ...] = (
        _metadata,
        _ports,
        _groups,
        _authentication,
        _fault_tolerance,
        _upgrade,
    )
    return next((text for rule in rules for text in rule(service)), None)


def cluster_config(service: Json) -> Json:
    config: Json = service["spec"]["rayClusterConfig"]
    return config


def head_container(config: Json) -> Json:
    container: Json = config["headGroupSpec"]["template"]["spec"]["containers"][0]
    return container


def serve_ports(config: Json) -> list[Json]:
    """The ports of the head that the Service gets."""
    return [
        port
        for port in head_container(config).get("ports") or ()
        if port.get("name") == "serve" or (port.get("name") or "").startswith("serve-")
    ]


def has_autoscaler_v2(config: Json) -> bool:
    return bool((config.get("autoscalerOptions") or {}).get("version") == "v2")


def _metadata(service: Json) -> Iterator[str]:
    name = service["metadata"]["name"]
    if len(name) > LONGEST_NAME:
        yield f"RayService name {name} has more than {LONGEST_NAME} characters"
    if not DNS_1035.fullmatch(name):
        yield f"RayService name {name} is not a DNS-1035 label"
    timeout = (service["metadata"].get("annotations") or {}).get("ray.io/initializing-timeout")
    if timeout is not None and not (DURATION.fullmatch(timeout) or timeout.isdigit()):
        yield f"annotation ray.io/initializing-timeout: {timeout} is no duration"
    head_service = cluster_config(service)["headGroupSpec"].get("headService") or {}
    if head_service.get("metadata", {}).get("name"):
        yield "headService.metadata.name must not be set"


def _ports(service: Json) -> Iterator[str]:
    if not serve_ports(cluster_config(service)) and not service["spec"].get("serveService"):
        yield "the head container has no port named 'serve'"


def _groups(service: Json) -> Iterator[str]:
    config = cluster_config(service)
    has_v2, ray = has_autoscaler_v2(config), _ray_version(config)
    for group in config.get("workerGroupSpecs") or ():
        name = f"worker group {group['groupName']}"
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if least > most:
            yield f"{name} has minReplicas {least} greater than maxReplicas {most}"
        if group.get("idleTimeoutSeconds") is not None and not has_v2:
            yield f"{name}: idleTimeoutSeconds is set, but autoscaler v2 is not enabled"
        if group.get("priority") and not (has_v2 and ray >= PRIORITY_RAY):
            yield f"{name}: priority needs autoscaler v2 and Ray {_dotted(PRIORITY_RAY)}"
        if group.get("resources") and RESOURCE_PARAMETERS & set(group.get("rayStartParams") or ()):
            yield f"{name}: resources are set in both rayStartParams and resources"
        restart = group["template"]["spec"].get("restartPolicy", "Never")
        if has_v2 and restart != "Never":
            yield f"{name}: restartPolicy must be Never or unset with autoscaler v2"


def _authentication(service: Json) -> Iterator[str]:
    config = cluster_config(service)
    options = config.get("authOptions") or {}
    if options.get("mode") == "token" and _ray_version(config) < TOKEN_AUTH_RAY:
        yield f"authOptions.mode token needs Ray {_dotted(TOKEN_AUTH_RAY)} or newer"
    if options.get("enableK8sTokenAuth"):
        yield "authOptions.enableK8sTokenAuth is not supported for RayService"


def _fault_tolerance(service: Json) -> Iterator[str]:
    config = cluster_config(service)
    if not config.get("gcsFaultToleranceOptions"):
        return
    if "redis-password" in (config["headGroupSpec"].get("rayStartParams") or {}):
        yield "redis-password is set in both rayStartParams and gcsFaultToleranceOptions"
    for variable in head_container(config).get("env") or ():
        if variable["name"] in REDIS_VARIABLES:
            yield f"{variable['name']} is set in both env and gcsFaultToleranceOptions"


def _upgrade(service: Json) -> Iterator[str]:
    strategy = service["spec"].get("upgradeStrategy") or {}
    if strategy.get("type") != "NewClusterWithIncrementalUpgrade":
        return
    if not cluster_config(service).get("enableInTreeAutoscaling"):
        yield "NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling"
    options = strategy.get("clusterUpgradeOptions")
    if not options:
        yield "NewClusterWithIncrementalUpgrade needs clusterUpgradeOptions"
    elif options.get("stepSizePercent", 0) > options.get("maxSurgePercent", 100):
        yield "stepSizePercent is greater than maxSurgePercent"


def _ray_version(config: Json) -> tuple[int, ...]:
    return tuple(int(part) for part in (config.get("rayVersion") or "0").split(".")[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
