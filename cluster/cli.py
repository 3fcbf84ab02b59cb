"""The `shoal` command. Exit codes: 0 done, 1 failed, 2 the user's input, 3 cluster, 130 stopped."""

from __future__ import annotations

import json
import os
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli_common import DEFAULT_URL, ApiKeyOption, JsonOption, UrlOption, user_errors
from cluster.config import (
    API_KEY_VARIABLE,
    ConfigError,
    ShoalConfig,
    merge,
    parse_config,
    read_config_file,
)
from cluster.console import stderr, stdout
from cluster.deploy.cli import k8s_app
from cluster.deploy.plan_cli import plan
from cluster.http_client import ApiClient
from cluster.key_cli import key_app
from cluster.operations_cli import chaos_app, experts_app, scale
from cluster.plot_cli import plot_app
from cluster.tiny_presets import PRESETS
from cluster.top_cli import top

if TYPE_CHECKING:
    from cluster.session import RunningServer

app = typer.Typer(
    name="shoal",
    no_args_is_help=True,
    context_settings={"auto_envvar_prefix": "SHOAL", "help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Make and check checkpoints.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(experts_app, name="experts")
app.add_typer(plot_app, name="plot")
app.add_typer(chaos_app, name="chaos")
app.add_typer(key_app, name="key")
app.add_typer(k8s_app, name="k8s")

ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Checkpoint folder; without one, the tiny model that ships with Shoal."),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML with any setting; flags win over it.")
]
SIZE = "; MIN-MAX scales them with the load."
ExpertsOption = Annotated[str | None, typer.Option(help="Expert workers" + SIZE)]
AttentionOption = Annotated[str | None, typer.Option(help="Attention workers" + SIZE)]
RouterModeOption = Annotated[
    str | None, typer.Option(help="deployment, or inline: gate inside the attention workers.")
]
DeterministicOption = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="Identical tokens whatever the placement, batch or failure; slower.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="auto, cpu or cuda: where workers compute. auto: on GPUs if there are any."),
]
InlineOption = Annotated[
    bool, typer.Option("--inline", help="Everything in this process, without Ray.")
]
HttpPortOption = Annotated[
    int | None, typer.Option("--http-port", "--port", help="HTTP, and the web pages [8000].")
]
GrpcPortOption = Annotated[int | None, typer.Option(help="gRPC [9000].")]


def _show_version(wanted: bool) -> None:
    if wanted:
        stdout.print(f"shoal {version('shoal-serve')}")
        raise typer.Exit


@app.callback()
def shoal(
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Serve DeepSeek-style Mixture-of-Experts models, the experts as a tier of their own."""


def settings(
    model: Path | None,
    config: Path | None = None,
    experts: str | None = None,
    attention: str | None = None,
    router_mode: str | None = None,
    **more: Any,
) -> ShoalConfig:
    """File and flags as one checked configuration, with the default model if none is named."""
    data = read_config_file(config) if config else {}
    flags: dict[str, Any] = {
        "model": str(model) if model else None,
        "experts": _size("--experts", experts),
        "attention": _size("--attention", attention),
        "router": {"mode": router_mode},
        **more,
    }
    return parse_config(merge(data, _given(flags)))


def _size(flag: str, given: str | None) -> dict[str, Any]:
    """Settings of a tier for "3", or for "2-6": at least two workers, at most six."""
    if given is None:
        return {}
    numbers = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", given, re.ASCII)
    if numbers is None:
        raise ConfigError(f"{flag} {given}: expected a number, or two as in {flag} 2-6")
    low, high = numbers.groups()
    if high is None:
        return {"num_workers": int(low)}
    return {"num_workers": int(low), "scaling": {"min_workers": int(low), "max_workers": int(high)}}


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Without the flags nobody gave."""
    pruned = {k: _given(v) if isinstance(v, dict) else v for k, v in flags.items()}
    return {k: v for k, v in pruned.items() if v is not None and v != {}}


@app.command()
def serve(
    model: ModelArgument = None,
    config: ConfigOption = None,
    experts: ExpertsOption = None,
    attention: AttentionOption = None,
    router_mode: RouterModeOption = None,
    deterministic: DeterministicOption = None,
    device: DeviceOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    http_port: HttpPortOption = None,
    grpc_port: GrpcPortOption = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in the API.")] = None,
    dashboard: Annotated[bool, typer.Option(help="Ray's dashboard on port 8265.")] = True,
    enable_chaos: Annotated[
        bool, typer.Option("--enable-chaos", help="Let `shoal chaos` kill and stop workers.")
    ] = False,
    keys_file: Annotated[
        Path | None, typer.Option(help="API keys, a line each; see `shoal key new`.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without any API key.")
    ] = False,
    log_format: Annotated[
        str | None, typer.Option(help="Show the log, as text or json; else only warnings.")
    ] = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="OpenTelemetry spans; OTEL_* variables say where to.")
    ] = False,
    inline: InlineOption = False,
) -> None:
    """Serve a checkpoint over HTTP and gRPC until Ctrl-C."""
    from cluster.session import running

    with user_errors():
        chosen = settings(
            model,
            config,
            experts,
            attention,
            router_mode,
            deterministic=deterministic,
            device=device,
            served_model_name=served_model_name,
            enable_chaos=enable_chaos or None,
            listen={"host": host, "http_port": http_port, "grpc_port": grpc_port},
            auth={"keys_file": str(keys_file) if keys_file else None, "insecure": insecure or None},
            observability={"log_format": log_format, "traces": traces or None},
        )
        with running(chosen, inline, dashboard, show_log=log_format is not None) as server:
            _print_ready(chosen, server, inline)
            server.signals.first.wait()
            stderr.print("Stopping: requests in flight finish first; Ctrl-C again stops at once.")


