"""`shoal k8s diff`, `apply` and `status`: change the cluster, and see what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.live import Live

from cluster.cli_common import JsonOption, user_errors
from cluster.config import ConfigError, StartFailed
from cluster.console import Stages, stderr, stdout
from cluster.deploy.api import Ref
from cluster.deploy.apply import ApplyRefused, Step, apply_all, make_secret, rehearse
from cluster.deploy.differ import cluster_changes, settings_differ, unified_diff
from cluster.deploy.down import obsolete, ours
from cluster.deploy.follow import Follower
from cluster.deploy.manifest import identity
from cluster.deploy.manifests.names import API_KEYS_KEY, api_keys_secret
from cluster.deploy.scale import copy_bounds
from cluster.deploy.secrets import missing_secrets
from cluster.deploy.session import (
    DEFAULT_CONFIG,
    ConfigOption,
    ContextOption,
    KubeconfigOption,
    Session,
    read_secret_command,
)
from cluster.deploy.status_view import progress, render_status, to_json
from cluster.deploy.verdict import Verdict

DIFF_STYLES = {"+": "green", "-": "red", "@": "cyan"}
OPERATORS_MINUTE_S = 60.0
"""KubeRay itself says when the time is up: it must come first."""


def diff(
    config: ConfigOption = DEFAULT_CONFIG,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Show what apply would change; status 1 if anything."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        try:
            steps = rehearse(session.cluster, session.manifests)
        except ApplyRefused as refused:
            _print_lines(refused.problems, "yellow")
            steps = rehearse(session.cluster, session.manifests, force=True, anyway=True)
        steps += _missing_secrets(session)
        for step in steps:
            _print_diff(step)
        for extra in obsolete(ours(session.cluster, *_place(session))[0], session.manifests):
            text = f"{identity(extra)}: no longer rendered; apply --prune deletes it"
            stdout.print(text, markup=False, soft_wrap=True)
        if any(step.action in ("created", "configured") for step in steps):
            raise typer.Exit(1)


def apply(
    config: ConfigOption = DEFAULT_CONFIG,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Let the server say what would happen.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it serves.")] = True,
    timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds to wait; else times.initializing_s and a minute.",
            show_default=False,
            min=1,
        ),
    ] = None,
    force_conflicts: Annotated[
        bool, typer.Option("--force-conflicts", help="Take fields that others have set.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Also what KubeRay will take only half of.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete what is no longer rendered; never data.")
    ] = False,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Make the cluster as the configuration says, and wait until it serves."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        if findings := session.findings():
            _print_lines(map(str, findings), "red")
            raise ConfigError(f"{config}: {len(findings)} mistakes; nothing was changed")
        _print_lines((f"note: {note}" for note in session.notes()), "yellow")
        try:
            steps = _apply(session, dry_run=dry_run, force=force_conflicts, anyway=anyway)
        except ApplyRefused as refused:
            _print_lines(refused.problems, "red")
            raise
        if prune:
            _prune(session, dry_run)
        if not dry_run:
            _after(session, steps)
            if wait:
                limit_s = session.config.times.initializing_s + OPERATORS_MINUTE_S
                _wait(session, timeout or limit_s, is_change=_changes_settings(session, steps))


def status(
    config: ConfigOption = DEFAULT_CONFIG,
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Show how a deployment does, and why it is not ready; status 1 if it is not."""
    with user_errors():
        session = Session(config, kubeconfig, context)
        follower = Follower(session.deployment)
        if watch:
            _watch(follower, str(session.service), as_json)
        judged = follower.look()
        _print_status(judged, str(session.service), as_json)
        if judged.state != "ready":
            raise typer.Exit(1)


# ---- apply


def _apply(session: Session, *, dry_run: bool, force: bool, anyway: bool) -> list[Step]:
    if not dry_run:
        specs = missing_secrets(session.config)
        return apply_all(
            session.cluster,
            session.manifests,
            specs,
            force=force,
            anyway=anyway,
            on_step=_print_step,
        )
    steps = rehearse(session.cluster, session.manifests, force=force, anyway=anyway)
    steps += _missing_secrets(session)
    for step in steps:
        _print_step(step)
    return steps


