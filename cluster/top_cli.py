"""`shoal top`: what a server does, live in a terminal; a line an interval elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import typer
from rich.live import Live

from cluster.cli_common import DEFAULT_URL, ApiKeyOption, JsonOption, UrlOption, user_errors
from cluster.console import stdout, stop_signals
from cluster.http_client import ApiClient
from cluster.top.history import History
from cluster.top.keyboard import QUIT, Keyboard
from cluster.top.layout import Scroll
from cluster.top.reading import Poller, Reading, read, read_or_away
from cluster.top.view import line, screen

TIMEOUT_S = 5.0
TICK_S = 0.1
"""A key, Ctrl-C and another size of the terminal show within it."""


def top(
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    interval_s: Annotated[
        float, typer.Option("--interval", min=0.2, max=60, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Show what is now, and end.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Watch experts, queues, latencies and workers live; q or Ctrl-C ends.

    Without a terminal, or with --json, a line each interval.
    """
    with user_errors():
        client = ApiClient(url, TIMEOUT_S, api_key)
        first = read(client)
        again = partial(read_or_away, client)
        if once and as_json:
            stdout.print_json(data=first.as_dict())
        elif once:
            stdout.print(screen(History(first), stdout.width))
        elif as_json:
            for reading in _readings(first, again, interval_s):
                typer.echo(json.dumps(reading.as_dict(), separators=(",", ":")))
        elif stdout.is_terminal and not stdout.is_dumb_terminal:
            _watch(History(first), again, interval_s)
        else:
            _print_lines(History(first), again, interval_s)


def _readings(first: Reading, again: Callable[[], Reading], interval_s: float) -> Iterator[Reading]:
    """The first and one every interval, without end."""
    yield first
    while True:
        time.sleep(interval_s)
        yield again()


def _print_lines(history: History, again: Callable[[], Reading], interval_s: float) -> None:
    happened: list[str] = []
    for reading in _readings(history.newest, again, interval_s):
        if reading is not history.newest:
            happened = history.add(reading)
        typer.echo(line(history, happened))


def _watch(history: History, again: Callable[[], Reading], interval_s: float) -> None:
    """Until q; a signal ends it too (typer.Exit). The terminal is as before afterwards."""
    first_layer, shown = 0, None
    with (
        stop_signals() as signals,
        Keyboard() as keyboard,
        Poller(again, interval_s) as poller,
        Live(console=stdout, screen=True, auto_refresh=False) as live,
    ):
        while not signals.first.is_set():
            while not poller.readings.empty():
                history.add(poller.readings.get())
            width, height = stdout.size
            scroll = Scroll.of(history.answered, height)
            first_layer = scroll.to(first_layer)
            if (to_show := (history.newest, width, height, first_layer)) != shown:
                live.update(screen(history, width, height, first_layer), refresh=True)
                shown = to_show
            for key in keyboard.keys(TICK_S):
                if key == QUIT:
                    return
                first_layer = scroll.to(first_layer + scroll.step(key))
    raise typer.Exit(130)
