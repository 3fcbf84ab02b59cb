"""Targets, delays and bounds of the tiers that scale. Neither torch nor Ray is imported here."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Workers = Annotated[int, Field(ge=1, le=4096)]
Delay = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Scaling(BaseModel):
    """What both tiers share."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_workers: Workers = 1
    """Never fewer; the experts' tier also keeps as many as hold every expert once."""
    max_workers: Workers = 8
    """Never more, whatever the load."""
    upscale_delay_s: Delay = 2.0
    """The pool grows when it has been too small for so long without a break."""
    downscale_delay_s: Delay = 60.0
    """It shrinks when it has been too large for so long, to what the busiest moment needed."""
    settle_s: Delay = 5.0
    """After a worker came or went, its averages still mix before and after: both delays start
    only so much later. At least window_s is wise: with less, the pool grows too far."""
    max_step_up: Workers = 4
    """Workers added at a time."""
    max_step_down: Workers = 1
    """Workers given up at a time; each hands its work to the others before it stops."""
    min_reporting: Fraction = 0.5
    """Part of the running workers that must report; with fewer the target is held."""
    max_age_s: Seconds = 10.0
    """Older reports are ignored: Serve keeps the last one of a hung worker for ever."""
    report_every_s: Seconds = 1.0
    """How often a worker reports (Serve's metrics_interval_s)."""
    window_s: Seconds = 5.0
    """Reports are averaged over so long (Serve's look_back_period_s)."""
    follows_load: bool = True
    """False: the size changes by command (`shoal scale`) only."""

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.max_workers < self.min_workers:
            raise ValueError(
                f"max_workers = {self.max_workers} is less than min_workers = {self.min_workers}: "
                "raise max_workers or lower min_workers"
            )
        if self.window_s <= self.report_every_s:
            raise ValueError(
                f"window_s = {self.window_s} does not exceed report_every_s = "
                f"{self.report_every_s}: raise window_s, an average needs two reports"
            )
        if self.max_age_s < 2 * self.report_every_s:
            raise ValueError(
                f"max_age_s = {self.max_age_s} is less than twice report_every_s = "
                f"{self.report_every_s}: raise max_age_s, or live workers look stale"
            )
        return self


class ExpertScaling(Scaling):
    """The `Experts` tier: the smallest pool that keeps its workers less busy than the target."""

    target_busy: Fraction = 0.6
    """Mean fraction of time spent computing above which the pool grows."""
    downscale_busy: Fraction = 0.45
    """The pool shrinks only as far as the mean stays below this, so never straight back."""
    max_queue_p95_ms: Annotated[float, Field(gt=0, le=60_000)] = 20.0
    """Mean over the workers of their batches' p95 wait above which one worker is added, however
    idle they look: bursts make a queue before they make a busy average."""
    max_hottest_busy: Fraction = 0.9
    """Busy fraction of the busiest worker above which one worker is added, whatever the mean: every
    token waits for it in each layer, and a newcomer takes copies of the hottest experts."""

    @model_validator(mode="after")
    def _there_is_a_band(self) -> Self:
        _check_band("downscale_busy", self.downscale_busy, "target_busy", self.target_busy)
        return self


class AttentionScaling(Scaling):
    """The `Attention` tier: the smallest pool whose caches hold the requests with room to grow."""

    upscale_delay_s: Delay = 5.0
    downscale_delay_s: Delay = 300.0
    max_step_up: Workers = 2
    target_kv_use: Fraction = 0.7
    """Mean fraction of the KV cache in use above which the pool grows. Prompts that wait count as
    if they were in the cache already."""
    downscale_kv_use: Fraction = 0.5
    """The pool shrinks only as far as the mean stays below this."""
    max_waiting_tokens: Annotated[int, Field(ge=1, le=1 << 30)] = 4096
    """Prompt tokens waiting for each worker above which one worker is added, whatever the
    cache: prefill is the bottleneck then."""

    @model_validator(mode="after")
    def _there_is_a_band(self) -> Self:
        _check_band("downscale_kv_use", self.downscale_kv_use, "target_kv_use", self.target_kv_use)
        return self


def _check_band(low_name: str, low: float, high_name: str, high: float) -> None:
    if low >= high:
        raise ValueError(
            f"{low_name} = {low} is not below {high_name} = {high}: lower {low_name}, "
            "or the pool grows and shrinks by turns"
        )
