"""`shoal experts`, `shoal scale` and `shoal chaos`: commands to a running server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from cluster.cli_common import DEFAULT_URL, ApiKeyOption, JsonOption, UrlOption, user_errors
from cluster.config import ConfigError
from cluster.console import stdout
from cluster.expert_table import render_experts
from cluster.http_client import ApiClient, ApiError, RequestRefused

TIMEOUT_S = 30.0
WATCH_PERIOD_S = 1.0
NO_OPERATIONS = "this server takes no commands: start it with the setting enable_operations: true"

experts_app = typer.Typer(help="Watch and move experts.", no_args_is_help=True)
chaos_app = typer.Typer(
    help="Kill or stop a worker of a server that was started with chaos enabled.",
    no_args_is_help=True,
)

WorkerOption = Annotated[str | None, typer.Option(help="Its id, as in `shoal status`.")]
RandomOption = Annotated[bool, typer.Option("--random", help="Any one of the role.")]


class Tier(StrEnum):
    """What can be scaled."""

    EXPERTS = "experts"
    ATTENTION = "attention"


class Role(StrEnum):
    """What can be killed."""

    EXPERT = "expert"
    ROUTER = "router"
    ATTENTION = "attention"


RoleArgument = Annotated[Role, typer.Argument(help="Which kind of worker.")]


@contextmanager
def _errors() -> Iterator[None]:
    """One line and an exit code: 2 for a command that is refused, 3 when there is no server."""
    with user_errors():
        try:
            yield
        except RequestRefused as error:
            text = NO_OPERATIONS if error.code == "unknown_url" else str(error)
            raise ConfigError(text) from None


# ---- experts


@experts_app.command()
def show(
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    as_json: JsonOption = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Once a second, until Ctrl-C; with --json a line each.")
    ] = False,
) -> None:
    """Show the load of the experts, their replicas, and who holds how many."""
    with _errors():
        client = _client(url, api_key)
        if not watch:
            _print_load(_load(client), as_json)
        elif as_json:
            while True:
                typer.echo(json.dumps(_load(client), separators=(",", ":")))
                time.sleep(WATCH_PERIOD_S)
        else:
            _watch(client)


def _watch(client: ApiClient) -> None:
    with Live(render_experts(_load(client)), console=stdout, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_PERIOD_S)
            try:
                view: RenderableType = render_experts(_load(client))
            except ApiError as error:  # the directory may be starting anew
                view = Text(str(error), "yellow")
            live.update(view, refresh=True)


def _load(client: ApiClient) -> dict[str, Any]:
    body: dict[str, Any] = client.read("/v1/experts/load")
    return body


def _print_load(body: dict[str, Any], as_json: bool) -> None:
    if as_json:
        stdout.print_json(data=body)
    else:
        stdout.print(render_experts(body))


@experts_app.command()
def drain(
    worker: Annotated[str, typer.Argument(help="Id of an expert worker.")],
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Hand over all experts of a worker; it stays without experts."""
    with _errors():
        _command(_client(url, api_key), "/v1/experts/drain", {"worker": worker})


@experts_app.command()
def replicate(
    expert: Annotated[str, typer.Argument(metavar="LAYER:EXPERT", help="For example 1:3.")],
    replicas: Annotated[int, typer.Option(help="1: no more than needed.")] = 2,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Keep at least so many holders of an expert from now on."""
    with _errors():
        layer, _, number = expert.partition(":")
        if not (_is_number(layer) and _is_number(number)):
            raise ConfigError(f"{expert!r} is not LAYER:EXPERT, for example 1:3")
        body = {"layer": int(layer), "expert": int(number), "replicas": replicas}
        _command(_client(url, api_key), "/v1/experts/replicate", body)


@experts_app.command()
def rebalance(url: UrlOption = DEFAULT_URL, api_key: ApiKeyOption = None) -> None:
    """Move replicas to where the load is, one step now."""
    with _errors():
        _command(_client(url, api_key), "/v1/experts/rebalance", {})


# ---- scale


def scale(
    tier: Annotated[Tier, typer.Argument(help="Which kind of workers.")],
    workers: Annotated[str, typer.Argument(metavar="N|auto", help="auto: as the policy says.")],
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Set how many workers a tier shall have; they come and go after the answer."""
    with _errors():
        if workers != "auto" and not _is_number(workers):
            raise ConfigError(f"{workers!r} is neither a number of workers nor auto")
        wanted = None if workers == "auto" else int(workers)
        _command(_client(url, api_key), "/v1/scale", {"tier": tier.value, "workers": wanted})


# ---- chaos


@chaos_app.command()
def kill(
    role: RoleArgument,
    worker: WorkerOption = None,
    at_random: RandomOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Kill a worker's process at once, as the system does when memory is short."""
    with _errors():
        _chaos(_client(url, api_key), "kill", role, worker, at_random)


@chaos_app.command()
def stop(
    role: RoleArgument,
    worker: WorkerOption = None,
    at_random: RandomOption = False,
    for_s: Annotated[float, typer.Option("--for", help="Seconds.")] = 30.0,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
) -> None:
    """Freeze a worker's process for a while: it neither works nor closes its connections."""
    with _errors():
        _chaos(_client(url, api_key), "stop", role, worker, at_random, for_s=for_s)


def _chaos(
    client: ApiClient,
    action: str,
    role: Role,
    worker: str | None,
    at_random: bool,
    **more: float,
) -> None:
    if worker is not None and at_random:
        raise ConfigError("give either --worker or --random")
    if worker is None and not at_random:
        worker = _only_worker(client, role)
    body = {"action": action, "role": role.value, "worker": worker, **more}
    _command(client, "/v1/chaos", body)


def _only_worker(client: ApiClient, role: Role) -> str:
    """The id of the one worker of a role; with several, which one is for the user to say."""
    member_role = "experts" if role is Role.EXPERT else role.value
    workers = client.read("/status")["workers"]
    ids = [str(worker["worker_id"]) for worker in workers if worker["role"] == member_role]
    if not ids:
        raise ConfigError(f"there is no {role.value} worker")
    if len(ids) > 1:
        raise ConfigError(
            f"there are {len(ids)} {role.value} workers, give --worker ID or --random:"
            f" {', '.join(ids)}"
        )
    return ids[0]


# ---- all of them


def _client(url: str, api_key: str | None) -> ApiClient:
    return ApiClient(url, TIMEOUT_S, api_key)


def _command(client: ApiClient, path: str, body: dict[str, Any]) -> None:
    done = client.post(path, body)["done"]
    stdout.print(done, markup=False, soft_wrap=True)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
