"""What is rendered, in the eyes of Ray Serve and of our own deployments. Starts no Ray."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from cluster.config import GRACEFUL_SHUTDOWN_S
from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.manifests.pods import DRAIN_MARGIN_S, DRAIN_VARIABLE
from tests.k8s.deployments import serve_settings, templates

with warnings.catch_warnings():  # Ray imports what pydantic deprecates
    warnings.simplefilter("ignore")
    from ray._private import ray_constants
    from ray.serve.schema import ServeDeploySchema

    from cluster.app import build_app


@pytest.fixture(params=PRESETS)
def config(request: pytest.FixtureRequest) -> Any:
    return preset_config(request.param)


def test_serve_takes_the_settings(config: Any) -> None:
    schema = ServeDeploySchema.model_validate(serve_settings(config))
    assert schema.grpc_options.port == 9000
    assert [application.name for application in schema.applications] == ["shoal"]


def test_the_application_has_our_deployments(config: Any) -> None:
    (application,) = serve_settings(config)["applications"]
    names = {name for name, _ in _deployments(build_app(application["args"]))}
    assert names == {"Placement", "Ingress", "Attention", "Router", "Experts"}


def test_its_deployments_go_to_nodes_by_label(config: Any) -> None:
    (application,) = serve_settings(config)["applications"]
    for name, deployment in _deployments(build_app(application["args"])):
        tier = {"Placement": "ingress", "Router": "attention"}.get(name, name.lower())
        assert deployment.ray_actor_options["label_selector"] == {"shoal.io/tier": tier}


def test_pods_have_longer_to_go_than_a_worker_takes_to_hand_over(config: Any) -> None:
    for tier in ("ingress", "attention", "experts"):
        spec = templates(config)[tier]
        environment = {e["name"]: e.get("value") for e in spec["containers"][0]["env"]}
        deadline_s = int(environment[DRAIN_VARIABLE])
        assert deadline_s >= GRACEFUL_SHUTDOWN_S + 30
        assert spec["terminationGracePeriodSeconds"] == deadline_s + DRAIN_MARGIN_S


def test_ray_reads_the_time_that_pods_have() -> None:
    assert hasattr(ray_constants, DRAIN_VARIABLE)


def _deployments(application: Any) -> list[tuple[str, Any]]:
    """(name, deployment) of an application and of all that is bound to it."""
    found = {application._bound_deployment.name: application._bound_deployment}
    for argument in application._bound_deployment.init_args:
        for bound in argument if isinstance(argument, list) else [argument]:
            if type(bound) is type(application):
                found |= dict(_deployments(bound))
    return sorted(found.items())
