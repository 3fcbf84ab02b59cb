"""The policies in the form that Ray Serve 2.60 calls, about ten times a second in its controller.

Serve copies this module by value into the controller, so it keeps no state outside its objects and
everything it imports must be installed there. A policy that raises, be it in its constructor,
stops the controller from updating any application: neither method here does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from cluster.autoscaling.policy import decide_attention, decide_experts
from cluster.autoscaling.pool import Decision, Memory, PoolState, Report
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.autoscaling.stats import MAX_KEYS, AttentionStats, ExpertStats, WorkerStats

logger = logging.getLogger("ray.serve.shoal")  # below Serve's own, so it is in the controller's log

NOTICES = {"error", "unknown", "stalled", "skew", "bounds", "coverage"}
"""Causes that are logged although the target stays."""
NOTICE_EVERY_S = 60.0
MAX_MISSED_REPORTS = 3
NEWEST = ("num_slots",)
"""Values that change by command: their average over the window would be of no worker there is."""


def autoscaling_config(scaling: Scaling, initial_workers: int) -> dict[str, Any]:
    """The `autoscaling_config` of the deployment that `scaling` describes; no num_replicas then.

    The delays of Serve are off, as the policy has its own.
    """
    policy = ExpertLoadPolicy if isinstance(scaling, ExpertScaling) else AttentionLoadPolicy
    return {
        "min_replicas": scaling.min_workers,
        "max_replicas": scaling.max_workers,
        "initial_replicas": min(max(initial_workers, scaling.min_workers), scaling.max_workers),
        "metrics_interval_s": scaling.report_every_s,
        "look_back_period_s": scaling.window_s,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "policy": {
            "policy_function": f"cluster.autoscaling.serve_policies:{policy.__name__}",
            "policy_kwargs": scaling.model_dump(exclude={"min_workers", "max_workers"}),
        },
    }


class _LoadPolicy:
    """Settings come from `policy_kwargs`, the bounds from min_replicas and max_replicas."""

    scaling_type: type[Scaling]
    stats_type: type[WorkerStats]
    decide: Callable[[PoolState, float, Any, Memory], Decision]

    def __init__(self, **settings: Any) -> None:
        logger.setLevel(logging.INFO)  # decisions are told however quiet Serve itself is
        self._memory = Memory()
        self._clock = time.monotonic
        self._logged = 0, 0  # target before and after
        self._noticed_s: dict[str, float] = {}
        self._counter: Any = None
        self._fault = ""
        self._settings = self.scaling_type()
        try:
            self._settings = self.scaling_type.model_validate(settings)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "policy_kwargs"
            self._fault = f"{field} = {first['input']!r}: {first['msg']}"

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, for a ray.serve.config.AutoscalingContext."""
        try:
            decision = self._decide(ctx)
        except Exception as error:
            self._notice("error", f"{type(error).__name__}: {error}; the target is held")
            with suppress(Exception):
                self._count(ctx.deployment_name, "error")
            return ctx.target_num_replicas, {}
        self._memory = decision.memory
        with suppress(Exception):  # what cannot be logged or counted is decided all the same
            self._tell(ctx, decision)
        return decision.target, {"cause": decision.cause, "reason": decision.reason}

    def _decide(self, ctx: Any) -> Decision:
        state = self.read_state(ctx)
        if self._fault:
            reason = f"scaling is off, the target is held: {self._fault}"
            return Decision(state.target, "error", reason, self._memory)
        missed_s = MAX_MISSED_REPORTS * ctx.config.metrics_interval_s
        settings = self._settings.model_copy(
            update={
                "min_workers": ctx.capacity_adjusted_min_replicas,
                "max_workers": ctx.capacity_adjusted_max_replicas,
                "max_age_s": max(self._settings.max_age_s, missed_s),
            }
        )
        return type(self).decide(state, self._clock(), settings, self._memory)

    @classmethod
    def read_state(cls, ctx: Any) -> PoolState:
        """What the context says of the pool; the ages are by the clocks of controller and node."""
        averages, series = ctx.aggregated_metrics or {}, ctx.raw_metrics or {}
        names = list(cls.stats_type.model_fields)[:MAX_KEYS]
        reports = {}
        commands = []
        for replica in ctx.running_replicas:
            points = series.get(names[0], {}).get(replica)
            if said := series.get("commanded_workers", {}).get(replica):
                commands.append((said[-1].timestamp, int(said[-1].value)))
            if points:
                values = {n: averages[n][replica] for n in names if replica in averages.get(n, {})}
                for name in NEWEST:
                    if newest := series.get(name, {}).get(replica):
                        values[name] = newest[-1].value
                age_s = ctx.current_time - points[-1].timestamp
                reports[str(replica)] = Report(values, age_s)
        # Of those that know: the newest word, not an average of the sizes asked for.
        _, commanded = max((c for c in commands if c[1] >= 0), default=(0.0, 0))
        return PoolState(ctx.target_num_replicas, ctx.current_num_replicas, reports, commanded)

    def _tell(self, ctx: Any, decision: Decision) -> None:
        """Log a change once, and what keeps the target from changing now and then; count all."""
        self._count(ctx.deployment_name, decision.cause)
        before, after = ctx.target_num_replicas, decision.target
        if before != after and (before, after) != self._logged:
            why = f"{decision.cause}: {decision.reason}"
            logger.info("%s: %d -> %d workers, %s", ctx.deployment_name, before, after, why)
        elif before == after and decision.cause in NOTICES:
            self._notice(decision.cause, f"{ctx.deployment_name}: {decision.reason}")
        self._logged = before, after

    def _notice(self, cause: str, text: str) -> None:
        now_s = self._clock()
        if now_s - self._noticed_s.get(cause, float("-inf")) >= NOTICE_EVERY_S:
            self._noticed_s[cause] = now_s
            logger.log(logging.ERROR if cause == "error" else logging.INFO, "%s", text)

    def _count(self, deployment: str, cause: str) -> None:
        """Counter ray_shoal_scaling_decisions_total; Serve exports the targets itself."""
        if self._counter is None:
            from ray.util.metrics import Counter

            what = "Decisions of the autoscaling policy by their cause."
            self._counter = Counter("shoal_scaling_decisions", what, ("deployment", "cause"))
        self._counter.inc(tags={"deployment": deployment, "cause": cause})


class ExpertLoadPolicy(_LoadPolicy):
    """For the `Experts` deployment: settings of ExpertScaling."""

    scaling_type = ExpertScaling
    stats_type = ExpertStats
    decide = staticmethod(decide_experts)


class AttentionLoadPolicy(_LoadPolicy):
    """For the `Attention` deployment: settings of AttentionScaling."""

    scaling_type = AttentionScaling
    stats_type = AttentionStats
    decide = staticmethod(decide_attention)
