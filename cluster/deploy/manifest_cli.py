"""`shoal k8s render` and `check`: manifests, mostly without a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_common import user_errors
from cluster.config import ConfigError
from cluster.console import stderr, stdout
from cluster.deploy.check.checks import check_manifests, list_notes
from cluster.deploy.check.schemas import NEWEST
from cluster.deploy.check.source import load
from cluster.deploy.manifest import Manifest, dump, dump_one, identity
from cluster.deploy.preflight import preflight
from cluster.deploy.session import (
    DEFAULT_CONFIG,
    ConfigOption,
    ContextOption,
    KubeconfigOption,
    Session,
)

MARKS = {"ok": ("ok", "green"), "unknown": ("?", "yellow"), "error": ("error", "red")}


def render(
    config: ConfigOption = DEFAULT_CONFIG,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder: a file for each object.")
    ] = None,
) -> None:
    """Print the manifests of a deployment."""
    with user_errors():
        manifests = Session(config).rendered
        if output is None:
            typer.echo(dump(manifests), nl=False)
            return
        try:
            output.mkdir(parents=True, exist_ok=True)
            for manifest in manifests:
                name = identity(manifest).lower().replace("/", "-")
                (output / f"{name}.yaml").write_text(dump_one(manifest))
        except OSError as error:
            raise ConfigError(f"{output}: {error.strerror}; name a folder to write to") from None
        stdout.print(f"{output}: {len(manifests)} files", markup=False, soft_wrap=True)


def check(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Manifests or folders of them; - is stdin.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Check what it renders to.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Ask the cluster too: KubeRay, GPUs, storage, rights.")
    ] = False,
    version: Annotated[
        str, typer.Option("--kubernetes-version", help="Whose schemas: 1.30 to 1.37.")
    ] = NEWEST,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Check manifests without a cluster; status 1 if there is something to mend."""
    with user_errors():
        if not files and config is None:
            raise ConfigError("nothing to check: name manifests, or a configuration with --config")
        session = Session(config or DEFAULT_CONFIG, kubeconfig, context)
        located = load(files or [])
        findings = check_manifests(located, version)
        findings += session.findings(version) if config else []
        for finding in findings:
            stdout.print(str(finding), markup=False, soft_wrap=True)
        for note in session.notes(located) if config else list_notes(located):
            stderr.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
        bodies = [each.body for each in located] + (session.rendered if config else [])
        num_errors = len(findings) + (_preflight(session, bodies) if live else 0)
        if num_errors:
            raise typer.Exit(1)
        stderr.print(f"{len(bodies)} objects, nothing to mend", style="green")


def _preflight(session: Session, manifests: list[Manifest]) -> int:
    """Print what the cluster says; how many errors there are."""
    answers = preflight(session.cluster, manifests)
    for answer in answers:
        mark, style = MARKS[answer.level]
        stdout.print(f"{mark:5}  {answer.text}", style=style, markup=False, soft_wrap=True)
    return sum(answer.level == "error" for answer in answers)
