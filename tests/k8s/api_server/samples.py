"""Small objects for tests of the servers, and what a test expects of a refusal."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.api_server.errors import ApiError, Json


def config_map(namespace: str, **data: str) -> Json:
    metadata = {"name": "settings", "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def pod(namespace: str, **spec: Any) -> Json:
    metadata = {"name": "worker", "namespace": namespace, "labels": {"tier": "experts"}}
    container = {
        "name": "ray",
        "image": "shoal:1",
        "ports": [
            {"containerPort": 8000, "name": "serve"},
            {"containerPort": 9000, "name": "serve-grpc"},
        ],
    }
    spec = {"containers": [container], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def ray_service(namespace: str, **spec: Any) -> Json:
    container = {"name": "ray-head", "image": "shoal:1"}
    head = {"template": {"spec": {"containers": [container]}}, "rayStartParams": {}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "shoal", "namespace": namespace},
        "spec": {"rayClusterConfig": {"headGroupSpec": head}, **spec},
    }


def refusal(code: int) -> Any:
    return pytest.raises(ApiError, check=lambda error: error.code == code)


def eventually(action: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Try until it is allowed: a real server learns of new roles a moment later."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            action()
            return
        except ApiError as error:
            if error.code != 403 or time.monotonic() > deadline:
                raise
