"""One screen, or one line, of what a server does. Pure: readings in, text out."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from cluster.top.heat_map import BARS, heat_map
from cluster.top.history import History, rates_of
from cluster.top.layout import NUM_HOTTEST, Sizes, workers_of
from cluster.top.reading import Load, Reading

NUM_RATES = 24
BAR_WIDTH = 8
BUSY, VERY_BUSY = 0.5, 0.85
KEYS = "q quit   up, down, PgUp, PgDn, Home, End: layers"


def screen(history: History, width: int, height: int | None = None, first_layer: int = 0) -> Group:
    """Everything, `width` columns wide; in `height` lines if there are at least MIN_HEIGHT.

    height None: of a moment, so without events and keys, in as many lines as it takes.
    first_layer: position of the topmost layer shown.
    """
    reading = history.answered
    sizes = Sizes.of(reading, height)
    lines = [_title(history), *_numbers(history)]
    if reading.load is not None:
        lines += heat_map(reading.load, width, first_layer, sizes.layers)
    else:
        lines += [Text("experts", "bold"), Text(f"not known: {reading.error}", "yellow")]
    below: list[Text] = []
    if height is not None:
        below = [Text("events", "bold"), *_events(history, sizes.events), Text(KEYS, "dim")]
    for text in (*lines, *below):
        text.no_wrap, text.overflow = True, "ellipsis"
    return Group(*lines, _lists(reading, sizes.rows), *below)


def line(history: History, happened: list[str]) -> str:
    """The newest reading on one line, and what happened since the one before."""
    newest, status = history.newest, history.newest.status
    parts = [time.strftime("%H:%M:%S", time.localtime(newest.at_s))]
    if status is None:
        parts.append(f"away for {history.away_s:.0f} s: {newest.error}")
        return "  ".join(parts)
    rates = rates_of(newest)
    parts += [
        f"{status['model']}: {status['stage']}",
        f"epoch {status['epoch']}",
        f"{_number(rates.get('generated_tokens_per_s'))} tokens/s",
        _requests(rates),
        _latency(rates),
        _replicas(status),
    ]
    if newest.load is not None:
        parts += [f"hottest {' '.join(text.plain.split())}" for text in _hottest(newest.load, 1)]
    return "  ".join([*parts, *happened])


# ---- above the heat map


def _title(history: History) -> Text:
    status = history.answered.status or {}
    title = Text(f"{status['model']}: ", "bold")
    title.append(status["stage"], "green" if status["ready"] else "yellow")
    title.append(f", epoch {status['epoch']}")
    if history.away_s is not None:
        text = f" no answer for {history.away_s:.0f} s: trying again "
        title.append("  ").append(text, "bold white on red")
    return title


def _numbers(history: History) -> Iterator[Text]:
    status, rates = history.answered.status or {}, rates_of(history.answered)
    tokens = f"{_number(rates.get('generated_tokens_per_s'))}/s"
    prompt = f"prompt tokens {_number(rates.get('prompt_tokens_per_s'))}/s"
    yield _labelled("tokens", f"{tokens:9} {_trend(history):{NUM_RATES}}  {prompt}")
    requests = f"{_number(rates.get('requests_per_s'))}/s  {_requests(rates)}"
    ended = ", ".join(f"{_number(rates.get(how))} {how}" for how in ("refused", "cancelled"))
    yield _labelled("requests", f"{requests}; {ended}")
    window = f"  (p50, p99 of {_number(rates.get('window_s'))} s)"
    yield _labelled("latency", _latency(rates) + window)
    yield _labelled("replicas", _replicas(status))
    counters = status.get("counters") or {}
    counted = "  ".join(f"{name} {_number(n)}" for name, n in counters.items())
    yield _labelled("so far", counted or "-")


def _labelled(label: str, text: str) -> Text:
    return Text.assemble((f"{label:9}", "bold"), text)


def _trend(history: History) -> str:
    rates = list(history.tokens_per_s)[-NUM_RATES:]
    highest = max(rates, default=0.0)
    return "".join(BARS[math.ceil(8 * rate / highest) if rate else 0] for rate in rates)


def _requests(rates: dict[str, Any]) -> str:
    running, waiting = (_number(rates.get(f"requests_{what}")) for what in ("running", "waiting"))
    return f"{running} running, {waiting} waiting"


def _latency(rates: dict[str, Any]) -> str:
    return f"TTFT {_quantiles(rates.get('ttft_s'))}  ITL {_quantiles(rates.get('itl_s'))}"


def _quantiles(seconds: dict[str, float] | None) -> str:
    if not seconds:
        return "-"
    return ", ".join(_duration(seconds[name]) for name in ("p50", "p99"))


def _replicas(status: dict[str, Any]) -> str:
    """ "experts 2/3": two are there of three that are wanted. "experts 2": how many are wanted is
    not known yet."""
    return "  ".join(
        f"{tier} {_number(size.get('present'))}"
        + (f"/{wanted}" if (wanted := size.get("wanted")) is not None else "")
        for tier, size in (status.get("tiers") or {}).items()
    )


# ---- below it


def _lists(reading: Reading, num_rows: int) -> Table:
    """The hottest experts beside the workers."""
    lists = Table.grid(padding=(0, 2), expand=True)
    for ratio in (2, 3):
        lists.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
    lists.add_row(Text("hottest experts", "bold"), Text("workers", "bold"))
    hottest = _hottest(reading.load, min(num_rows, NUM_HOTTEST)) if reading.load else ()
    found = workers_of(reading)
    name_width = max((len(worker["worker_id"]) for worker in found), default=0)
    workers = [_worker(worker, name_width) for worker in found]
    if len(workers) > num_rows:
        more = Text(f"and {len(workers) - num_rows + 1} more", "dim")
        workers = [*workers[: num_rows - 1], more]
    for _, expert, worker in zip_longest(range(num_rows), hottest, workers, fillvalue=""):
        lists.add_row(expert, worker)
    return lists


def _hottest(load: Load, number: int) -> Iterator[Text]:
    """ "3:12 830/s 25% on a1, b2": layer 3, expert 12, its share; experts-a1 and -b2 hold it."""
    found = (
        (rows, -position, -expert)
        for position, layer in enumerate(load.recent_rows)
        for expert, rows in enumerate(layer)
        if rows
    )
    for rows, position, expert in heapq.nlargest(number, found):
        layer, holders = load.layers[-position], load.holders[-position][-expert]
        share = rows / sum(load.recent_rows[-position])
        names = ", ".join(load.workers[holder].removeprefix("experts-") for holder in holders)
        rate = _number(load.per_s(rows))
        yield Text(f"{f'{layer}:{-expert}':6} {rate:>5}/s {share:4.0%} on {names}")


def _worker(worker: dict[str, Any], name_width: int) -> Text:
    busy = worker.get("busy")
    text = Text(f"{worker['worker_id']:{name_width}} ")
    filled = round((busy or 0.0) * BAR_WIDTH)
    colour = "green" if not busy or busy < BUSY else "yellow" if busy < VERY_BUSY else "red"
    text.append("█" * filled, colour).append("░" * (BAR_WIDTH - filled), "dim")
    text.append("    -" if busy is None else f" {busy:4.0%}")
    text.append(f" queue {_number(worker.get('queue'))}")
    if worker.get("rows_per_s") is not None:
        text.append(f" {_number(worker['rows_per_s'])} rows/s")
    return text.append(" drained", "yellow") if worker.get("drained") else text


def _events(history: History, number: int) -> list[Text]:
    """The newest, newest first, always `number` lines."""
    newest = list(history.events)[::-1][:number]
    lines = [
        Text(f"{time.strftime('%H:%M:%S', time.localtime(at_s))} {what}") for at_s, what in newest
    ]
    return lines + [Text()] * (number - len(lines))


# ---- numbers


def _number(value: float | None) -> str:
    """With three digits, or all of an integer; "-" for what is not known."""
    if value is None:
        return "-"
    return (
        str(value) if isinstance(value, int) else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    )


def _duration(seconds: float) -> str:
    return f"{_number(seconds)} s" if seconds >= 1 else f"{_number(seconds * 1000)} ms"
