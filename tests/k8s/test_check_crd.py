"""Our models of KubeRay's fields against its own schema, where that lies beside the repository."""

from __future__ import annotations

import functools
import json
import random
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from cluster.deploy.check.checks import check_manifests
from cluster.deploy.check.rayservice_model import MODELS, PARTS
from cluster.deploy.check.source import Located
from tests.k8s.api_server.crds import CustomResource
from tests.k8s.api_server.definitions import KUBERAY_FOLDER
from tests.k8s.seeded_mistakes import SCHEMA, Mistake, Objects
from tests.k8s.test_check import FILE, good

pytestmark = pytest.mark.skipif(
    not (KUBERAY_FOLDER / "ray.io_rayservices.yaml").is_file(),
    reason=f"no CustomResourceDefinitions of KubeRay in {KUBERAY_FOLDER}",
)
WRONG = (None, True, "text", 7, -1, 1.5, [], {}, ["x"], {"x": "y"}, "")


@functools.cache
def resource(kind: str) -> CustomResource:
    path: Path = KUBERAY_FOLDER / f"ray.io_{kind.lower()}s.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return CustomResource(yaml.load(path.read_text(), Loader=loader))  # noqa: S506


def refused(obj: dict[str, Any]) -> list[str]:
    """What KubeRay's schema says against an object."""
    found = [error.message for error in resource(obj["kind"]).errors(obj)]
    return found or [text for _, text in resource(obj["kind"]).rule_errors(obj, None)]


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, annotation) of every field of a model and those below."""
    for name, info in model.model_fields.items():
        here = f"{path}.{info.alias or name}".lstrip(".")
        yield here, info.annotation
        for below, is_list in models_in(info.annotation):
            yield from fields(below, f"{here}[]" if is_list else here)


def models_in(annotation: Any, in_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, in_list
    elif get_origin(annotation) in (Union, types.UnionType, list, Annotated):
        for part in get_args(annotation):
            yield from models_in(part, in_list or get_origin(annotation) is list)


def schema_at(kind: str, path: str) -> dict[str, Any] | None:
    schema: Any = resource(kind).structure
    for step in path.split("."):
        schema = schema.get("properties", {}).get(step.removesuffix("[]"))
        if schema is not None and step.endswith("[]"):
            schema = schema.get("items")
        if schema is None:
            return None
    return dict(schema)


@pytest.mark.parametrize("kind", MODELS)
def test_every_field_that_we_know_exists(kind: str) -> None:
    known = [path for path, _ in fields(MODELS[kind]) if not path.startswith("metadata")]
    assert len(known) > 60
    assert [path for path in known if schema_at(kind, path) is None] == []


@pytest.mark.parametrize("kind", MODELS)
def test_parts_of_kubernetes_are_fields_that_we_know(kind: str) -> None:
    known = {path for path, _ in fields(MODELS[kind])}
    assert {path.removesuffix("[]") for path in PARTS[kind]} <= known


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_fields_are_required(kind: str) -> None:
    ours = {
        f"{path}.{info.alias or name}".lstrip(".")
        for path, model in [("", MODELS[kind]), *_models_with_paths(MODELS[kind])]
        for name, info in model.model_fields.items()
        if info.is_required()
    }
    theirs = {
        f"{path}.{name}"
        for path, _ in _models_with_paths(MODELS[kind])
        for name in (schema_at(kind, path) or {}).get("required", ())
        if "default" not in (schema_at(kind, f"{path}.{name}") or {})
    }
    assert theirs <= ours


def _models_with_paths(root: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    return [
        (f"{path}[]" if is_list else path, model)
        for path, annotation in fields(root)
        for model, is_list in models_in(annotation)
    ]


def test_the_rendering_fits() -> None:
    assert refused(Objects(list(good())).service) == []


@pytest.mark.parametrize("mistake", SCHEMA, ids=lambda mistake: mistake.name)
def test_seeded_mistakes_of_the_schema_are_mistakes(mistake: Mistake) -> None:
    if "controller" in mistake.name:
        pytest.importorskip("celpy", reason="this rule is written in CEL")
    objects = Objects(list(good()))
    mistake.change(objects)
    assert refused(objects.service)


@pytest.mark.parametrize("seed", range(60))
def test_what_the_schema_refuses_we_refuse(seed: int) -> None:
    """A wrong value somewhere: KubeRay's schema must not see more than we do."""
    chance = random.Random(seed)
    service = Objects(list(good())).service
    place, key = chance.choice(list(_places(service["spec"])))
    place[key] = json.loads(json.dumps(chance.choice(WRONG)))
    if place[key] is not None and refused(service):  # the server drops a null
        assert check_manifests([Located(FILE, service)])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything below."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])
