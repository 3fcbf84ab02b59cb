"""What the `shoal k8s` commands share: options, the configuration, the cluster."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import typer

from cluster.deploy.api import Cluster, Ref
from cluster.deploy.apply import stamped
from cluster.deploy.check.checks import check_manifests, list_notes
from cluster.deploy.check.finding import Finding
from cluster.deploy.check.schemas import NEWEST
from cluster.deploy.check.source import Located
from cluster.deploy.config import DeployConfig, read_deploy_config
from cluster.deploy.follow import Deployment
from cluster.deploy.manifest import Manifest
from cluster.deploy.render import render
from cluster.deploy.secrets import missing_secrets
from cluster.deploy.sizing import model_sizes

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", help="What to deploy.", show_default=True)
]
KubeconfigOption = Annotated[
    Path | None, typer.Option(help="Instead of $KUBECONFIG or ~/.kube/config.", show_default=False)
]
ContextOption = Annotated[
    str | None, typer.Option(help="Of the kubeconfig; else its current one.", show_default=False)
]
DEFAULT_CONFIG = Path("deploy.yaml")


@dataclass(frozen=True)
class Session:
    """One command's view of one deployment; reads files and connects when first asked."""

    path: Path
    kubeconfig: Path | None = None
    context: str | None = None

    @cached_property
    def config(self) -> DeployConfig:
        return read_deploy_config(self.path)

    @cached_property
    def rendered(self) -> list[Manifest]:
        return render(self.config)

    @cached_property
    def manifests(self) -> list[Manifest]:
        """As `shoal k8s apply` applies them."""
        return stamped(self.rendered)

    @property
    def located(self) -> list[Located]:
        return [Located(str(self.path), each) for each in self.rendered]

    def findings(self, version: str = NEWEST) -> list[Finding]:
        """Mistakes in what is rendered, model sizes included. `version`: of Kubernetes."""
        return check_manifests(self.located, version, sizes=model_sizes(self.config.model))

    def notes(self, located: Iterable[Located] = ()) -> list[Finding]:
        """What one should know of them, and of others beside them, before they are applied. The
        Secrets of a configuration need not exist: `apply` makes them."""
        made = [spec.manifest("") for spec in missing_secrets(self.config)]
        secrets = [Located(str(self.path), each) for each in made]
        return list_notes([*located, *self.located, *secrets])

    @cached_property
    def cluster(self) -> Cluster:
        return Cluster(self.kubeconfig, self.context)

    @cached_property
    def deployment(self) -> Deployment:
        return Deployment(self.cluster, self.config.namespace, self.config.name)

    @property
    def service(self) -> Ref:
        return self.deployment.ref


def read_secret_command(config: DeployConfig, name: str, key: str) -> str:
    """How to read a Secret of the deployment; its value is never printed by us."""
    path = f"'{{.data.{key}}}'"
    return f"kubectl -n {config.namespace} get secret {name} -o jsonpath={path} | base64 -d"
