"""What an API server refuses in a pod although the schema allows it.

In a RayService such a pod fails when the operator creates it, long after `apply` said yes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.deploy.check.schemas import shown
from cluster.deploy.check.syntax import (
    is_dns_label,
    is_label_key,
    is_label_value,
    is_port_name,
    quantity,
)
from cluster.field_names import suggest

EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")
OPERATORS = ("Exists", "Equal", "Lt", "Gt")
PROTOCOLS = ("TCP", "UDP", "SCTP")
CHOICES = {
    "restartPolicy": ("Always", "OnFailure", "Never"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
}
TEMPLATES = {
    "Pod": ((),),
    "Deployment": (("spec", "template"),),
    "StatefulSet": (("spec", "template"),),
    "DaemonSet": (("spec", "template"),),
    "Job": (("spec", "template"),),
    "CronJob": (("spec", "jobTemplate", "spec", "template"),),
}


def templates(root: Node) -> list[Node]:
    """The pod templates of an object."""
    kind = root["kind"].text
    if kind in ("RayService", "RayCluster"):
        cluster = root["spec"]["rayClusterConfig"] if kind == "RayService" else root["spec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"].each()]
        return [group["template"] for group in groups]
    return [root.at(*keys) for keys in TEMPLATES.get(kind, ())]


def plain_pods(root: Node) -> list[Node]:
    """The pod templates of an object that is no Ray cluster."""
    return [] if root["kind"].text in ("RayService", "RayCluster") else templates(root)


def labels_of(pods: list[dict[str, str]], selector: Node) -> str:
    """What the pods have under the keys that a selector asks for, for a message."""
    asked = [each["key"].text for each in selector["matchExpressions"].each()]
    asked += selector["matchLabels"].texts()
    pairs = {f"{k}: {v}" for labels in pods for k, v in labels.items() if k in asked}
    return f"pods have {', '.join(sorted(pairs)) or 'no such labels'}"


def containers(template: Node) -> list[Node]:
    """All containers of a pod, those that run before it included."""
    spec = template["spec"]
    return spec["initContainers"].each() + spec["containers"].each()


def metadata_findings(metadata: Node) -> Iterator[Finding]:
    """Labels and annotations of any object."""
    for name in ("labels", "annotations"):
        for key, value in metadata[name].entries():
            if not is_label_key(key):
                message = f'"{key}" is no key of {name}'
                yield value.finding(message, "use letters, digits, - _ . and at most one /")
            elif name == "labels" and value.text and not is_label_value(value.text):
                message = f"{shown(value.text)} is no label value"
                yield value.finding(message, "use at most 63 letters, digits, - _ .")


def pod_findings(root: Node) -> Iterator[Finding]:
    """The rules for every pod that an object makes."""
    for template in templates(root):
        yield from metadata_findings(template["metadata"])
        spec = template["spec"]
        claims = root["spec"]["volumeClaimTemplates"].each()
        yield from _volumes(spec, [claim["metadata"]["name"].text for claim in claims])
        for rule in (_names, _ports, _resources, _tolerations, _choices, _spread):
            yield from rule(spec)


def _names(spec: Node) -> Iterator[Finding]:
    for kind in ("initContainers", "containers"):
        for container in spec[kind].each():
            name = container["name"]
            if name.text and not is_dns_label(name.text):
                yield name.finding(f"{shown(name.text)} is no name", "use a-z, 0-9 and -")
            if kind == "containers" and not container["image"].text:
                yield container["image"].finding("image is missing", "name the image")
            for variable in container["env"].each():
                yield from _variable(variable)
    every = [c["name"].text for c in spec["initContainers"].each() + spec["containers"].each()]
    for double, times in Counter(every).items():
        if times > 1 and double:
            message = f"{times} containers named {double}"
            yield spec["containers"].finding(message, "rename all but one")


def _variable(variable: Node) -> Iterator[Finding]:
    source = variable["valueFrom"]
    if variable["value"].text and source.given:
        yield variable.finding("value and valueFrom exclude each other", "remove one of them")
    if source.given and len([1 for _, node in source.entries() if node.given]) != 1:
        yield source.finding("exactly one source is possible", "keep one, such as secretKeyRef")


def _volumes(spec: Node, claimed: list[str]) -> Iterator[Finding]:
    """`claimed`: names of the volumes that a StatefulSet makes for each pod."""
    names = [volume["name"].text for volume in spec["volumes"].each()]
    for volume in spec["volumes"].each():
        name = volume["name"]
        if name.text and not is_dns_label(name.text):
            yield name.finding(f"{shown(name.text)} is no name", "use a-z, 0-9 and -")
        kinds = [key for key, node in volume.entries() if key != "name" and node.given]
        if len(kinds) > 1:
            message = f"a volume of several kinds: {', '.join(kinds)}"
            yield volume.finding(message, "keep one of them")
        yield from _quantity(volume["emptyDir"]["sizeLimit"])
    for container in spec["initContainers"].each() + spec["containers"].each():
        yield from _mounts(container["volumeMounts"], names + claimed)


def _mounts(mounts: Node, names: list[str]) -> Iterator[Finding]:
    paths: set[str] = set()
    for mount in mounts.each():
        name, path = mount["name"], mount["mountPath"]
        if name.text and name.text not in names:
            message = f"no volume named {name.text} in this pod"
            fix = suggest(name.text, names) if names else "add it to the pod's volumes"
            yield name.finding(message, fix)
        if path.text and path.text in paths:
            yield path.finding(f"{path.text} is mounted twice", "mount it once")
        paths.add(path.text)


def _ports(spec: Node) -> Iterator[Finding]:
    for container in spec["initContainers"].each() + spec["containers"].each():
        names: set[str] = set()
        for port in container["ports"].each():
            name, number = port["name"], port["containerPort"]
            if name.text and not is_port_name(name.text):
                message = f"{shown(name.text)} is no port name"
                fix = "use at most 15 of a-z, 0-9 and -, one of them a letter"
                yield name.finding(message, fix)
            if name.text and name.text in names:
                yield name.finding(f"a second port named {name.text}", "rename one of them")
            names.add(name.text)
            if number.number is not None and not 1 <= number.number <= 65535:
                yield number.finding(f"{number.number} is no port", "write 1 to 65535")
            yield from _one_of(port["protocol"], PROTOCOLS)


def _resources(spec: Node) -> Iterator[Finding]:
    for container in spec["initContainers"].each() + spec["containers"].each():
        yield from resource_findings(container["resources"])


def resource_findings(resources: Node) -> Iterator[Finding]:
    """Requests and limits of a container."""
    requests, limits = resources["requests"], resources["limits"]
    for _, node in requests.entries() + limits.entries():
        yield from _quantity(node)
    for key, node in requests.entries():
        asked, most = quantity(node.value), quantity(limits[key].value)
        if is_device(key) and asked is not None and asked != most:
            message = f"request {node.value} of {key} without the same limit"
            yield node.finding(message, f"set limits and requests of {key} alike")
        elif asked is not None and most is not None and asked > most:
            message = f"request {node.value} of {key} is more than the limit"
            yield node.finding(message, f"write at most {limits[key].value}")
    for key, node in limits.entries():
        amount = quantity(node.value)
        if is_device(key) and amount is not None and amount != int(amount):
            yield node.finding(f"{node.value} of {key}", "devices come whole: an integer")


def is_device(resource: str) -> bool:
    """An extended resource, such as nvidia.com/gpu: never more in the limit than requested."""
    return "/" in resource and "kubernetes.io/" not in resource


def _quantity(node: Node) -> Iterator[Finding]:
    amount = quantity(node.value)
    if node.given and isinstance(node.value, (str, int, float)) and amount is None:
        yield node.finding(f"{shown(node.value)} is no quantity", "write such as 500m, 4 or 16Gi")
    if amount is not None and amount < 0:
        yield node.finding(f"{node.value} is negative", "write 0 or more")


def _tolerations(spec: Node) -> Iterator[Finding]:
    for toleration in spec["tolerations"].each():
        yield from _one_of(toleration["effect"], EFFECTS)
        yield from _one_of(toleration["operator"], OPERATORS)
        operator, key = toleration["operator"].text or "Equal", toleration["key"]
        if operator == "Exists" and toleration["value"].text:
            message = "operator Exists takes no value"
            yield toleration["value"].finding(message, "remove it, or use operator: Equal")
        if not key.text and operator != "Exists":
            yield key.finding("key is missing", "add it, or use operator: Exists for all taints")


def _choices(spec: Node) -> Iterator[Finding]:
    for key, allowed in CHOICES.items():
        yield from _one_of(spec[key], allowed)
    grace = spec["terminationGracePeriodSeconds"]
    if grace.number is not None and grace.number < 0:
        yield grace.finding(f"{grace.number} seconds", "write 0 or more")
    for key, value in spec["nodeSelector"].entries():
        if not is_label_key(key) or not is_label_value(value.text):
            message = f'"{key}: {value.text}" is no label'
            yield value.finding(message, "write it as the nodes have it: kubectl get node -L")


def _spread(spec: Node) -> Iterator[Finding]:
    for constraint in spec["topologySpreadConstraints"].each():
        yield from _one_of(constraint["whenUnsatisfiable"], ("DoNotSchedule", "ScheduleAnyway"))
        skew = constraint["maxSkew"]
        if skew.number is not None and skew.number < 1:
            yield skew.finding(f"maxSkew {skew.number}", "write 1 or more")


def _one_of(node: Node, allowed: tuple[str, ...]) -> Iterator[Finding]:
    if node.text and node.text not in allowed:
        yield node.finding(f"{shown(node.text)} is not allowed", f"one of {', '.join(allowed)}")
