"""A RayService's groups of pods, as the rules ask about them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.deploy.check.node import Node
from cluster.deploy.check.syntax import quantity
from cluster.deploy.sections import INCREMENTAL

GPU = re.compile(r"[a-z0-9.-]+/gpu")
OPERATORS = re.compile(r"(!?)in\((.*)\)")
SET_BY_RAY = ("ray.io/",)
"""Prefixes of node labels that Ray and KubeRay set themselves."""


@dataclass(frozen=True)
class Group:
    """The head, or a group of workers."""

    node: Node
    name: str
    is_head: bool
    cluster_name: str

    @property
    def spec(self) -> Node:
        """Of the pod."""
        return self.node["template"]["spec"]

    @property
    def container(self) -> Node:
        """The one that runs Ray: the first."""
        return self.spec["containers"][0]

    @property
    def ray_labels(self) -> dict[str, str]:
        """What label selectors of actors look at."""
        return self.node["labels"].texts()

    @property
    def pod_labels(self) -> dict[str, str]:
        """Of the template and those that KubeRay adds."""
        return {
            **self.node["template"]["metadata"]["labels"].texts(),
            **self.ray_labels,
            "ray.io/is-ray-node": "yes",
            "ray.io/node-type": "head" if self.is_head else "worker",
            "ray.io/group": self.name,
            "ray.io/serve": "false" if self.is_head else "true",
            "ray.io/originated-from-cr-name": self.cluster_name,
            "ray.io/originated-from-crd": "RayService",
        }

    @property
    def gpus_per_pod(self) -> float:
        """As Ray counts them."""
        for place in (self.node["resources"]["GPU"], self.node["rayStartParams"]["num-gpus"]):
            if place.text:
                return quantity(place.text) or 0
        limits = self.container["resources"]["limits"].entries()
        return sum(quantity(node.value) or 0 for key, node in limits if GPU.fullmatch(key))

    @property
    def min_pods(self) -> int:
        return self._pods("minReplicas", 0)

    @property
    def max_pods(self) -> int:
        return self._pods("maxReplicas", 2**31 - 1)

    def _pods(self, key: str, default: int) -> int:
        given, hosts = self.node[key].number, self.node["numOfHosts"].number
        return (default if given is None else given) * (1 if hosts is None else hosts)

    def fits(self, selector: dict[str, str]) -> bool:
        """Whether Ray may place an actor with this label selector here."""
        return all(
            key.startswith(SET_BY_RAY) or _matches(self.ray_labels.get(key), wanted)
            for key, wanted in selector.items()
        )


def groups(root: Node) -> list[Group]:
    """Head first."""
    cluster, name = root["spec"]["rayClusterConfig"], root["metadata"]["name"].text
    head = Group(cluster["headGroupSpec"], "headgroup", True, name)
    workers = cluster["workerGroupSpecs"].each()
    return [head, *(Group(node, node["groupName"].text, False, name) for node in workers)]


def serves_grpc(root: Node) -> bool:
    """KubeRay 1.7 routes HTTP only while it upgrades step by step."""
    return root["spec"]["upgradeStrategy"]["type"].text != INCREMENTAL


def _matches(value: str | None, wanted: str) -> bool:
    """Ray's selectors: `x`, `!x`, `in(x,y)`, `!in(x,y)`."""
    if match := OPERATORS.fullmatch(wanted):
        values = [part.strip() for part in match[2].split(",")]
        return (value in values) != bool(match[1])
    if wanted.startswith("!"):
        return value != wanted[1:]
    return value == wanted
