"""Alerts fire when they should and not before: `promtool test rules`, as Prometheus reckons."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.autoscaling.serve_policies import NOTICES
from cluster.deploy.manifests.alerting import Scope
from cluster.deploy.manifests.alerts import BLIND_CAUSES, alerts, rule_groups
from cluster.deploy.manifests.traffic_alerts import (
    HARMFUL_FAULTS,
    OVERLOAD_CODES,
    OWN_FAULT_CODES,
    UNSERVED_CODES,
)
from cluster.deploy.sections import AlertLimits
from cluster.errors import TABLE
from cluster.observability.catalog import BY_NAME, ERROR_CODES, FAILURE_CODES
from experts.hop import Fault

JOB = "shoal/shoal"
SCOPE = Scope(JOB, f'job="{JOB}",pod_tier="head"')
PROMTOOL = shutil.which("promtool")
MINUTES = 40
NOW_MIN = 35
Series = dict[str, str | None]
"""Name and labels -> values a minute in promtool's notation, None: there is no such series."""

needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool: apt-get install prometheus"
)


def histogram(name: str, seconds: float, slow: float, **labels: str) -> Series:
    """1,000 observations a minute: `slow` of them above `seconds`, the others below."""
    more = "".join(f'{label}="{value}",' for label, value in labels.items())
    return {
        f'ray_{name}_bucket{{{more}le="{seconds:g}"}}': f"0+{1000 - slow:g}x{MINUTES}",
        f'ray_{name}_bucket{{{more}le="{2 * seconds:g}"}}': f"0+1000x{MINUTES}",
        f'ray_{name}_bucket{{{more}le="+Inf"}}': f"0+1000x{MINUTES}",
        f"ray_{name}_count{{{more[:-1]}}}": f"0+1000x{MINUTES}",
    }


def first_token(slow: float) -> Series:
    return histogram("vllm_time_to_first_token_seconds", 10, slow)


def token_gap(slow: float) -> Series:
    return histogram("vllm_inter_token_latency_seconds", 0.5, slow)


def hop(slow: float) -> Series:
    return histogram("shoal_hop_seconds", 0.1, slow, part="total")


UP = 'up{pod_tier="head"}'
TARGET, HEALTHY, INGRESS_TARGET, INGRESS_HEALTHY = (
    f'ray_serve_{what}{{application="shoal",deployment="{deployment}"}}'
    for deployment in ("Experts", "Ingress")
    for what in ("autoscaling_target_replicas", "deployment_replica_healthy")
)
STATUS = 'ray_serve_deployment_status{application="shoal",deployment="Experts"}'
WANTED, PRESENT = (f'ray_shoal_replicas_{what}{{tier="experts"}}' for what in ("wanted", "present"))
EPOCH, READY = "ray_shoal_placement_epoch{}", "ray_shoal_placement_ready{}"
UNDECIDED, DECIDED = (
    f'ray_shoal_scaling_decisions_total{{deployment="Experts",cause="{cause}"}}'
    for cause in ("unknown", "load")
)
DEATHS = 'ray_shoal_worker_deaths_total{role="experts"}'
IMBALANCE = 'ray_shoal_layer_imbalance{layer="1"}'
BUSY = 'ray_shoal_worker_busy{worker_id="experts-a"}'
ADMITTED = "ray_shoal_requests_admitted_total{}"
OVERLOADED, LOADING, INVALID, STOPPED = (
    f'ray_shoal_requests_refused_total{{code="{code}"}}'
    for code in ("server_overloaded", "model_loading", "invalid_value", "internal_error")
)
FAILED, NO_WORKER, LATE = (
    f'ray_shoal_requests_failed_total{{code="{code}"}}'
    for code in ("engine_error", "no_worker", "deadline_exceeded")
)
PARKED = "ray_shoal_requests_parked{}"
CACHE, WAITING = "ray_vllm_kv_cache_usage_perc{}", "ray_vllm_num_requests_waiting{}"
HEDGES = "ray_shoal_hedges_total{}"
LOST, TIMEOUT, DRAINING = (
    f'ray_shoal_hop_faults_total{{fault="{fault}"}}' for fault in ("lost", "timeout", "draining")
)
DAMAGED, STRANGERS, CUT, HANDLER = (
    f'ray_shoal_frame_errors_total{{field="{field}"}}'
    for field in ("payload_crc", "auth", "truncated", "handler")
)

