"""`shoal k8s` in this process, on one namespace of the test server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from typer.testing import CliRunner

from cluster.deploy.cli import k8s_app
from cluster.deploy.config import DeployConfig, parse_deploy_config
from cluster.deploy.manifest import Manifest
from cluster.deploy.render import render

if TYPE_CHECKING:
    from tests.k8s.api_server.server import SimEnv

WAIT_S = 60
"""So long `apply` waits; a test in which nothing becomes ready must not hang."""


@dataclass(frozen=True)
class Result:
    exit_code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Both streams; what the terminal's width wrapped is one line again."""
        return " ".join(f"{self.out} {self.err}".split())


class Shoal:
    """Writes deploy.yaml and runs commands on it. The application has no Namespace object of its
    own: the test's namespace exists."""

    def __init__(self, kube: SimEnv, namespace: str, folder: Path) -> None:
        self.kube = kube
        self.namespace = namespace
        self.path = folder / "deploy.yaml"
        self.write()

    def write(self, **settings: Any) -> None:
        times = {"initializing_s": WAIT_S}
        data = {"preset": "cpu-dev", "namespace": self.namespace, "times": times}
        self._data = {**data, **settings}
        self.path.write_text(yaml.safe_dump(self._data))

    @property
    def config(self) -> DeployConfig:
        return parse_deploy_config(self._data)

    def manifests(self) -> list[Manifest]:
        return render(self.config)

    def __call__(self, command: str, *args: str, user: str = "admin", input: str = "") -> Result:
        options = ["--config", str(self.path), "--kubeconfig", str(self.kube.cluster(user))]
        result = CliRunner().invoke(k8s_app, [command, *args, *options], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Result(result.exit_code, result.stdout, result.stderr)
