"""`shoal k8s scale`, `logs`, `forward` and `down`: a deployment that runs."""

from __future__ import annotations

import threading
from typing import Annotated, Any

import typer

from cluster.cli_common import user_errors
from cluster.config import ConfigError
from cluster.console import Stage, Stages, stderr, stdout
from cluster.deploy.api import Ref
from cluster.deploy.api_errors import Forbidden
from cluster.deploy.config import DeployConfig
from cluster.deploy.down import live_clusters, ours, take_down
from cluster.deploy.forward import Forwarder, Port, ready_pods, shown_cluster
from cluster.deploy.logs import follow_logs, named_pods, pods_of_tier, show_logs
from cluster.deploy.manifests.names import (
    API_KEYS_KEY,
    DASHBOARD_PORT,
    GRPC_PORT,
    SERVE_PORT,
    TOKEN_KEY,
    api_keys_secret,
    token_secret,
)
from cluster.deploy.scale import Bounds, empty_pods, parse_bounds, serve_bounds
from cluster.deploy.scale import scale as set_bounds
from cluster.deploy.secrets import missing_secrets
from cluster.deploy.sections import IngressGroup
from cluster.deploy.session import (
    DEFAULT_CONFIG,
    ConfigOption,
    ContextOption,
    KubeconfigOption,
    Session,
    read_secret_command,
)

DELETE_TIMEOUT_S = 60.0
"""For finalizers, besides the time that pods may take to end."""


