"""A Kubernetes API server for the session and a namespace for each test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.server import SimEnv
    from tests.k8s.kuberay import KubeRay
    from tests.k8s.real_api import RealEnv

    Kube = SimEnv | RealEnv


@pytest.fixture(scope="session")
def kube() -> Iterator[Kube]:
    """The server: in memory, or a real one if KUBE_APISERVER names its binary."""
    from tests.k8s.api_server.client import Client
    from tests.k8s.api_server.definitions import register
    from tests.k8s.api_server.server import SimEnv
    from tests.k8s.real_api import VARIABLE, RealEnv

    binary = os.environ.get(VARIABLE)
    with RealEnv(binary) if binary else SimEnv() as environment:
        client = Client(environment.cluster("admin"), "tests")
        register(client, environment.minor)
        client.close()
        yield environment


@pytest.fixture
def admin(kube: Kube) -> Iterator[Client]:
    """May do everything."""
    from tests.k8s.api_server.client import Client

    client = Client(kube.cluster("admin"), "tests")
    yield client
    client.close()


@pytest.fixture
def namespace(admin: Client) -> str:
    """A new, empty namespace."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    admin.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    return name


@pytest.fixture
def kuberay(kube: Kube, namespace: str) -> Iterator[Callable[..., KubeRay]]:
    """`kuberay(faults=Faults(...), serve=...)`: the operator of this test's namespace, running."""
    from tests.k8s.api_server.client import Client
    from tests.k8s.kuberay import KubeRay

    client = Client(kube.cluster("operator"), "kuberay-operator")
    started: list[KubeRay] = []

    def start(**options: Any) -> KubeRay:
        started.append(KubeRay(client, namespace, **options).start())
        return started[-1]

    yield start
    for operator in started:
        operator.close()
    client.close()
    assert not [error for operator in started for error in operator.errors]
