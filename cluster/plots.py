"""Figures of `shoal plot`: from its data (plot_data.py) to a file. Needs matplotlib."""

from __future__ import annotations

import math
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cluster.observability.rates import quantile
from cluster.plot_data import Data

PIXELS_PER_INCH = 120
TITLES = {
    "ttft_s": "time to first token",
    "itl_s": "time between tokens",
    "e2e_s": "whole request",
}
QUANTILES = {0.5: "p50", 0.9: "p90", 0.99: "p99"}


def save(data: Data, path: Path) -> None:
    """Draw the data into a file, whose suffix says the format. Raises OSError."""
    draw = {"experts": experts, "latency": latency, "scaling": scaling}[data["plot"]]
    draw(data).savefig(path, dpi=PIXELS_PER_INCH)


def experts(data: Data) -> Figure:
    """Rows a second of layers x experts, and beside it how even each layer is."""
    window_s = data["window_s"]
    rates = [[rows / window_s for rows in layer] for layer in data["rows"]]
    positions = range(len(data["layers"]))
    figure = _figure(10, min(max(2.5, 0.2 * len(rates) + 1.5), 12))
    figure.suptitle(f"{data['model']}: rows of the last {window_s:g} s, epoch {data['epoch']}")
    heat, balance = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    image = heat.imshow(rates, aspect="auto", cmap="inferno", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=heat, label="rows/s", fraction=0.04, pad=0.02)
    step = math.ceil(len(positions) / 30)
    heat.set_yticks(positions[::step], data["layers"][::step])
    heat.set(xlabel="expert", ylabel="layer")
    balance.barh(positions, data["balancedness"], color="tab:blue")
    balance.set(xlabel="balance of workers", xlim=(0, 1))
    return figure


def latency(data: Data) -> Figure:
    """Of each histogram the share of all values up to each bound, and quantiles."""
    seconds = data["seconds"]
    figure = _figure(12, 4)
    figure.suptitle(f"latencies of {seconds:g} s" if seconds else "latencies since the start")
    for axes, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items(), strict=True):
        histogram = data["histograms"][name]
        axes.set(title=title, xlabel="milliseconds", ylabel="% at most as long", ylim=(0, 101))
        if sum(histogram["counts"]):
            _draw_histogram(axes, histogram["bounds"], histogram["counts"])
        else:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center")
    return figure


def _draw_histogram(axes: Any, bounds: list[float], counts: list[int]) -> None:
    bounds = [1000 * bound for bound in bounds]
    edges = [bounds[0] / 2, *bounds, bounds[-1] * 2]  # on a logarithmic axis, so neither 0 nor inf
    filled = [bucket for bucket, count in enumerate(counts) if count]
    shown = slice(filled[0], filled[-1] + 2)
    up_to = [100 * part / sum(counts) for part in accumulate(counts, initial=0)]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.plot(edges[shown], up_to[shown], color="black", marker=".")
    for number, (share, label) in enumerate(QUANTILES.items()):
        value = quantile(bounds, counts, share)
        axes.axvline(value, color=f"C{number}", label=f"{label} {round(value, 2):g} ms")
    axes.legend(loc="lower right")


def scaling(data: Data) -> Figure:
    """Replicas wanted and present, how busy they are, and tokens a second, over time."""
    samples = data["samples"]
    at_s = [sample["at_s"] for sample in samples]
    figure = _figure(10, 8)
    figure.suptitle(data["model"])
    replicas, busy, tokens = figure.subplots(3, 1, sharex=True)
    for number, tier in enumerate(_names(samples, "tiers", "busy")):
        style = {"color": f"C{number}", "where": "post"}
        sizes = [sample["tiers"].get(tier, {}) for sample in samples]
        for what, dashes in (("present", "-"), ("wanted", "--")):
            heights = [_or_gap(size.get(what)) for size in sizes]
            replicas.step(at_s, heights, dashes, label=f"{tier} {what}", **style)
        shares = [_or_gap(sample["busy"].get(tier)) for sample in samples]
        busy.plot(at_s, shares, color=f"C{number}", label=tier)
    rates = [_or_gap(sample["generated_tokens_per_s"]) for sample in samples]
    tokens.plot(at_s, rates, color="black")
    replicas.set(ylabel="replicas", ylim=(0, None))
    busy.set(ylabel="busy, mean of the tier", ylim=(0, 1))
    tokens.set(ylabel="tokens/s", xlabel="seconds", ylim=(0, None))
    replicas.yaxis.get_major_locator().set_params(integer=True)
    for axes in (replicas, busy):
        if axes.lines:
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _names(samples: list[Data], *keys: str) -> list[str]:
    return list(dict.fromkeys(name for sample in samples for key in keys for name in sample[key]))


def _or_gap(value: float | None) -> float:
    return math.nan if value is None else value


def _figure(width: float, height: float) -> Figure:
    """Of inches."""
    return Figure((width, height), layout="constrained")
