"""Label selectors of Kubernetes, and what a NetworkPolicy lets through."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.deploy.check.node import Node


def selects(selector: Node, labels: Mapping[str, str]) -> bool:
    """Whether matchLabels and matchExpressions take these labels; an empty one takes all."""
    wanted = selector["matchLabels"].texts()
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    return all(_holds(expression, labels) for expression in selector["matchExpressions"].each())


def _holds(expression: Node, labels: Mapping[str, str]) -> bool:
    value, operator = labels.get(expression["key"].text), expression["operator"].text
    values = [node.text for node in expression["values"].each()]
    if operator == "In":
        return value in values
    if operator == "NotIn":
        return value not in values
    return (value is not None) == (operator == "Exists")


def allows_port(rule: Node, port: int) -> bool:
    """Whether a rule of a NetworkPolicy covers a port; one without ports covers all."""
    return not rule["ports"].each() or any(_covers(each, port) for each in rule["ports"].each())


def _covers(entry: Node, port: int) -> bool:
    if entry["protocol"].text not in ("", "TCP"):
        return False
    low, high = entry["port"].number, entry["endPort"].number
    if low is None:  # every port, or one by its name, which may be this one
        return True
    return low <= port <= (low if high is None else high)


def allows_pods(rule: Node, direction: str, labels: Mapping[str, str]) -> bool:
    """Whether a rule lets through all ports from (to) pods of its own namespace."""
    if rule["ports"].each():
        return False
    peers = rule[direction].each()
    return not peers or any(
        peer["podSelector"].given
        and not peer["namespaceSelector"].given
        and selects(peer["podSelector"], labels)
        for peer in peers
    )


def allows_other_namespaces(rule: Node, port: int) -> bool:
    """Whether a rule lets some other namespace reach a port."""
    peers = rule["from"].each()
    from_elsewhere = not peers or any(peer["namespaceSelector"].given for peer in peers)
    return from_elsewhere and allows_port(rule, port)