GOOD_DAY: Series = {
    UP: "1",
    TARGET: "3",
    HEALTHY: "3",
    INGRESS_TARGET: "1",
    INGRESS_HEALTHY: "1",
    STATUS: "6",
    'ray_serve_deployment_status{application="shoal",deployment="Ingress"}': "6",
    WANTED: "3",
    PRESENT: "3",
    EPOCH: "7",
    READY: "1",
    UNDECIDED: "5",  # long ago
    DECIDED: "0+600",
    DEATHS: "8",
    IMBALANCE: "3",  # of an idle pool
    BUSY: "0.2",
    'ray_shoal_worker_busy{worker_id="attention-a"}': "1",
    **first_token(1),
    **token_gap(1),
    **hop(1),
    ADMITTED: "0+100",
    OVERLOADED: "0+1",
    LOADING: "0",
    INVALID: "0+900",  # the clients' own mistakes
    STOPPED: "0",
    FAILED: "3",
    NO_WORKER: "0",
    LATE: "0+1",
    PARKED: "0",
    CACHE: "0.99",  # and nobody waits for it
    WAITING: "0",
    HEDGES: "0+10",
    LOST: "40",
    TIMEOUT: "0+50",  # of hedges
    DRAINING: "0+50",
    DAMAGED: "3",
    STRANGERS: "0+1",  # a scan now and then
    CUT: "0+1",
    HANDLER: "0+1",
}

CASES: dict[str, tuple[Series, Series]] = {
    "ShoalHeadDown": ({UP: "0"}, {UP: "1x31 0x8"}),
    "ShoalTierEmpty": ({INGRESS_HEALTHY: "1x25 0x14"}, {INGRESS_HEALTHY: "1x20 0x4 1x15"}),
    "ShoalNoPlacement": ({EPOCH: None}, {EPOCH: "7x27 _x12"}),
    "ShoalOutage": (
        {READY: "1x30 0x9", DEATHS: "8x29 9x10"},
        {READY: "1x34 0x5", DEATHS: "8x33 9x6"},
    ),
    "ShoalNotReady": ({READY: "0"}, {READY: "1x21 0x18"}),
    "ShoalScalingBlind": ({UNDECIDED: "0+700"}, {UNDECIDED: "0+500"}),
    "ShoalWorkersMissing": ({TARGET: "5"}, {TARGET: "3x21 5x18"}),
    "ShoalWorkersDoNotJoin": ({PRESENT: "2"}, {PRESENT: "3x21 2x18"}),
    "ShoalWorkersDie": ({DEATHS: "8x25 12x14"}, {DEATHS: "8x25 10x14"}),
    "ShoalImbalance": ({BUSY: "0.9"}, {BUSY: "0.9", IMBALANCE: "1.9"}),
    "ShoalFirstTokenSlow": (first_token(20), first_token(9)),
    "ShoalTokensSlow": (token_gap(20), token_gap(9)),
    "ShoalRequestsUnserved": ({NO_WORKER: "0+5"}, {NO_WORKER: "0+3"}),
    "ShoalRequestsFail": ({FAILED: "3x33 4x6"}, {LATE: "0+3"}),
    "ShoalRequestsParked": ({PARKED: "1"}, {PARKED: "0x34 1x5"}),
    "ShoalCacheFull": ({WAITING: "1"}, {WAITING: "1", CACHE: "0.9"}),
    "ShoalHopsSlow": (hop(20), hop(9)),
    "ShoalHedging": ({HEDGES: "0+110"}, {HEDGES: "0+90"}),
    "ShoalHopsFail": ({LOST: "0+12"}, {LOST: "0+9"}),
    "ShoalFramesDamaged": ({DAMAGED: "3x33 4x6"}, {CUT: "0+60", HANDLER: "0+60"}),
    "ShoalStrangers": ({STRANGERS: "0+5"}, {STRANGERS: "0+3"}),
}
"""Alert -> (what makes it fire at minute 35, what never is enough); the rest is a good day."""

ALSO_FIRES: dict[str, tuple[str, Series]] = {
    "refused for want of room": ("ShoalRequestsUnserved", {OVERLOADED: "0+6"}),
    "no request is admitted": ("ShoalRequestsUnserved", {ADMITTED: "0", OVERLOADED: "0+60"}),
    "no request has the time": ("ShoalRequestsUnserved", {LATE: "0+100"}),
    "stopped before it was admitted": ("ShoalRequestsFail", {STOPPED: "0x33 1x6"}),
    "no hop is answered": (
        "ShoalHopsFail",
        {**dict.fromkeys(hop(1), "7"), HEDGES: "7", LOST: "0+1"},
    ),
    "the last ingress went": ("ShoalTierEmpty", {INGRESS_HEALTHY: "1x20 _x19"}),
    "Placement died with a worker": (
        "ShoalOutage",
        {READY: "1x29 _x1 0x9", DEATHS: "8x29 _x1 0x9", STATUS: "6x29 2x10"},
    ),
    "workers in vain": ("ShoalWorkersMissing", {TARGET: "3x15 5x24", HEALTHY: "3x20 4x19"}),
}

