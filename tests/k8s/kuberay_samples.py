"""A small RayService for tests of servers and operator; what Shoal deploys is not this one."""

from __future__ import annotations

from typing import Any

import yaml

from tests.k8s.api_server.errors import Json

APPLICATION = {"name": "shoal", "import_path": "cluster.app:build_app", "deployments": []}


def ray_service(namespace: str, **spec: Any) -> Json:
    """A head with the serve ports and two worker groups, `attention` and `experts`."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "shoal", "namespace": namespace},
        "spec": {
            "serveConfigV2": yaml.safe_dump({"applications": [APPLICATION]}),
            "rayClusterConfig": {
                "rayVersion": "2.60.0",
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _template("ray-head"),
                },
                "workerGroupSpecs": [_group("attention", 1, 2), _group("experts", 2, 4)],
            },
            **spec,
        },
    }


def worker_group(service: Json, index: int = 0) -> Json:
    group: Json = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][index]
    return group


def container(group: Json) -> Json:
    first: Json = group["template"]["spec"]["containers"][0]
    return first


def _group(name: str, least: int, most: int) -> Json:
    return {
        "groupName": name,
        "replicas": least,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": _template("ray-worker"),
    }


def _template(name: str) -> Json:
    ports = [
        {"containerPort": 8000, "name": "serve"},
        {"containerPort": 9000, "name": "serve-grpc"},
    ]
    return {"spec": {"containers": [{"name": name, "image": "shoal:1", "ports": ports}]}}