def scale(
    tier: Annotated[str, typer.Argument(help="experts, attention or ingress.")],
    pods: Annotated[str, typer.Argument(metavar="MIN[-MAX]", help="Pods, as in 3 or 2-6.")],
    config: ConfigOption = DEFAULT_CONFIG,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Change how many pods a tier may have, in the RayService and in the running cluster."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        bounds = parse_bounds(pods)
        live = session.cluster.get(session.service)
        if live and (empty := empty_pods(live, tier, bounds)):
            fix = f"raise {tier}.pods in {config} and apply, or lower the minimum"
            raise ConfigError(f"{tier} {bounds}: {empty[0].message}, never to become ready: {fix}")
        for change in set_bounds(session.cluster, session.service, tier, bounds):
            text = f"{change.identity}: {change.group} {change.before} -> {change.after} pods"
            stdout.print(text, markup=False, soft_wrap=True)
        workers = serve_bounds(live, tier) if live else None
        if workers is not None:
            _print_workers(session.config, tier, bounds, workers)
        stderr.print(f"{config}: write the numbers there too, or the next apply asks about them")


def _print_workers(config: DeployConfig, tier: str, bounds: Bounds, workers: Bounds) -> None:
    """Pods are only room: the application decides how many workers there are."""
    group = getattr(config, tier)
    is_fixed = isinstance(group, IngressGroup)
    per_pod = group.replicas_per_pod if is_fixed else group.workers_of_a_pod
    stdout.print(f"the application keeps {workers} workers there, {per_pod} a pod")
    if bounds.high * per_pod > workers.high:
        idle = f"pods beyond {-(-workers.high // per_pod)} stay empty"
        fix = f"raise {tier}.{'pods' if is_fixed else 'max_pods'} in the configuration and apply"
        stdout.print(f"{idle}: {fix}", style="yellow", soft_wrap=True)
    if bounds.high * per_pod < workers.low:
        text = f"fewer than the application needs: some of its {workers.low} workers will wait"
        stdout.print(text, style="yellow", soft_wrap=True)


def logs(
    tier: Annotated[
        str | None, typer.Argument(help="experts, attention, ingress or head; else all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until Ctrl-C.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Last lines of each pod.")] = 50,
    config: ConfigOption = DEFAULT_CONFIG,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Print logs of a tier's pods, each line with its pod's name. While an init container runs, its
    own."""
    with user_errors():
        session = Session(config, kubeconfig, context)

        def pods() -> list[dict[str, Any]]:
            seen = session.deployment.observe()
            return seen.pods if seen else []

        chosen = named_pods(pods(), tier)
        lines = (
            follow_logs(session.cluster, lambda: pods_of_tier(pods(), tier), tail)
            if follow
            else show_logs(session.cluster, chosen, tail)
        )
        for pod, line in lines:
            typer.echo(f"{pod}  {line}")


def forward(
    http: Annotated[int, typer.Option(help="Local port of the HTTP API.")] = SERVE_PORT,
    grpc: Annotated[int, typer.Option(help="Local port of the gRPC API.")] = GRPC_PORT,
    dashboard: Annotated[int, typer.Option(help="Local port of the dashboard.")] = DASHBOARD_PORT,
    config: ConfigOption = DEFAULT_CONFIG,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Reach a deployment on this machine's loopback until Ctrl-C. Port 0 takes any free one."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        deployed = session.config
        ports = [
            Port("http", http, SERVE_PORT, "serve"),
            Port("gRPC", grpc, GRPC_PORT, "serve"),
            Port("dashboard", dashboard, DASHBOARD_PORT, "head"),
        ]
        forwarder = Forwarder(lambda role: _pods(session, role), session.cluster.port_forward, _say)
        _pods(session, "serve")  # an API server or a deployment that is absent shows here
        with forwarder.listening(ports) as (http, grpc, dashboard):
            stdout.print(f"http://127.0.0.1:{http}/v1", f"gRPC 127.0.0.1:{grpc}")
            stdout.print(f"dashboard http://127.0.0.1:{dashboard}, its token:")
            _print_command(read_secret_command(deployed, token_secret(deployed), TOKEN_KEY))
            if deployed.auth.api_keys:
                stdout.print("API keys:")
                name = api_keys_secret(deployed)
                _print_command(read_secret_command(deployed, name, API_KEYS_KEY))
            threading.Event().wait()


def _pods(session: Session, role: str) -> list[Ref]:
    """Ready pods of the cluster that serves, else of the one that is being built."""
    service = session.cluster.get(session.service)
    if service is None:
        raise ConfigError(f"{session.service} does not exist: `shoal k8s apply` makes it")
    return ready_pods(session.cluster, session.config.namespace, shown_cluster(service), role)


def _say(text: str) -> None:
    stderr.print(text, style="yellow", markup=False, soft_wrap=True)


def _print_command(command: str) -> None:
    stdout.print(f"  {command}", markup=False, soft_wrap=True)


def down(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    delete_data: Annotated[
        bool, typer.Option("--delete-data", help="Volumes and Secrets too.")
    ] = False,
    config: ConfigOption = DEFAULT_CONFIG,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Delete a deployment; its volumes, Secrets and namespace are kept."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        refs, hidden = _to_delete(session, delete_data)
        for kind in hidden:
            _say(f"{kind}: you may not list them; any are left in place")
        if not refs:
            stdout.print(f"nothing to delete in namespace {session.config.namespace}")
            return
        for ref in refs:
            stdout.print(f"  {ref}", markup=False)
        if not yes and not typer.confirm(f"Delete these {len(refs)} objects?"):
            raise typer.Exit(1)
        timeout_s = session.config.times.termination_s + DELETE_TIMEOUT_S
        with Stages() as stages:
            take_down(
                session.cluster,
                session.service,
                refs,
                timeout_s,
                show=lambda text: stages.show(Stage(text)),
                warn=_say,
            )
        kept = "" if delete_data else "; volumes and Secrets are kept, --delete-data deletes them"
        stdout.print(f"{session.service} is gone{kept}", soft_wrap=True)


def _to_delete(session: Session, delete_data: bool) -> tuple[list[Ref], list[str]]:
    """What is there of the deployment, its PriorityClasses included; also RayClusters that an
    earlier `down` did not see go."""
    config = session.config
    found, hidden = ours(session.cluster, config.namespace, config.name, with_claims=delete_data)
    refs = [Ref.of(each) for each in found]
    if session.service not in refs:
        refs += [Ref.of(each) for each in live_clusters(session.cluster, session.service)]
    named = [Ref.of(each) for each in session.manifests if each["kind"] == "PriorityClass"]
    if delete_data:
        named += [
            Ref("v1", "Secret", spec.name, spec.namespace) for spec in missing_secrets(config)
        ]
    for ref in named:
        try:
            if session.cluster.get(ref) is not None:
                refs.append(ref)
        except Forbidden:
            hidden.append(str(ref))
    return refs, hidden
