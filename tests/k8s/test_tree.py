"""The Kustomize tree is what the presets give, no more and no less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import generate_k8s
from cluster.deploy.config import PRESETS, preset_config
from cluster.deploy.manifest import identity, load
from cluster.deploy.manifests.boards import WRITTEN_BY
from cluster.deploy.render import COMPONENTS, render
from cluster.deploy.tree import HEADER, tree
from tests.k8s.deployments import deployment


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return tree({name: preset_config(name) for name in PRESETS})


def test_the_committed_tree_is_up_to_date() -> None:
    assert generate_k8s.stale() == [], "run tools/generate_k8s.py"


def test_a_stale_tree_is_found_and_mended(tmp_path: Path) -> None:
    generate_k8s.write(tmp_path)
    assert generate_k8s.stale(tmp_path) == []
    (tmp_path / "overlays/cpu-dev/rayservice.yaml").write_text("kind: RayService\n")
    (tmp_path / "components/gateway/gateway.yaml").unlink()
    (tmp_path / "base/old.yaml").write_text("kind: Role\n")
    assert generate_k8s.stale(tmp_path) == [
        "base/old.yaml",
        "components/gateway/gateway.yaml",
        "overlays/cpu-dev/rayservice.yaml",
    ]
    generate_k8s.write(tmp_path)
    assert generate_k8s.stale(tmp_path) == []


def test_there_is_a_folder_for_each_preset_and_component(files: dict[str, str]) -> None:
    folders = {path.rpartition("/")[0] for path in files}
    overlays = {f"overlays/{name}" for name in PRESETS}
    components = {f"components/{name}" for name in COMPONENTS}
    by_hand = {f"components/monitoring/{name}" for name in ("dashboards", "prometheus")}
    assert folders == {"base"} | overlays | components | by_hand


def test_every_file_is_listed_in_its_folder_and_says_where_it_comes_from(
    files: dict[str, str],
) -> None:
    for path, text in files.items():
        assert HEADER in text or WRITTEN_BY in json.loads(text)["description"]
        folder, _, name = path.rpartition("/")
        if f"{folder}/kustomization.yaml" in files and name != "kustomization.yaml":
            listed = yaml.safe_load(files[f"{folder}/kustomization.yaml"])["resources"]
            assert name in listed


def test_base_is_what_all_presets_share(files: dict[str, str]) -> None:
    base = {
        identity(manifest): manifest
        for path, text in files.items()
        if path.startswith("base/") and not path.endswith("/kustomization.yaml")
        for manifest in load(text)
    }
    assert "Role/shoal-deployer" in base
    assert "RayService/shoal" not in base
    for name in PRESETS:
        rendered = {identity(m): m for m in render(preset_config(name))}
        assert base.items() <= rendered.items()


def test_what_differs_leaves_the_base() -> None:
    other = deployment("gpu-large", storage={"claim": None, "host_path": "/mnt/nvme"})
    files = tree({"cpu-dev": preset_config("cpu-dev"), "gpu-large": other})
    assert "base/namespace.yaml" not in files  # one of them is privileged
    assert "overlays/gpu-large/namespace.yaml" in files
