"""The policies as Ray Serve builds and calls them, with its own classes but without a cluster."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

import pytest

from cluster.autoscaling.serve_policies import (
    AttentionLoadPolicy,
    ExpertLoadPolicy,
    autoscaling_config,
)
from cluster.autoscaling.settings import AttentionScaling, ExpertScaling, Scaling
from cluster.autoscaling.stats import AttentionStats, ExpertStats
from cluster.deploy.manifests.alerts import UNHEALTHY

with warnings.catch_warnings():  # Ray imports what pydantic deprecates
    warnings.simplefilter("ignore")
    from ray.serve import deployment
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.common import (
        DeploymentID,
        DeploymentStatus,
        DeploymentStatusInfo,
        DeploymentStatusInternalTrigger,
        DeploymentStatusTrigger,
        ReplicaID,
        TimeStampedValue,
    )
    from ray.serve.autoscaling_policy import _apply_autoscaling_config
    from ray.serve.config import AutoscalingConfig, AutoscalingContext

NOW_S = 1_800_000_000.0
EXPERTS = DeploymentID("Experts", "shoal")
PROMPT = ExpertScaling(upscale_delay_s=0, downscale_delay_s=0, settle_s=0, max_workers=6)


def serve_config(scaling: Scaling, initial_workers: int = 2) -> AutoscalingConfig:
    """As Serve keeps it. It warns of metrics_interval_s, which works and has no successor yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(**autoscaling_config(scaling, initial_workers))


def expert(busy: float, commanded: float = -1) -> dict[str, float]:
    stats = ExpertStats(
        commanded_workers=commanded,
        busy_fraction=busy,
        queue_p95_ms=1,
        rows_per_s=1000 * busy,
        num_held=8,
        num_slots=8,
        num_experts=16,
    )
    return stats.as_metrics()


def context(
    reports: list[dict[str, float]],
    config: AutoscalingConfig,
    *,
    target: int | None = None,
    num_running: int | None = None,
    age_s: float = 1.0,
) -> AutoscalingContext:
    """A deployment whose first replicas report; metrics are lazy, as Serve's are."""
    running = len(reports) if num_running is None else num_running
    replicas = [ReplicaID(f"r{i}", EXPERTS) for i in range(running)]
    averages: dict[str, dict[ReplicaID, float]] = {}
    series: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for replica, report in zip(replicas, reports, strict=False):
        for name, value in report.items():
            averages.setdefault(name, {})[replica] = value
            series.setdefault(name, {})[replica] = [TimeStampedValue(NOW_S - age_s, value)]
    return AutoscalingContext(
        deployment_id=EXPERTS,
        deployment_name="Experts",
        app_name="shoal",
        current_num_replicas=running,
        target_num_replicas=running if target is None else target,
        running_replicas=replicas,
        total_num_requests=lambda: 0.0,
        total_queued_requests=lambda: 0.0,
        aggregated_metrics=lambda: averages,
        raw_metrics=lambda: series,
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=NOW_S,
        config=config,
    )


def serve_calls(config: AutoscalingConfig) -> Any:
    """The policy, pickled, instantiated and wrapped as in Serve's controller."""
    return _apply_autoscaling_config(_resolve_policy_callable(config.policy))


@pytest.mark.parametrize("status", ["HEALTHY", "UPSCALING", "DOWNSCALING"])
def test_serve_tells_that_replicas_died_by_the_status_that_alerts_look_at(status: str) -> None:
    """And by another one during a start or a new deployment."""
    dies = DeploymentStatusInternalTrigger.HEALTH_CHECK_FAILED
    why = DeploymentStatusTrigger.AUTOSCALING
    served = DeploymentStatusInfo("Experts", DeploymentStatus(status), why)
    assert served.handle_transition(dies).status.to_numeric() == UNHEALTHY
    starting = DeploymentStatusInfo("Experts", DeploymentStatus.UPDATING, why)
    assert UNHEALTHY not in (
        starting.status.to_numeric(),
        starting.handle_transition(dies).status.to_numeric(),
    )


def test_serve_builds_and_calls_the_expert_policy() -> None:
    config = serve_config(PROMPT)
    policy = serve_calls(config)
    # 2 x 0.9 / 0.6 = 3
    target, state = policy(context([expert(0.9)] * 2, config))
    assert target == 3
    assert state["cause"] == "load"
    assert state["reason"] == "busy 0.90 of 2 workers would need 3 to stay at 0.6"
    assert policy(context([expert(0.1)] * 3, config))[0] == 2  # coverage


def test_serve_builds_and_calls_the_attention_policy() -> None:
    scaling = AttentionScaling(upscale_delay_s=0, settle_s=0)
    config = serve_config(scaling)
    values = dict(kv_use_fraction=0.9, kv_capacity_tokens=8000, waiting_tokens=0)
    values |= dict(waiting_requests=0, running_requests=9, tokens_per_s=100)
    report = AttentionStats.model_validate(values).as_metrics()
    assert serve_calls(config)(context([report] * 2, config))[0] == 3  # 1.8 / 0.7


def test_the_controller_holds_while_it_recovers() -> None:
    """Serve sees no replica then, and would adopt a lower answer at once."""
    config = serve_config(PROMPT)
    policy = serve_calls(config)
    assert policy(context([], config, target=5))[0] == 5
    assert policy(context([], config, num_running=3, target=5))[0] == 5
    assert policy(context([expert(0.1)], config, num_running=3, target=5))[0] == 5


def test_stale_metrics_hold_the_target() -> None:
    """Serve keeps the last values of a replica that hangs."""
    config = serve_config(PROMPT)
    target, state = serve_calls(config)(context([expert(1.0)] * 2, config, age_s=11))
    assert target == 2
    assert "0 of 2 workers have fresh, sane metrics" in state["reason"]