def _print_ready(config: ShoalConfig, server: RunningServer, inline: bool) -> None:
    from cluster.model_store import EXAMPLE_PROMPT

    body = {"messages": [{"role": "user", "content": EXAMPLE_PROMPT}], "max_tokens": 256}
    needs_key = config.auth.keys_file is not None or API_KEY_VARIABLE in os.environ
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if needs_key else ""
    stdout.print(f"ready: {config.model_name}", style="bold green", markup=False)
    stdout.print(
        f"curl {server.url}/v1/chat/completions{key} -H 'Content-Type: application/json' "
        f"-d '{json.dumps(body)}'",
        soft_wrap=True,
        markup=False,
    )
    if not inline:
        stdout.print(f"gRPC: {server.grpc_address} (shoal.v1.Inference)", markup=False)
    if server.dashboard_url:
        stdout.print(f"dashboard: {server.dashboard_url} (token: ~/.ray/auth_token)")
    if server.gpus:
        stdout.print(f"GPUs: {server.gpus}", markup=False, soft_wrap=True)


@app.command()
def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] [PROMPT]",
            help="Folder of a checkpoint, and what to ask it.",
            show_default=False,
        ),
    ] = None,
    config: ConfigOption = None,
    experts: ExpertsOption = None,
    router_mode: RouterModeOption = None,
    deterministic: DeterministicOption = None,
    device: DeviceOption = None,
    inline: InlineOption = False,
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    api_key: ApiKeyOption = None,
) -> None:
    """Answer one prompt, or chat when there is none."""
    from cluster.model_store import split_model_and_prompt
    from cluster.session import running

    with user_errors():
        model, prompt = split_model_and_prompt(words or [])
        chosen = settings(
            model,
            config,
            experts,
            None,
            router_mode,
            deterministic=deterministic,
            device=device,
            listen={"http_port": 0, "grpc_port": 0},
        )
        params: dict[str, Any] = {"max_tokens": max_tokens}
        if temperature is not None:
            params["temperature"] = temperature
        with running(chosen, inline=inline, dashboard=False) as server:
            server.signals.interrupt_on_first()
            client = ApiClient(server.url, api_key=api_key)
            if prompt is not None:
                _answer(client, [{"role": "user", "content": prompt}], params)
            else:
                _chat(client, params)


def _answer(client: ApiClient, messages: list[dict[str, str]], params: dict[str, Any]) -> str:
    text = ""
    for piece in client.chat(messages, **params):
        stdout.print(piece, end="", markup=False, soft_wrap=True)
        text += piece
    stdout.print()
    return text


def _chat(client: ApiClient, params: dict[str, Any]) -> None:
    """Read a line, answer it, remember both; an empty line or Ctrl-D ends."""
    stderr.print("An empty line or Ctrl-D ends the chat.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not line:
            break
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": _answer(client, messages, params)})


@model_app.command("make-tiny")
def make_tiny(
    folder: Annotated[Path, typer.Argument(help="New folder for the checkpoint.")],
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "v3",
    seed: Annotated[int, typer.Option(help="The same seed gives the same bits.")] = 20261122,
) -> None:
    """Write a seeded random checkpoint in the published format."""
    from cluster.tiny_checkpoint import write_checkpoint

    with user_errors():
        if preset not in PRESETS:
            raise ConfigError(f"preset = {preset!r}: known ones are {', '.join(PRESETS)}")
        started = time.perf_counter()
        size = write_checkpoint(folder, preset, seed=seed)
        stdout.print(
            f"{folder}: {preset}, {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s",
            markup=False,
        )


@model_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Checkpoint folder.")]) -> None:
    """Check every file of a checkpoint: shapes, sizes, scales, tokenizer."""
    from cluster.model_store import verify_model

    with user_errors():
        report = verify_model(folder)
        stdout.print(f"{folder}: {report}", markup=False, soft_wrap=True)


@app.command()
def status(
    url: UrlOption = DEFAULT_URL, api_key: ApiKeyOption = None, as_json: JsonOption = False
) -> None:
    """Show what runs: stage, workers, cache use."""
    from cluster.status import render_status

    with user_errors():
        body = ApiClient(url, timeout_s=5, api_key=api_key).read("/status")
        if as_json:
            stdout.print_json(data=body)
        else:
            stdout.print(render_status(body))


app.command()(top)
app.command()(scale)
app.command()(plan)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: versions, memory, ports, GPU, kernels."""
    from cluster.doctor import examine, render

    findings = examine()
    if as_json:
        stdout.print_json(data=[finding.__dict__ for finding in findings])
    else:
        stdout.print(render(findings))
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(1)
