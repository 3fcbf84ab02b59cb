"""Objects that name or select each other: whether there is anybody at the other end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.deploy.check.finding import Finding
from cluster.deploy.check.network_rules import network_findings
from cluster.deploy.check.node import Node
from cluster.deploy.check.pod_rules import containers, labels_of, plain_pods, templates
from cluster.deploy.check.ray_cluster import Group, groups
from cluster.deploy.check.selectors import selects
from cluster.deploy.check.source import Located
from cluster.deploy.manifest import CLUSTER_SCOPED
from cluster.field_names import nearest, suggest

SYSTEM_CLASSES = ("system-node-critical", "system-cluster-critical")
SCALERS = ("HorizontalPodAutoscaler", "ScaledObject")
CLOSED = ("PriorityClass", "ServiceAccount")
"""Kinds of which a set that has some has all it needs; others may be made elsewhere."""


def reference_findings(objects: Sequence[Located]) -> Iterator[Finding]:
    """Mistakes between the objects of one deployment."""
    services = [each.root for each in objects if each.kind == "RayService"]
    ray_pods = [group for root in services for group in groups(root)]
    yield from _doubles(objects)
    yield from _namespaces(objects)
    for place, kind in _references(objects):
        if not _is_known(objects, kind, place.text):
            yield from _misspelt(objects, kind, place)
    if not ray_pods:
        return
    pods = [group.pod_labels for group in ray_pods]
    pods += [t["metadata"]["labels"].texts() for each in objects for t in plain_pods(each.root)]
    for each in objects:
        if each.kind == "PodDisruptionBudget":
            yield from _budget(each.root, pods, ray_pods)
        elif each.kind == "PodMonitor":
            yield from _monitor(each.root, ray_pods)
        elif each.kind in ("HTTPRoute", "GRPCRoute"):
            yield from _route(each.root, services, objects)
        elif each.kind in SCALERS:
            yield from _scaler(each.root)
    yield from network_findings(objects, ray_pods)


def notes(objects: Sequence[Located]) -> list[Finding]:
    """What is named and not among the objects: it has to be there before they are."""
    found: dict[tuple[str, str], Finding] = {}
    for place, kind in _references(objects):
        if not _is_known(objects, kind, place.text):
            message = f"{kind} {place.text} is not among these objects"
            fix = f"it has to exist: kubectl get {kind.lower()} {place.text}"
            found.setdefault((kind, place.text), place.finding(message, fix))
    return list(found.values())


def _doubles(objects: Sequence[Located]) -> Iterator[Finding]:
    seen: set[tuple[str, str, str]] = set()
    for each in objects:
        key = (each.kind, each.namespace, each.name)
        if key in seen:
            yield each.root["metadata"]["name"].finding(
                f"a second {each.kind} {each.name}", "rename or remove one: the last one would win"
            )
        seen.add(key)


def _namespaces(objects: Sequence[Located]) -> Iterator[Finding]:
    """Kustomize's `namespace:` does not reach components: their objects land in `default`."""
    home = next((each.namespace for each in objects if each.kind == "RayService"), None)
    if home is None:
        return
    for each in objects:
        place = each.root["metadata"]["namespace"]
        if each.kind == "Namespace" and home and each.name != home:
            name = each.root["metadata"]["name"]
            yield name.finding(f"the RayService is in namespace {home}", f"write {home}")
        elif _belongs_to_us(each) and each.namespace != home:
            where = each.namespace or "that of the command"
            message = f"namespace {where}, the RayService is in {home or 'that of the command'}"
            fix = f"write namespace: {home}" if home else "give the RayService the same namespace"
            yield place.finding(message, fix)


def _belongs_to_us(each: Located) -> bool:
    """What can only do its work in the namespace of the pods."""
    elsewhere = each.root["spec"]["namespaceSelector"].given  # a PodMonitor that looks over here
    is_scoped = each.kind in CLUSTER_SCOPED or each.kind.startswith("Cluster")
    return not elsewhere and not is_scoped and each.kind not in ("ConfigMap", "PrometheusRule")


def _references(objects: Sequence[Located]) -> Iterator[tuple[Node, str]]:
    """(place with a name, kind of what it names)."""
    for each in objects:
        for template in templates(each.root):
            yield from _pod_references(template["spec"])
        if each.kind == "RayService":
            cluster = each.root["spec"]["rayClusterConfig"]
            yield cluster["authOptions"]["secretName"], "Secret"
            redis = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
            yield redis["secretKeyRef"]["name"], "Secret"