def test_a_slow_metrics_interval_is_not_staleness() -> None:
    """Who writes YAML without metrics_interval_s gets Serve's 10 s."""
    config = AutoscalingConfig(max_replicas=6)
    policy = ExpertLoadPolicy(upscale_delay_s=0, settle_s=0)
    assert policy(context([expert(0.9)] * 2, config, age_s=25))[0] == 3
    assert policy(context([expert(0.9)] * 2, config, age_s=31))[0] == 2


def test_serves_own_delay_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy repeats itself, so that a delay of Serve ends."""
    config = serve_config(PROMPT).model_copy(update={"upscale_delay_s": 30.0})
    policy, state, targets = serve_calls(config), {}, []
    for now_s in (0.0, 29.0, 30.0):
        monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda now=now_s: now)
        ctx = context([expert(0.9)] * 2, config)
        ctx.policy_state = state
        target, state = policy(ctx)
        targets.append(target)
    assert targets == [2, 2, 3]


def test_bounds_come_from_serve() -> None:
    """They shrink with target_capacity during an incremental upgrade, down to none."""
    policy = ExpertLoadPolicy(upscale_delay_s=0, settle_s=0)
    ctx = context([expert(0.9)] * 2, serve_config(PROMPT))
    ctx.capacity_adjusted_min_replicas = ctx.capacity_adjusted_max_replicas = 0
    assert policy(ctx)[0] == 0
    ctx.capacity_adjusted_max_replicas = 2
    assert policy(ctx)[0] == 2


def test_wrong_kwargs_hold_the_target_and_are_told(caplog: pytest.LogCaptureFixture) -> None:
    policy = ExpertLoadPolicy(target_busy=7)
    with caplog.at_level(logging.INFO):
        target, state = policy(context([expert(1.0)] * 2, serve_config(PROMPT)))
    assert target == 2
    assert "target_busy = 7: Input should be less than or equal to 1" in state["reason"]
    assert "scaling is off" in caplog.text


@pytest.mark.parametrize("name", ["aggregated_metrics", "raw_metrics", "config", "current_time"])
def test_a_broken_context_holds_the_target(name: str) -> None:
    ctx = context([expert(1.0)] * 2, serve_config(PROMPT))
    setattr(ctx, name, 3 if name.endswith("metrics") else None)
    assert ExpertLoadPolicy()(ctx)[0] == 2


def test_every_decision_is_counted_by_its_cause_a_policy_that_raises_too() -> None:
    config = serve_config(PROMPT)
    policy = ExpertLoadPolicy()
    counted: list[tuple[str, str]] = []
    policy._count = lambda *labels: counted.append(labels)  # type: ignore[method-assign]
    policy(context([expert(0.5)] * 3, config))
    broken = context([expert(0.5)] * 3, config)
    broken.running_replicas = None  # type: ignore[assignment]
    policy(broken)
    assert counted == [("Experts", "steady"), ("Experts", "error")]


def test_a_change_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    config = serve_config(PROMPT)
    policy = serve_calls(config)
    with caplog.at_level(logging.INFO, "ray.serve.shoal"):
        for _ in range(3):
            policy(context([expert(0.9)] * 2, config))
        policy(context([expert(0.5)] * 3, config))
        for _ in range(3):
            policy(context([], config, target=3))
    ours = [record.message for record in caplog.records if record.name == "ray.serve.shoal"]
    assert ours == [
        "Experts: 2 -> 3 workers, load: busy 0.90 of 2 workers would need 3 to stay at 0.6",
        "Experts: held at 3: no worker runs",
    ]


def test_the_options_fit_a_deployment() -> None:
    scaling = ExpertScaling(min_workers=2, max_workers=6, target_busy=0.5)
    options = autoscaling_config(scaling, initial_workers=9)
    json.dumps(options)  # so it can be written in YAML

    class Replica:
        pass

    with pytest.warns(DeprecationWarning, match="metrics_interval_s"):
        bound = deployment(Replica, name="Experts", autoscaling_config=options)
    config = bound._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 6, 6)
    assert config.policy.policy_function == "cluster.autoscaling.serve_policies:ExpertLoadPolicy"
    policy = ExpertLoadPolicy(**config.policy.policy_kwargs)
    assert not policy._fault
    assert policy._settings.model_dump(exclude={"min_workers", "max_workers"}) == (
        scaling.model_dump(exclude={"min_workers", "max_workers"})
    )
    assert autoscaling_config(AttentionScaling(), 1)["policy"]["policy_function"].endswith(
        AttentionLoadPolicy.__name__
    )


def test_slots_are_the_newest_ones_not_an_average_over_a_drain() -> None:
    ctx = context([expert(0.5)] * 3, serve_config(PROMPT))
    series = ctx.raw_metrics["num_slots"]
    series[next(iter(series))].append(TimeStampedValue(NOW_S, 0.0))
    slots = [r.values["num_slots"] for r in ExpertLoadPolicy.read_state(ctx).reports.values()]
    assert slots == [0.0, 8.0, 8.0]


def test_the_newest_command_counts_and_newcomers_know_none() -> None:
    config = serve_config(PROMPT)
    ctx = context([expert(0.5, 0), expert(0.5, 4), expert(0.5)], config)
    series = ctx.raw_metrics["commanded_workers"]
    first, second = list(series)[:2]
    series[first][-1] = TimeStampedValue(NOW_S - 9, 0)
    series[second][-1] = TimeStampedValue(NOW_S - 1, 4)
    assert ExpertLoadPolicy.read_state(ctx).commanded == 4
    target, _ = ExpertLoadPolicy(**PROMPT.model_dump(exclude={"min_workers", "max_workers"}))(ctx)
    assert target == 4
