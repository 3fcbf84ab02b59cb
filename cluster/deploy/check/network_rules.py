"""NetworkPolicies: what Ray, KubeRay and clients need gets through, and no more than that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.deploy.check.finding import Finding
from cluster.deploy.check.node import Node
from cluster.deploy.check.pod_rules import labels_of, plain_pods
from cluster.deploy.check.ray_cluster import Group
from cluster.deploy.check.ray_pods import PRIVATE_PORTS
from cluster.deploy.check.selectors import (
    allows_other_namespaces,
    allows_pods,
    allows_port,
    selects,
)
from cluster.deploy.check.source import Located

DNS_PORT = 53


def network_findings(objects: Sequence[Located], ray_pods: list[Group]) -> Iterator[Finding]:
    """The rules of all policies for one deployment."""
    policies = [each.root for each in objects if each.kind == "NetworkPolicy"]
    for root in policies:
        if not any(selects(root["spec"]["podSelector"], g.pod_labels) for g in ray_pods):
            others = [t for each in objects for t in plain_pods(each.root)]
            labels = [t["metadata"]["labels"].texts() for t in others]
            if not any(selects(root["spec"]["podSelector"], each) for each in labels):
                pods = [group.pod_labels for group in ray_pods]
                place = root["spec"]["podSelector"]
                yield place.finding("selects no pod", labels_of(pods, place))
    head = ray_pods[0]
    yield from _closed_doors(policies, head)
    for root in policies:
        if selects(root["spec"]["podSelector"], head.pod_labels):
            yield from _open_doors(root)


def _closed_doors(policies: list[Node], head: Group) -> Iterator[Finding]:
    """What must get through: rules of all policies of a pod add up."""
    mine = [root for root in policies if selects(root["spec"]["podSelector"], head.pod_labels)]
    into = [root for root in mine if _is_for(root, "Ingress")]
    rules = [rule for root in into for rule in root["spec"]["ingress"].each()]
    if into:
        place = into[0]["spec"]["ingress"]
        if not any(allows_pods(rule, "from", head.pod_labels) for rule in rules):
            message = "the pods cannot reach each other on all ports, and Ray picks them at random"
            yield place.finding(message, "allow from their own podSelector, without ports")
        for port, what in ((8265, "the dashboard"), (8000, "Serve's proxy")):
            if not any(allows_other_namespaces(rule, port) for rule in rules):
                message = f"KubeRay's operator cannot reach {what} at {port} of the head"
                fix = f"allow {port} from the namespaceSelector of the operator"
                yield place.finding(message, fix)
    out_of = [root for root in mine if _is_for(root, "Egress")]
    rules = [rule for root in out_of for rule in root["spec"]["egress"].each()]
    if out_of and not any(_allows_dns(rule) for rule in rules):
        place = out_of[0]["spec"]["egress"]
        yield place.finding("the pods cannot ask DNS", f"allow ports {DNS_PORT}, UDP and TCP")
    if out_of and not any(allows_pods(rule, "to", head.pod_labels) for rule in rules):
        place = out_of[0]["spec"]["egress"]
        message = "the pods cannot call each other on all ports"
        yield place.finding(message, "allow to their own podSelector, without ports")


def _open_doors(root: Node) -> Iterator[Finding]:
    for rule in root["spec"]["ingress"].each():
        for port, what in PRIVATE_PORTS.items():
            if not rule["from"].each() and allows_port(rule, port):
                message = f"everybody reaches {what} at {port}: they can run code"
                yield rule.finding(message, "add from, or ports that leave it out")


def _is_for(root: Node, direction: str) -> bool:
    types = [node.text for node in root["spec"]["policyTypes"].each()]
    if types:
        return direction in types
    return direction == "Ingress" or root["spec"]["egress"].given


def _allows_dns(rule: Node) -> bool:
    """DNS runs in another namespace or outside the pods' network."""
    ports = [port["port"].number for port in rule["ports"].each()]
    peers = rule["to"].each()
    elsewhere = [p for p in peers if p["namespaceSelector"].given or p["ipBlock"].given]
    return (not ports or DNS_PORT in ports) and (not peers or bool(elsewhere))
