"""What Shoal needs of the pods of its RayService besides being accepted."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from cluster.config import API_KEY_VARIABLE, GRACEFUL_SHUTDOWN_S, SECRET_VARIABLE
from cluster.deploy.check.application import Application
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.deploy.check.ray_cluster import Group, serves_grpc
from cluster.deploy.check.syntax import quantity

SHM = "/dev/shm"  # noqa: S108 - where Ray keeps its object store
SECRETS = (SECRET_VARIABLE, API_KEY_VARIABLE, "RAY_AUTH_TOKEN", "REDIS_PASSWORD")
PRIVATE_PORTS = {8265: "the dashboard", 10001: "Ray's client", 6379: "the GCS"}
"""Whoever reaches one of them runs code in the cluster."""


def cluster_findings(root: Node) -> Iterator[Finding]:
    """Settings of the RayService and its cluster."""
    spec, cluster = root["spec"], root["spec"]["rayClusterConfig"]
    installed, given = version("ray"), cluster["rayVersion"]
    if given.text != installed:
        message = f"rayVersion {given.text or 'is not given'}, Shoal is made for Ray {installed}"
        yield given.finding(message, f'write "{installed}", the image has the same')
    if spec["excludeHeadPodFromServeSvc"].value is not True:
        message = "requests would go to the head, which has no replica"
        yield spec["excludeHeadPodFromServeSvc"].finding(message, "set it to true")
    if cluster["enableInTreeAutoscaling"].value is True:
        wanted = cluster["autoscalerOptions"]["version"]
        if not wanted.given:
            message = "autoscaler v2 must be spelled out, or KubeRay treats it as v1"
            yield wanted.finding(message, "write version: v2")
    auth = cluster["authOptions"]
    if auth.given and not auth["mode"].given:
        message = "without mode there is no authentication, whatever else is given"
        yield auth["mode"].finding(message, "write mode: token")
    if not serves_grpc(root) and cluster_has_grpc(cluster):
        message = "KubeRay 1.7 routes only HTTP in an incremental upgrade, gRPC breaks"
        fix = "use NewCluster, or remove the port serve-grpc"
        yield spec["upgradeStrategy"]["type"].finding(message, fix)


def cluster_has_grpc(cluster: Node) -> bool:
    """Whether the Service gets a gRPC port: KubeRay looks at the head's container."""
    ports = cluster.at("headGroupSpec", "template", "spec", "containers", 0)["ports"]
    return ports.named("serve-grpc").given


def group_findings(group: Group) -> Iterator[Finding]:
    """Of the pods of one group."""
    if group.is_head:
        yield from _head(group)
    elif (grace := group.spec["terminationGracePeriodSeconds"]).number is None or (
        grace.number <= GRACEFUL_SHUTDOWN_S
    ):
        message = (
            f"{grace.number or 30} seconds, a worker's drain takes up to {GRACEFUL_SHUTDOWN_S:.0f}"
        )
        yield grace.finding(message, "write 300")
    yield from _memory(group)
    yield from _secrets(group)


def _head(group: Group) -> Iterator[Finding]:
    cpus = group.node["rayStartParams"]["num-cpus"]
    if cpus.value not in ("0", 0) and not group.node["resources"]["CPU"].given:
        message = "Ray would place actors on the head, the one pod that must not die"
        yield cpus.finding(message, 'write num-cpus: "0"')
    if group.gpus_per_pod:
        place = group.container["resources"]["limits"]
        yield place.finding("a GPU on the head, where nothing computes", "remove it")


