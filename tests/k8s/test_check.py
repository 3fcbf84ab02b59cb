"""The offline check: good renderings pass, every seeded mistake is told with place and remedy."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest

from cluster.config import ConfigError
from cluster.deploy.check import schemas
from cluster.deploy.check.checks import check_manifests, list_notes
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.schemas import VERSIONS
from cluster.deploy.check.source import Located, load_text
from cluster.deploy.config import PRESETS, DeployConfig, parse_deploy_config
from cluster.deploy.known_models import known_model
from cluster.deploy.manifest import Manifest, dump
from cluster.deploy.render import COMPONENTS, render
from cluster.deploy.sections import INCREMENTAL
from cluster.deploy.sizing import model_sizes
from tests.k8s.seeded_mistakes import MISTAKES, Mistake, Objects

FILE = "k8s/deploy.yaml"
ALL_ON = {
    key: {"enabled": True} for key in ("monitoring", "network_policy", "gateway", "gcs_redis")
}


@functools.cache
def deploy_config(preset: str, everything: bool = True) -> DeployConfig:
    return parse_deploy_config({"preset": preset, **(ALL_ON if everything else {})})


@functools.cache
def good() -> tuple[Manifest, ...]:
    """The largest preset with every component; no part stands in two places."""
    return tuple(json.loads(json.dumps(render(deploy_config("gpu-large")))))


def check(manifests: list[Manifest]) -> list[Finding]:
    return check_manifests([Located(FILE, each) for each in manifests], sizes=known_model("v3"))


def test_every_component_is_on() -> None:
    assert set(COMPONENTS) == {"monitoring", "networkpolicy", "gateway", "gcs-redis"}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_no_mistake(preset: str, everything: bool) -> None:
    config = deploy_config(preset, everything)
    objects = load_text(dump(render(config)), FILE)
    assert [str(f) for f in check_manifests(objects, sizes=model_sizes(config.model))] == []


def test_an_incremental_upgrade_is_not_asked_for_the_grpc_that_it_cannot_have() -> None:
    upgrade = {"strategy": INCREMENTAL, "gateway_class": "envoy"}
    config = parse_deploy_config({"preset": "gpu-small", "upgrade": upgrade} | ALL_ON)
    objects = load_text(dump(render(config)), FILE)
    assert [str(f) for f in check_manifests(objects, sizes=model_sizes(config.model))] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_presets_fit_every_supported_kubernetes(version: str) -> None:
    assert check_manifests([Located(FILE, each) for each in good()], version=version) == []


def test_other_kubernetes_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"Kubernetes 1\.12: checked are 1\.30 to 1\.37"):
        check_manifests([Located(FILE, good()[0])], version="1.12")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_seeded_mistake_is_told(mistake: Mistake) -> None:
    objects = Objects(list(good()))
    mistake.change(objects)
    found = check(objects.all)
    told = [f for f in found if f.path.endswith(mistake.path) and mistake.says in f.message]
    assert len(told) == 1, "\n".join(map(str, found))
    assert mistake.fix in told[0].fix
    assert str(told[0]) == f"{FILE}: {told[0].path}: {told[0].message}; {told[0].fix}"


def test_a_finding_names_the_line_of_the_field() -> None:
    text = dump(list(good())).replace("rayVersion:", "rayVersionn:")
    (line,) = [i for i, row in enumerate(text.splitlines(), 1) if "rayVersionn" in row]
    found = check_manifests(load_text(text, FILE))
    assert any(f.file == f"{FILE}:{line}" and f.fix == "did you mean rayVersion?" for f in found)


def test_secrets_made_elsewhere_are_notes_only() -> None:
    objects = [Located(FILE, each) for each in good()]
    assert check_manifests(objects) == []
    messages = {note.message for note in list_notes(objects)}
    assert {message for message in messages if message.startswith("Secret")} == {
        f"Secret shoal-{name} is not among these objects"
        for name in ("cluster-secret", "ray-token", "api-keys", "redis")
    }


def test_memory_is_looked_at_only_where_the_model_is_known() -> None:
    objects = Objects(list(good()))
    objects.pod()["nodeSelector"]["nvidia.com/gpu.product"] = "NVIDIA-L40S"
    located = [Located(FILE, each) for each in objects.all]
    assert check_manifests(located) == []
    assert len(check_manifests(located, sizes=known_model("v3"))) == 1


def test_objects_of_unknown_groups_pass() -> None:
    text = "{apiVersion: example.org/v1, kind: Anything, metadata: {name: x}, spec: {a: 1}}"
    assert check_manifests(load_text(text, FILE)) == []


def test_without_the_schemas_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes_validate", None)
    schemas._schema.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'shoal-serve\[k8s\]'"):
        check_manifests([Located(FILE, good()[0])])
    schemas._schema.cache_clear()


def test_nothing_heavy_is_imported_to_check() -> None:
    code = "import sys, cluster.deploy.check.checks as c; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"ray", "torch", "kubernetes", "kubernetes_validate", "jsonschema", "fastapi"}
    assert heavy.isdisjoint(run.stdout.split())
