"""`shoal plot`: pictures of a running server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli_common import DEFAULT_URL, ApiKeyOption, JsonOption, UrlOption, user_errors
from cluster.config import ConfigError
from cluster.console import Stage, Stages, stderr
from cluster.http_client import ApiClient, ApiError
from cluster.plot_data import Data, experts_data, latency_data, scaling_data, scaling_sample

TIMEOUT_S = 10.0
SUFFIXES = (".png", ".svg", ".pdf")

plot_app = typer.Typer(help="Draw what a server does.", no_args_is_help=True)

OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", help=f"Picture to write: {', '.join(SUFFIXES)}.")
]
FromOption = Annotated[
    Path | None, typer.Option("--from", help="Draw what --json printed before, from a file.")
]


@plot_app.command()
def experts(
    output: OutputOption = None,
    saved: FromOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw the load of every expert as a heat map of layers x experts."""

    def ask(client: ApiClient) -> Data:
        return experts_data(client.read("/v1/experts/load?compact=true"))

    _plot("experts", ask, url, api_key, output, saved, as_json)


@plot_app.command()
def latency(
    output: OutputOption = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="How long to look; 0: all since the server's start.")
    ] = 30.0,
    saved: FromOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw how long first tokens, further tokens and whole requests take."""

    def ask(client: ApiClient) -> Data:
        ticks = _ticks(seconds, seconds) if seconds else [0.0]
        texts = ["", *(client.read_text("/metrics") for _ in ticks)]
        data = latency_data(texts[-2], texts[-1], seconds)
        if not any(sum(histogram["counts"]) for histogram in data["histograms"].values()):
            raise ConfigError("no tokens were generated in that time: is anybody asking?")
        return data

    _plot("latency", ask, url, api_key, output, saved, as_json)


@plot_app.command()
def scaling(
    output: OutputOption = None,
    seconds: Annotated[float, typer.Option(min=1, help="How long to look.")] = 60.0,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=60, help="Seconds between two looks.")
    ] = 1.0,
    saved: FromOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw replicas wanted and present, how busy they are, and tokens/s over time."""

    def ask(client: ApiClient) -> Data:
        model = client.read("/status")["model"]
        return scaling_data(
            model, [_scaling_sample(client, at_s) for at_s in _ticks(seconds, interval_s)]
        )

    _plot("scaling", ask, url, api_key, output, saved, as_json)


def _scaling_sample(client: ApiClient, at_s: float) -> Data:
    """A server that is away for a while leaves a gap."""
    try:
        return scaling_sample(at_s, client.read("/status"))
    except ApiError:
        return scaling_sample(at_s, None)


def _ticks(seconds: float, interval_s: float) -> Iterator[float]:
    """Seconds since the first one: 0, then every interval until the time is over; says how far."""
    started_s = time.monotonic()
    with Stages() as stages:
        for tick in range(int(seconds / interval_s) + 1):
            time.sleep(max(started_s + tick * interval_s - time.monotonic(), 0))
            at_s = time.monotonic() - started_s
            stages.show(Stage(f"looking for {seconds:g} s", int(at_s), int(seconds)))
            yield at_s


def _plot(
    kind: str,
    ask: Callable[[ApiClient], Data],
    url: str,
    api_key: str | None,
    output: Path | None,
    saved: Path | None,
    as_json: bool,
) -> None:
    """What can be wrong with the picture is found before the server is looked at for long."""
    with user_errors():
        if output is None and not as_json:
            raise ConfigError("give -o FILE.png for a picture, or --json for the data")
        draw = _drawing(output) if output else None
        data = _load(saved, kind) if saved else ask(ApiClient(url, TIMEOUT_S, api_key))
        if as_json:
            typer.echo(json.dumps(data))
        if draw and output:
            _save(draw, data, output)


def _drawing(output: Path) -> Callable[[Data, Path], None]:
    """What draws data into a file. Raises ConfigError."""
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"{output}: expected one of {', '.join(SUFFIXES)}")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"{output}: there is no such folder")
    try:
        from cluster.plots import save
    except ModuleNotFoundError:
        raise ConfigError("matplotlib is not installed: pip install 'shoal-serve[plot]'") from None
    return save


def _load(saved: Path, kind: str) -> Data:
    try:
        data = json.loads(saved.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{saved}: {error}") from None
    if not isinstance(data, dict) or data.get("plot") != kind:
        raise ConfigError(f"{saved}: not what `shoal plot {kind} --json` prints")
    return data


def _save(draw: Callable[[Data, Path], None], data: Data, output: Path) -> None:
    try:
        draw(data, output)
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}") from None
    stderr.print(f"{output} is written", markup=False, soft_wrap=True)
