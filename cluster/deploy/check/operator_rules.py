"""What KubeRay 1.7's controller refuses although the schema allows it.

The server takes such a RayService; its condition Ready then stays False with ValidationFailed.
"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.deploy.check.pod_rules import resource_findings
from cluster.deploy.check.syntax import (
    duration_s,
    is_dns_1035,
    is_label_key,
    is_label_value,
    version,
)

MAX_NAME = {"RayService": 47, "RayCluster": 50}
RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
TOKEN_NEEDS = (2, 52)
PRIORITY_NEEDS = (2, 56)
V2_VARIABLE = "RAY_enable_autoscaler_v2"
TIMEOUT = "ray.io/initializing-timeout"


def operator_findings(root: Node) -> Iterator[Finding]:
    """The controller's own rules, for a RayService or a RayCluster."""
    kind = root["kind"].text
    if kind not in MAX_NAME:
        return
    spec = root["spec"]
    cluster = spec["rayClusterConfig"] if kind == "RayService" else spec
    yield from _name(root, MAX_NAME[kind])
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"].each()):
        yield from _group(group)
    yield from _workers(cluster)
    yield from _autoscaler(cluster)
    yield from _auth(cluster, is_service=kind == "RayService")
    yield from _fault_tolerance(cluster, root["metadata"]["annotations"])
    if kind == "RayService":
        yield from _service(root, spec, cluster)


def _name(root: Node, longest: int) -> Iterator[Finding]:
    name = root["metadata"]["name"]
    if len(name.text) > longest:
        message = f"{len(name.text)} characters, KubeRay allows {longest}"
        yield name.finding(message, "shorten the name")
    if name.text and not is_dns_1035(name.text):
        message = f'"{name.text}" is no DNS-1035 label'
        yield name.finding(message, "use a-z, 0-9 and -, a letter first")


def _group(group: Node) -> Iterator[Finding]:
    params = group["rayStartParams"]
    if group["template"].given and not group.at("template", "spec", "containers").each():
        place = group.at("template", "spec", "containers")
        yield place.finding("no container", "add the Ray container, first in the list")
    if group["resources"].entries():
        for key in (key for key in RESOURCE_PARAMS if params[key].text):
            message = f"{key} stands here and resources are given too: KubeRay takes only one"
            yield params[key].finding(message, f"remove it, or {group['resources'].keys[-1]}")
    if params["labels"].given:
        yield params["labels"].finding("labels are no start parameter", "use the group's labels")
    for key, value in group["labels"].texts().items():
        if not is_label_key(key) or not is_label_value(value):
            message = f'"{key}: {value}" is no label'
            yield group["labels"][key].finding(message, "use letters, digits, - _ . and one /")


def _workers(cluster: Node) -> Iterator[Finding]:
    seen: set[str] = set()
    for group in cluster["workerGroupSpecs"].each():
        low, high = group["minReplicas"].number, group["maxReplicas"].number
        name = group["groupName"]
        if low is not None and high is not None and low > high:
            message = f"minReplicas {low} is more than maxReplicas {high}"
            yield group["minReplicas"].finding(message, f"lower it to {high} or raise maxReplicas")
        if name.text in seen:
            yield name.finding(f"a second group named {name.text}", "rename one of them")
        seen.add(name.text)
        if group["suspend"].value is True:
            yield group["suspend"].finding("suspended groups are refused here", "remove suspend")


def _autoscaler(cluster: Node) -> Iterator[Finding]:
    is_on = cluster["enableInTreeAutoscaling"].value is True
    wanted = cluster["autoscalerOptions"]["version"]
    is_v2 = is_on and wanted.text == "v2"
    for group in cluster["workerGroupSpecs"].each():
        if not is_on:
            for key in ("minReplicas", "maxReplicas"):
                if not group[key].given:
                    message = f"{key} must be given when enableInTreeAutoscaling is not true"
                    yield group[key].finding(message, f"add {key}")
        yield from _v2_fields(group, is_v2, version(cluster["rayVersion"].text))
    yield from resource_findings(cluster["autoscalerOptions"]["resources"])
    head = _ray_container(cluster["headGroupSpec"])
    variable = head["env"].named(V2_VARIABLE)
    if variable.given and (wanted.given or not is_on):
        message = f"{V2_VARIABLE} contradicts autoscalerOptions and enableInTreeAutoscaling"
        yield variable.finding(message, "remove it, set autoscalerOptions.version: v2")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"].each()):
        policy = group.at("template", "spec", "restartPolicy")
        if is_v2 and policy.text not in ("", "Never"):
            message = f"restartPolicy {policy.text} with autoscaler v2"
            yield policy.finding(message, "remove it: pods must not restart in place")


def _v2_fields(group: Node, is_v2: bool, ray: tuple[int, ...]) -> Iterator[Finding]:
    fix = "set enableInTreeAutoscaling: true and autoscalerOptions.version: v2"
    idle, priority = group["idleTimeoutSeconds"], group["priority"]
    if idle.given and not is_v2:
        yield idle.finding("idleTimeoutSeconds of a group needs autoscaler v2", fix)
    if idle.number is not None and idle.number < 0:
        yield idle.finding(f"{idle.number} seconds", "write 0 or more")
    if priority.number and not is_v2:
        yield priority.finding("priority of a group needs autoscaler v2", fix)
    elif priority.number and ray < PRIORITY_NEEDS:
        yield priority.finding("priority needs Ray 2.56", "raise rayVersion or remove priority")


