"""What the project wants to reach, against what was measured. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from serving.results import Figures, Round

CLUSTERS = ("ray-inline-router", "ray-router")
CLUSTER_SHARE_OF_INLINE = {"lite": 0.95, "small": 0.6}
SHARE_OF_BANDWIDTH = 0.6
RSS_OVER_FILE = 1.3


@dataclass(frozen=True)
class Goal:
    """A figure and its limit."""

    name: str
    value: float
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def bandwidth_share(figures: Figures, active_bytes: int, read_bytes_per_s: float) -> float | None:
    """Decoding one request against reading the active weights once a token at full bandwidth."""
    rate = figures.get("closed-1.stream_tokens_per_s")
    return None if rate is None else rate * active_bytes / read_bytes_per_s


def goals(
    preset: str,
    medians: Round,
    ratios: dict[str, Round],
    file_bytes: int,
    active_bytes: int,
    read_bytes_per_s: float,
) -> list[Goal]:
    """Those that this run says something about; `ratios` by base system."""
    found = [*_inline_against_vllm(ratios), *_cluster_against_inline(preset, ratios)]
    inline = medians.get("inline", {})
    share = bandwidth_share(inline, active_bytes, read_bytes_per_s)
    if preset != "lite":
        return found  # its weights fit a cache and weigh less than Python
    if share is not None:
        found.append(Goal("inline decode, share of the bandwidth", share, SHARE_OF_BANDWIDTH))
    if "memory.peak_rss_bytes" in inline:
        over_file = inline["memory.peak_rss_bytes"] / file_bytes
        found.append(Goal("inline peak RSS / file", over_file, RSS_OVER_FILE, at_least=False))
    return found


def _inline_against_vllm(ratios: dict[str, Round]) -> Iterator[Goal]:
    for figure, ratio in sorted(ratios["vllm"].get("inline", {}).items()):
        if _is_throughput(figure):
            yield Goal(f"inline / vllm, {figure.partition('.')[0]}", ratio, 1.0)


def _cluster_against_inline(preset: str, ratios: dict[str, Round]) -> Iterator[Goal]:
    limit = CLUSTER_SHARE_OF_INLINE.get(preset)
    for system in CLUSTERS:
        for figure, ratio in sorted(ratios["inline"].get(system, {}).items()):
            if limit is not None and _is_throughput(figure):
                yield Goal(f"{system} / inline, {figure.partition('.')[0]}", ratio, limit)


def _is_throughput(figure: str) -> bool:
    """Output of closed loops and prefill; an open loop's follows from the arrivals."""
    scenario, _, name = figure.partition(".")
    if scenario.startswith("prefill-"):
        return name == "prefill_tokens_per_s"
    return scenario.startswith("closed-") and name == "output_tokens_per_s"