def _memory(group: Group) -> Iterator[Finding]:
    resources = group.container["resources"]
    for key in ("cpu", "memory"):
        if not (resources["requests"][key].given or resources["limits"][key].given):
            message = f"no request of {key}: the scheduler takes the pod for free"
            yield resources["requests"][key].finding(message, f"add requests.{key}")
    limit = quantity(resources["limits"]["memory"].value)
    if not resources["limits"]["memory"].given:
        message = "no memory limit: Ray takes all of the node's memory for its own"
        yield resources["limits"]["memory"].finding(message, "add limits.memory")
    mounts = group.container["volumeMounts"]
    shm = [mount for mount in mounts.each() if mount["mountPath"].text == SHM]
    if not shm:
        message = f"no volume at {SHM}: KubeRay's own has no limit"
        yield mounts.finding(message, "mount an emptyDir {medium: Memory, sizeLimit: ...} there")
        return
    volume = group.spec["volumes"].named(shm[0]["name"].text)["emptyDir"]
    size = quantity(volume["sizeLimit"].value)
    if volume.given and size is None:
        yield volume["sizeLimit"].finding(f"{SHM} has no limit", "add sizeLimit")
    elif size is not None and limit is not None and size >= limit:
        message = (
            f"{SHM} may take {volume['sizeLimit'].value}, the container's memory limit is "
            f"{resources['limits']['memory'].value} and counts it"
        )
        yield volume["sizeLimit"].finding(message, "lower sizeLimit or raise limits.memory")


def _secrets(group: Group) -> Iterator[Finding]:
    env = group.container["env"]
    for variable in env.each():
        if variable["name"].text in SECRETS and variable["value"].text:
            message = f"{variable['name'].text} stands here for all to read"
            yield variable["value"].finding(
                message, "take it from a Secret: valueFrom.secretKeyRef"
            )
    if not env.named(SECRET_VARIABLE).given:
        message = f"{SECRET_VARIABLE} is missing: members could not prove who they are"
        yield env.finding(message, "add it with valueFrom.secretKeyRef, the same for all pods")


def port_findings(app: Application, root: Node, groups: list[Group]) -> Iterator[Finding]:
    """serveConfigV2, containers and Service agree about the ports."""
    service = root["spec"]["serveService"]["spec"]
    for name in ("serve", "serve-grpc"):
        number, said = app.port(name)
        for group in groups:
            port = group.container["ports"].named(name)["containerPort"]
            if port.number is not None and port.number != number:
                message = f"port {name} is {port.number}, serveConfigV2 says {number}"
                yield port.finding(message, f"write {number} in both")
        place = groups[0].container["ports"]
        if name == "serve-grpc" and serves_grpc(root) and not place.named(name).given:
            # A missing `serve` is the operator's refusal.
            message = f"no port {name}: the Service would not reach gRPC at {number}"
            yield place.finding(message, f"add {{name: {name}, containerPort: {number}}}")
        port = service["ports"].named(name)
        target = port["targetPort"] if port["targetPort"].given else port["port"]
        if target.number is not None and target.number != number:
            message = f"the Service sends {name} to {target.number}, serveConfigV2 says {number}"
            yield target.finding(message, f"write {number}")
        if name == "serve-grpc" and port.given and port["appProtocol"].text != "kubernetes.io/h2c":
            message = "gateways would speak HTTP/1 to gRPC"
            yield port["appProtocol"].finding(message, "write kubernetes.io/h2c")
    for port in service["ports"].each():
        target = port["targetPort"] if port["targetPort"].given else port["port"]
        if target.number in PRIVATE_PORTS:
            message = f"{PRIVATE_PORTS[target.number]} in the Service of clients: they can run code"
            yield port.finding(message, "remove it; shoal k8s forward reaches it")


def file_findings(app: Application, groups: list[Group]) -> Iterator[Finding]:
    """The file with the API keys is mounted where requests arrive."""
    keys = app.config.auth.keys_file
    ingress = next(each for each in app.deployments if each.name == "Ingress")
    homes = [g for g in groups if not g.is_head and g.fits(ingress.label_selector)]
    for group in homes if keys else ():
        mounts = group.container["volumeMounts"]
        if not any(_holds(mount["mountPath"].text, str(keys)) for mount in mounts.each()):
            message = f"auth.keys_file is {keys}, and nothing is mounted there"
            yield mounts.finding(message, "mount the Secret with the API keys at its folder")


def _holds(folder: str, file: str) -> bool:
    return bool(folder) and file.startswith(folder.rstrip("/") + "/")