def _auth(cluster: Node, is_service: bool) -> Iterator[Finding]:
    auth, ray = cluster["authOptions"], cluster["rayVersion"]
    if auth["mode"].text == "token" and version(ray.text) < TOKEN_NEEDS:
        message = f"token authentication needs Ray 2.52, rayVersion is {ray.text or 'not given'}"
        yield auth["mode"].finding(message, "set rayVersion to the image's Ray")
    if is_service and auth["enableK8sTokenAuth"].value is True:
        message = "not supported for a RayService"
        yield auth["enableK8sTokenAuth"].finding(message, "remove it, use mode: token")


def _fault_tolerance(cluster: Node, annotations: Node) -> Iterator[Finding]:
    options, head = cluster["gcsFaultToleranceOptions"], _ray_container(cluster["headGroupSpec"])
    params = cluster["headGroupSpec"]["rayStartParams"]
    redis = head["env"].named("RAY_REDIS_ADDRESS")
    if redis.given and (options.given or annotations["ray.io/ft-enabled"].text != "true"):
        message = "the address of Redis belongs into gcsFaultToleranceOptions"
        yield redis.finding(message, "set gcsFaultToleranceOptions.redisAddress instead")
    for place, name in (
        (params["redis-username"], "redisUsername"),
        (head["env"].named("REDIS_USERNAME"), "redisUsername"),
        (params["redis-password"], "redisPassword"),
        (head["env"].named("REDIS_PASSWORD"), "redisPassword"),
    ):
        if place.given and (options.given or name == "redisUsername"):
            message = "credentials of Redis are refused here"
            yield place.finding(message, f"set gcsFaultToleranceOptions.{name} instead")
    if not options.given:
        return
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations[key].given:
            message = "cannot stand together with gcsFaultToleranceOptions"
            yield annotations[key].finding(message, "remove the annotation")
    yield from _backend(options)


def _backend(options: Node) -> Iterator[Finding]:
    is_rocksdb, storage = options["backend"].text == "rocksdb", options["storage"]
    if is_rocksdb and not (storage["size"].given or storage["claimName"].given):
        yield storage.finding("rocksdb needs a disk", "give storage.size or storage.claimName")
    if is_rocksdb and options["redisAddress"].given:
        yield options["redisAddress"].finding("backend is rocksdb", "remove redisAddress")
    if not is_rocksdb and storage.given:
        yield storage.finding("storage is for backend rocksdb only", "remove it")
    if not is_rocksdb and not options["redisAddress"].text:
        yield options["redisAddress"].finding("redisAddress is missing", "add host:port of Redis")


def _service(root: Node, spec: Node, cluster: Node) -> Iterator[Finding]:
    timeout = root["metadata"]["annotations"][TIMEOUT]
    seconds = duration_s(timeout.text)
    if timeout.text and (seconds is None or seconds <= 0):
        yield timeout.finding(f'"{timeout.text}" is no duration', 'write such as "30m" or "2h"')
    ports = _ray_container(cluster["headGroupSpec"])["ports"]
    names = [port["name"].text for port in ports.each()]
    if not any(name == "serve" or name.startswith("serve-") for name in names):
        message = "the head's container has no port named serve: KubeRay makes no Service"
        yield ports.finding(message, "add {name: serve, containerPort: 8000}")
    name = cluster.at("headGroupSpec", "headService", "metadata", "name")
    if name.given:
        yield name.finding("KubeRay names the head's Service itself", "remove the name")
    if cluster["upgradeStrategy"].given:
        message = "the upgrade strategy of a RayService stands in spec.upgradeStrategy"
        yield cluster["upgradeStrategy"].finding(message, "move it there")
    if spec["upgradeStrategy"]["type"].text == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(spec["upgradeStrategy"]["clusterUpgradeOptions"], cluster)


def _incremental(options: Node, cluster: Node) -> Iterator[Finding]:
    if cluster["enableInTreeAutoscaling"].value is not True:
        message = "an incremental upgrade needs the autoscaler"
        yield cluster["enableInTreeAutoscaling"].finding(message, "set it to true")
    if not options.given:
        message = "an incremental upgrade needs clusterUpgradeOptions"
        fix = "add gatewayClassName, stepSizePercent, intervalSeconds"
        yield options.finding(message, fix)
        return
    surge, step = options["maxSurgePercent"], options["stepSizePercent"]
    most = 100 if surge.number is None else surge.number
    if not 0 <= most <= 100:
        yield surge.finding(f"{most} percent", "write 0 to 100")
    if step.number is not None and not 0 <= step.number <= min(most, 100):
        message = f"stepSizePercent {step.number} is not within 0 and maxSurgePercent {most}"
        yield step.finding(message, f"write at most {most}")
    interval = options["intervalSeconds"]
    if interval.number is not None and interval.number <= 0:
        yield interval.finding(f"{interval.number} seconds", "write 1 or more")


def _ray_container(group: Node) -> Node:
    return group.at("template", "spec", "containers", 0)
