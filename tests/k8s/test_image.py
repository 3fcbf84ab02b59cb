"""What the pods take for granted of their image. It is not built here."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cluster.deploy.manifests.pods import USER_ID

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def stages() -> dict[str, list[str]]:
    """Stage -> its lines, those of the stages it is made from first."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "k8s/Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            _, below, _, name = line.split()
            current = found.setdefault(name, list(found.get(below, [])))
        elif found:
            current.append(line)
    return found


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_is_this_repository_with_the_pinned_torch(
    stages: dict[str, list[str]], target: str
) -> None:
    (pin,) = [d for d in PROJECT["project"]["dependencies"] if d.startswith("torch==")]
    builder = "\n".join(stages[f"builder-{target}"])
    assert pin in builder
    assert "pip install ." in builder
    assert f"COPY --from=builder-{target} /opt/shoal /opt/shoal" in stages[target]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_as_the_pods_user_and_has_wget(
    stages: dict[str, list[str]], target: str
) -> None:
    lines = stages[target]
    assert [line for line in lines if line.startswith("USER")] == [f"USER {USER_ID}:{USER_ID}"]
    assert any("--no-install-recommends wget" in line for line in lines)
    assert not any("nvidia-cuda" in line or "cuda-toolkit" in line for line in lines)


def test_triton_finds_a_compiler_where_there_are_gpus(stages: dict[str, list[str]]) -> None:
    assert any("gcc libc6-dev" in line for line in stages["cuda"])
    assert not any("gcc" in line for line in stages["cpu"])


def test_the_image_holds_every_package_and_nothing_else() -> None:
    lines = (ROOT / "k8s/Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in lines if line.startswith("!")}
    packages = {name.partition(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert kept == packages | {"LICENSE", "README.md", "pyproject.toml"}
    assert "*" in lines


def test_every_package_of_the_deployment_is_installed() -> None:
    folders = (ROOT / "cluster/deploy").rglob("__init__.py")
    names = {".".join(path.parent.relative_to(ROOT).parts) for path in folders}
    assert names <= set(PROJECT["tool"]["setuptools"]["packages"])