def _missing_secrets(session: Session) -> list[Step]:
    specs = missing_secrets(session.config)
    return [make_secret(session.cluster, spec, dry_run=True) for spec in specs]


def _prune(session: Session, dry_run: bool) -> None:
    found, hidden = ours(session.cluster, *_place(session))
    for extra in obsolete(found, session.manifests):
        if not dry_run:
            session.cluster.delete(Ref.of(extra))
        _print_step(Step(identity(extra), "deleted", "no longer rendered"))
    if hidden:
        _print_lines([f"not pruned, you may not list them: {', '.join(hidden)}"], "yellow")


def _after(session: Session, steps: list[Step]) -> None:
    """What KubeRay does not do by itself after an apply, and what the user may want to know."""
    config = session.config
    for step in steps:
        if step.action == "created" and step.identity == f"Secret/{api_keys_secret(config)}":
            command = read_secret_command(config, api_keys_secret(config), API_KEYS_KEY)
            _print_lines([f"a first API key was made; read it with: {command}"], "")
        if step.identity != str(session.service) or step.before is None or step.after is None:
            continue
        if not cluster_changes(step.before, step.after):
            for change in copy_bounds(session.cluster, step.after):
                text = f"{change.group} {change.before} -> {change.after} pods"
                _print_step(Step(change.identity, "configured", text))


def _changes_settings(session: Session, steps: list[Step]) -> bool:
    return any(
        settings_differ(step.before, step.after)
        for step in steps
        if step.identity == str(session.service)
    )


def _place(session: Session) -> tuple[str, str]:
    return session.config.namespace, session.config.name


# ---- waiting


def _wait(session: Session, timeout_s: float, *, is_change: bool) -> None:
    """Return when it serves. Raises StartFailed, with the causes printed before."""
    told: set[str] = set()
    with Stages() as stages:

        def show(judged: Verdict) -> None:
            stages.show(progress(judged))
            _print_lines([cause for cause in judged.causes if cause not in told], "yellow")
            told.update(judged.causes)

        judged = Follower(session.deployment, is_change=is_change).wait_ready(timeout_s, show)
    if judged.state == "failed":
        raise StartFailed(f"{session.service} failed: {judged.summary}")
    if judged.state == "waiting":
        raise StartFailed(
            f"{session.service} is not ready after {timeout_s:.0f} s: {judged.summary}; "
            "it goes on: see `shoal k8s status --watch`"
        )
    stdout.print(f"ready: {session.service}, {judged.summary}", style="bold green", markup=False)
    stdout.print(f"to reach it: shoal k8s forward -c {session.path}", markup=False, soft_wrap=True)


def _watch(follower: Follower, subject: str, as_json: bool) -> None:
    """Without an end. On a terminal one view that changes, else one more at each change."""
    if stdout.is_terminal and not as_json:
        with Live(console=stdout, auto_refresh=False) as live:
            for judged in follower.verdicts():
                live.update(render_status(judged, subject), refresh=True)
    last: Verdict | None = None
    for judged in follower.verdicts():
        if judged != last:
            _print_status(judged, subject, as_json)
        last = judged


# ---- printing


def _print_status(judged: Verdict, subject: str, is_json: bool) -> None:
    if is_json:
        typer.echo(json.dumps(to_json(judged)))
    else:
        stdout.print(render_status(judged, subject))


def _print_step(step: Step) -> None:
    note = f"  ({step.note})" if step.note else ""
    style = {"unchanged": "dim", "skipped": "yellow"}.get(step.action, "")
    text = f"{step.identity}: {step.action}{note}"
    stdout.print(text, style=style, markup=False, soft_wrap=True)


def _print_diff(step: Step) -> None:
    if step.action == "skipped" or (step.action == "created" and step.after is None):
        _print_step(step)
        return
    for line in unified_diff(step.identity, step.before, step.after).splitlines():
        stdout.print(line, style=DIFF_STYLES.get(line[:1], ""), markup=False, soft_wrap=True)


def _print_lines(lines: Iterable[str], style: str) -> None:
    for line in lines:
        stderr.print(line, style=style, markup=False, soft_wrap=True)
