"""Rounds of figures to medians and ratios. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

Figures = dict[str, float]
"""One run of one system: "scenario.figure" -> value."""
Round = dict[str, Figures]
"""The systems that ran one after the other, under the same conditions."""
HTTP_SUFFIX = "-http"
TRANSFORMERS = "transformers-"
VLLM = "vllm-"
"""Both run in several types: `transformers-float32`."""


def higher_is_better(figure: str) -> bool:
    """Rates, as opposed to times and bytes."""
    return figure.endswith("per_s")


def medians(rounds: Iterable[Round]) -> Round:
    """Of each figure, over the rounds that have it."""
    values: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        for system, figures in one.items():
            for figure, value in figures.items():
                values.setdefault(system, {}).setdefault(figure, []).append(value)
    return {
        system: {figure: median(found) for figure, found in figures.items()}
        for system, figures in values.items()
    }


def ratios(rounds: Iterable[Round], base: Callable[[Round, str], Figures | None]) -> Round:
    """Each figure over that of a base system of the *same* round, then the median of the rounds.

    `base(round, system)` gives what to divide by, None if it did not run.
    """
    divided: list[Round] = []
    for one in rounds:
        found: Round = {}
        for system, figures in one.items():
            below = base(one, system)
            if below is not None and below is not figures:
                common = figures.keys() & below.keys()
                found[system] = {name: figures[name] / below[name] for name in common}
        divided.append(found)
    return medians(divided)


def inline_base(one: Round, system: str) -> Figures | None:
    """The inline mode, over HTTP for what was measured over HTTP."""
    return one.get("inline" + (HTTP_SUFFIX if system.endswith(HTTP_SUFFIX) else ""))


def vllm_base(one: Round, system: str) -> Figures | None:
    """The better of vLLM's types, over HTTP for what was measured over HTTP."""
    is_http = system.endswith(HTTP_SUFFIX)
    level = {name: found for name, found in one.items() if name.endswith(HTTP_SUFFIX) == is_http}
    return _best_of(level, system, VLLM)


def transformers_base(one: Round, system: str) -> Figures | None:
    """The better of transformers' types."""
    return _best_of(one, system, TRANSFORMERS)


def _best_of(one: Round, system: str, prefix: str) -> Figures | None:
    """Each figure where it is best; None for the runs of that prefix themselves."""
    runs = [figures for name, figures in one.items() if name.startswith(prefix)]
    if not runs or system.startswith(prefix):
        return None
    names = set.intersection(*(set(figures) for figures in runs))
    return {
        name: (max if higher_is_better(name) else min)(figures[name] for figures in runs)
        for name in names
    }


BASES: dict[str, Callable[[Round, str], Figures | None]] = {
    "inline": inline_base,
    "transformers": transformers_base,
    "vllm": vllm_base,
}