STARTING: Series = {  # serves from minute 13 on
    UP: "_x2 1x37",
    EPOCH: "_x3 0x9 7x26",
    READY: "_x3 0x9 1x26",
    TARGET: "_x3 3x36",
    HEALTHY: "_x13 3x26",
    STATUS: "_x3 3x10 6x26",
    WANTED: "_x3 3x36",
    PRESENT: "_x3 0x10 3x26",
    INGRESS_TARGET: "_x3 1x36",
    INGRESS_HEALTHY: "_x4 1x35",
    DEATHS: "_x3 0x36",
    UNDECIDED: "_x4 0+600x8 4800x26",
    DECIDED: "_x13 0+600x26",
    ADMITTED: "_x4 0x8 0+100x26",
    LATE: "_x4 0x35",
    OVERLOADED: "_x4 0x35",
    LOADING: "_x4 0+60x8 480x26",
    PARKED: "_x4 0x2 1x5 0x27",
}
REDEPLOYED: Series = {  # serves nobody from minute 16 to 28
    EPOCH: "7x15 _x1 0x12 7x11",
    READY: "1x15 0x12 1x12",
    HEALTHY: "3x15 0x12 3x12",
    STATUS: "6x15 3x12 6x12",
    WANTED: "3x15 _x1 3x23",
    PRESENT: "3x15 _x1 0x12 3x11",
    INGRESS_HEALTHY: "1x15 0x3 1x21",
    UNDECIDED: "0x15 0+600x11 6600x13",
    DECIDED: "0+600x15 9000x11 9000+600x13",
    ADMITTED: "0+100x15 1500x24",
    LATE: "0",
    OVERLOADED: "0",
}
NEVER: dict[str, Series] = {
    "first start": STARTING,
    "every tier is replaced": REDEPLOYED,
    "idle": {
        **dict.fromkeys(first_token(1) | token_gap(1) | hop(1), "7"),
        **dict.fromkeys((ADMITTED, OVERLOADED, INVALID, LATE, TIMEOUT, DRAINING, HEDGES), "7"),
        STRANGERS: "7",
    },
    "one worker dies": {
        DEATHS: "8x15 9x24",
        HEALTHY: "3x15 2x8 3x16",
        STATUS: "6x15 2x8 6x16",
        PRESENT: "3x15 2x8 3x16",
        LOST: "40x15 90x24",
        CUT: "0x15 4x24",
        OVERLOADED: "0x15 6x24",
    },
    "the load comes and workers with it": {
        **dict.fromkeys((TARGET, WANTED), "3x10 6x29"),
        **dict.fromkeys((HEALTHY, PRESENT), "3x10 4x7 5x5 6x17"),
    },
    "Serve's controller starts again": {UNDECIDED: "0x15 0+600x4 2400x20"},
}
"""What is no reason to call anybody, at any minute."""


def scenario(changes: Series, firing: set[str]) -> dict[str, Any]:
    """A test of promtool: of all alerts exactly `firing` fire."""
    return _test(changes, firing, [NOW_MIN])


def never(changes: Series) -> dict[str, Any]:
    """A test of promtool: no alert fires at any minute until now."""
    return _test(changes, set(), range(1, NOW_MIN + 1))


def _test(changes: Series, firing: set[str], minutes: Iterable[int]) -> dict[str, Any]:
    series = {name: values for name, values in (GOOD_DAY | changes).items() if values is not None}
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)]
    query = 'group by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [_input(name, values) for name, values in series.items()],
        "promql_expr_test": [
            {"expr": query, "eval_time": f"{minute}m", "exp_samples": expected}
            for minute in minutes
        ],
    }


def _input(name: str, values: str) -> dict[str, str]:
    joined = name.replace("{", f'{{job="{JOB}",').replace(",}", "}")
    return {"series": joined, "values": values if "x" in values else f"{values}x{MINUTES}"}