def _pod_references(spec: Node) -> Iterator[tuple[Node, str]]:
    yield spec["priorityClassName"], "PriorityClass"
    yield spec["serviceAccountName"], "ServiceAccount"
    for secret in spec["imagePullSecrets"].each():
        yield secret["name"], "Secret"
    for volume in spec["volumes"].each():
        yield volume["persistentVolumeClaim"]["claimName"], "PersistentVolumeClaim"
        yield volume["secret"]["secretName"], "Secret"
        yield volume["configMap"]["name"], "ConfigMap"
    for container in spec["initContainers"].each() + spec["containers"].each():
        for variable in container["env"].each():
            yield variable["valueFrom"]["secretKeyRef"]["name"], "Secret"
            yield variable["valueFrom"]["configMapKeyRef"]["name"], "ConfigMap"
        for source in container["envFrom"].each():
            yield source["secretRef"]["name"], "Secret"
            yield source["configMapRef"]["name"], "ConfigMap"


def _is_known(objects: Sequence[Located], kind: str, name: str) -> bool:
    built_in = name in SYSTEM_CLASSES or (kind, name) == ("ServiceAccount", "default")
    return not name or built_in or name in _names(objects, kind)


def _names(objects: Sequence[Located], kind: str) -> list[str]:
    return [each.name for each in objects if each.kind == kind]


def _misspelt(objects: Sequence[Located], kind: str, place: Node) -> Iterator[Finding]:
    names = _names(objects, kind)
    if nearest(place.text, names) or (names and kind in CLOSED):
        yield place.finding(f"no {kind} {place.text} here", suggest(place.text, names))


def _budget(root: Node, pods: list[dict[str, str]], ray_pods: list[Group]) -> Iterator[Finding]:
    selector = root["spec"]["selector"]
    if not any(selects(selector, labels) for labels in pods):
        yield selector.finding("selects no pod", labels_of(pods, selector))
    if any(selects(selector, group.pod_labels) for group in ray_pods):
        yield from _scaleless_budget(root["spec"])
    if root["spec"]["unhealthyPodEvictionPolicy"].text != "AlwaysAllow":
        message = "a pod that is not ready would hold up the drain of its node for ever"
        place = root["spec"]["unhealthyPodEvictionPolicy"]
        yield place.finding(message, "write AlwaysAllow")


def _scaleless_budget(spec: Node) -> Iterator[Finding]:
    """Of Ray's pods: only an integer minAvailable needs no scale of their owner."""
    message = "a RayCluster has no scale to reckon it from: no pod could ever be evicted"
    for key in ("maxUnavailable", "minAvailable"):
        if spec[key].given and (key == "maxUnavailable" or spec[key].number is None):
            yield spec[key].finding(message, "write an integer minAvailable, one less than pods")


def _monitor(root: Node, ray_pods: list[Group]) -> Iterator[Finding]:
    selector = root["spec"]["selector"]
    chosen = [group for group in ray_pods if selects(selector, group.pod_labels)]
    if not chosen:
        pods = [group.pod_labels for group in ray_pods]
        yield selector.finding("selects no pod", labels_of(pods, selector))
        return
    names = {
        port["name"].text
        for group in chosen
        for container in containers(group.node["template"])
        for port in container["ports"].each()
    }
    for endpoint in root["spec"]["podMetricsEndpoints"].each():
        port = endpoint["port"]
        if port.text and port.text not in names:
            yield port.finding(f"no port {port.text} in these pods", suggest(port.text, names))


def _route(root: Node, services: list[Node], objects: Sequence[Located]) -> Iterator[Finding]:
    """Backends are Services: ours, which KubeRay makes, or rendered ones."""
    ports: dict[str, set[int]] = {name: set() for name in _names(objects, "Service")}
    for service in services:
        name, numbers = _service_of(service)
        ports[name] = numbers
    for rule in root["spec"]["rules"].each():
        for backend in rule["backendRefs"].each():
            yield from _backend(backend, ports)


def _service_of(root: Node) -> tuple[str, set[int]]:
    """Name and ports of the Service that KubeRay makes for a RayService."""
    own = root["spec"]["serveService"]
    name = own["metadata"]["name"].text or f"{root['metadata']['name'].text}-serve-svc"
    head = groups(root)[0].container
    given = [port["port"].number for port in own["spec"]["ports"].each()]
    made = [port["containerPort"].number for port in head["ports"].each() if _is_served(port)]
    return name, {number for number in given or made if number is not None}


def _backend(backend: Node, ports: dict[str, set[int]]) -> Iterator[Finding]:
    name, number = backend["name"], backend["port"]
    if backend["kind"].text not in ("", "Service") or backend["namespace"].given:
        return
    known = ports.get(name.text, set())
    if name.text not in ports:
        yield name.finding(f"no Service {name.text} here", suggest(name.text, ports))
    elif number.number is not None and known and number.number not in known:
        message = f"Service {name.text} has no port {number.number}"
        yield number.finding(message, f"one of {', '.join(map(str, sorted(known)))}")


def _is_served(port: Node) -> bool:
    return port["name"].text == "serve" or port["name"].text.startswith("serve-")


def _scaler(root: Node) -> Iterator[Finding]:
    target = root["spec"]["scaleTargetRef"]["kind"]
    if target.text in ("RayService", "RayCluster"):
        message = "Ray's autoscaler owns the replicas of the groups, two would fight"
        yield target.finding(message, "remove it, set scaling in the application's args")
