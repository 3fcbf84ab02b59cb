"""Paired differences, in per cent, and what can be said of them. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z_95 = 1.96


def added_percent(arm: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """By round: how much more the arm has than the baseline."""
    return [100 * (a / b - 1) for a, b in zip(arm, baseline, strict=True)]


def interval(differences: Sequence[float]) -> dict[str, float]:
    """Hodges and Lehmann's estimate (the median of all means of two) with the 95 % interval that
    belongs to it, Wilcoxon's; and the mean, which rare events count in, with that of Student.

    Nothing is left out; one round in four may be spoilt without moving the first far.
    """
    values = np.asarray(differences)
    n = len(values)
    first, second = np.triu_indices(n)
    means_of_two = np.sort((values[first] + values[second]) / 2)
    spread = Z_95 * math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    rank = max(0, math.floor(n * (n + 1) / 4 - spread))
    error = Z_95 * float(values.std(ddof=1)) / math.sqrt(n)
    mean = float(values.mean())
    found = {
        "estimate": np.median(means_of_two),
        "low": means_of_two[rank],
        "high": means_of_two[-1 - rank],
        "mean": mean,
        "mean_low": mean - error,
        "mean_high": mean + error,
    }
    return {name: round(float(value), 3) for name, value in found.items()}