def promtool(folder: Path, *tests: dict[str, Any]) -> str:
    """What it says about these tests of our rules; "" if it agrees."""
    rules = rule_groups("shoal", SCOPE, AlertLimits())
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    file = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": list(tests)}
    (folder / "tests.yml").write_text(yaml.safe_dump(file))
    done = subprocess.run(
        [str(PROMTOOL), "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@needs_promtool
def test_on_a_good_day_nothing_fires(tmp_path: Path) -> None:
    assert promtool(tmp_path, scenario({}, set())) == ""


@needs_promtool
@pytest.mark.parametrize("name", CASES)
def test_an_alert_fires_alone_and_not_too_early(name: str, tmp_path: Path) -> None:
    enough, not_enough = CASES[name]
    assert promtool(tmp_path, scenario(enough, {name}), never(not_enough)) == ""


@needs_promtool
def test_a_wrong_expectation_is_told(tmp_path: Path) -> None:
    assert "ShoalHeadDown" in promtool(tmp_path, scenario({}, {"ShoalHeadDown"}))


@needs_promtool
@pytest.mark.parametrize("case", ALSO_FIRES)
def test_it_fires_for_every_reason(case: str, tmp_path: Path) -> None:
    name, changes = ALSO_FIRES[case]
    assert promtool(tmp_path, scenario(changes, {name})) == ""


@needs_promtool
@pytest.mark.parametrize("case", NEVER)
def test_nobody_is_called_for_what_is_usual(case: str, tmp_path: Path) -> None:
    assert promtool(tmp_path, never(NEVER[case])) == ""


@needs_promtool
def test_a_start_that_takes_too_long_is_told(tmp_path: Path) -> None:
    nothing: Series = dict.fromkeys(GOOD_DAY)
    stuck = {**STARTING, READY: "_x6 0x33", HEALTHY: None, DECIDED: None, ADMITTED: None}
    late = {"ShoalNotReady", "ShoalScalingBlind", "ShoalWorkersMissing"}
    stuck |= {STATUS: "_x3 3x36", PRESENT: "_x3 0x36"}
    stuck |= {UNDECIDED: "_x7 0+600x32", PARKED: "0"}
    tests = scenario(nothing, {"ShoalNotReady"}), scenario(stuck, late)
    assert promtool(tmp_path, *tests) == ""


@needs_promtool
def test_what_a_person_reads(tmp_path: Path) -> None:
    (alert,) = (a for a in alerts(SCOPE, AlertLimits()) if a.name == "ShoalWorkersMissing")
    test = scenario({TARGET: "5"}, {"ShoalWorkersMissing"})
    summary = "2 replicas of Experts are wanted and not there"
    expected = {
        "exp_labels": {"severity": "warning", "deployment": "Experts"},
        "exp_annotations": {**alert.rule["annotations"], "summary": summary},
    }
    test["alert_rule_test"] = [
        {"eval_time": f"{NOW_MIN}m", "alertname": alert.name, "exp_alerts": [expected]}
    ]
    assert promtool(tmp_path, test) == ""


def test_every_alert_has_a_case_and_says_what_to_do() -> None:
    found = alerts(SCOPE, AlertLimits())
    assert [alert.name for alert in found] == list(dict.fromkeys(alert.name for alert in found))
    assert {alert.name for alert in found} == set(CASES)
    for alert in found:
        assert alert.summary and alert.meaning.endswith(".") and alert.todo.endswith(".")


def test_limits_are_those_of_the_configuration() -> None:
    limits = AlertLimits(start_s=1800, first_token_s=30, token_gap_s=1, hop_s=0.25)
    waits = {alert.name for alert in alerts(SCOPE, limits) if alert.wait == "1800s"}
    stay = {"ShoalNotReady", "ShoalScalingBlind", "ShoalWorkersMissing", "ShoalWorkersDoNotJoin"}
    assert waits == stay
    queries = {alert.name: alert.query for alert in alerts(SCOPE, limits)}
    assert queries["ShoalFirstTokenSlow"].endswith("> 30")
    assert queries["ShoalTokensSlow"].endswith("> 1")
    assert queries["ShoalHopsSlow"].endswith("> 0.25")


@pytest.mark.parametrize(
    ("limit", "metric"),
    [
        ("first_token_s", "vllm_time_to_first_token_seconds"),
        ("token_gap_s", "vllm_inter_token_latency_seconds"),
        ("hop_s", "shoal_hop_seconds"),
    ],
)
def test_no_limit_is_beyond_what_its_histogram_can_tell(limit: str, metric: str) -> None:
    largest_s = BY_NAME[metric].bounds[-1]
    AlertLimits.model_validate({limit: 0.99 * largest_s})
    with pytest.raises(ValidationError):  # such an alert could never fire
        AlertLimits.model_validate({limit: largest_s})


def test_codes_and_causes_are_those_that_are_counted() -> None:
    assert set(OVERLOAD_CODES) <= ERROR_CODES
    statuses = {error.default_code: kind.http_status for error, kind in TABLE.items()}
    assert {statuses.get(code, 503) for code in OVERLOAD_CODES} == {503}
    assert set(BLIND_CAUSES) <= NOTICES
    assert set(HARMFUL_FAULTS) <= {fault.name.lower() for fault in Fault}


def test_every_way_to_fail_calls_somebody() -> None:
    assert {*UNSERVED_CODES, *OWN_FAULT_CODES} == FAILURE_CODES
