"""Alerts fire when they should and not before: `promtool test rules`, as Prometheus reckons."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from cluster.autoscaling.serve_policies import NOTICES
from cluster.deploy.manifests.alerting import Scope
from cluster.deploy.manifests.alerts import BLIND_CAUSES, OVERLOAD_CODES, alerts, rule_groups
from cluster.deploy.sections import AlertLimits
from cluster.errors import TABLE
from cluster.observability.catalog import BY_NAME, ERROR_CODES

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
HEALTHY_REPLICAS = 'ray_serve_deployment_replica_healthy{application="shoal",deployment="Experts"}'
EPOCH, READY = "ray_shoal_placement_epoch{}", "ray_shoal_placement_ready{}"
UNDECIDED = 'ray_shoal_scaling_decisions_total{deployment="Experts",cause="error"}'
WANTED, PRESENT = (f'ray_shoal_replicas_{w}{{tier="experts"}}' for w in ("wanted", "present"))
DEATHS = 'ray_shoal_worker_deaths_total{role="experts"}'
IMBALANCE = 'ray_shoal_layer_imbalance{layer="1"}'
BUSY = 'ray_shoal_worker_busy{worker_id="experts-a"}'
ENDED = 'ray_vllm_request_success_total{finished_reason="stop"}'
OVERLOADED = 'ray_shoal_requests_refused_total{code="server_overloaded"}'
INVALID = 'ray_shoal_requests_refused_total{code="invalid_value"}'
FAILED = 'ray_shoal_requests_failed_total{code="engine_error"}'
LATE = 'ray_shoal_requests_failed_total{code="deadline_exceeded"}'
PARKED = "ray_shoal_requests_parked{}"
CACHE, WAITING = "ray_vllm_kv_cache_usage_perc{}", "ray_vllm_num_requests_waiting{}"
HEDGES = "ray_shoal_hedges_total{}"
HOP_FAULTS = 'ray_shoal_hop_faults_total{fault="closed"}'
FRAMES = 'ray_shoal_frame_errors_total{field="crc"}'

GOOD_DAY: Series = {
    UP: "1",
    HEALTHY_REPLICAS: "2",
    EPOCH: "7",
    READY: "1",
    UNDECIDED: "5",  # long ago
    'ray_shoal_scaling_decisions_total{deployment="Experts",cause="load"}': "0+9",
    WANTED: "3",
    PRESENT: "3",
    DEATHS: "8",
    IMBALANCE: "3",  # of an idle pool
    BUSY: "0.2",
    'ray_shoal_worker_busy{worker_id="attention-a"}': "1",
    **first_token(1),
    **token_gap(1),
    **hop(1),
    ENDED: "0+100",
    OVERLOADED: "0+1",
    INVALID: "0+900",  # the clients' own mistakes
    FAILED: "3",
    PARKED: "0",
    CACHE: "0.99",  # and nobody waits for it
    WAITING: "0",
    HEDGES: "0+10",
    HOP_FAULTS: "40",
    FRAMES: "3",
}

CASES: dict[str, tuple[Series, Series]] = {
    "ShoalHeadDown": ({UP: "0"}, {UP: "1x31 0x8"}),
    "ShoalTierEmpty": ({HEALTHY_REPLICAS: "0"}, {HEALTHY_REPLICAS: "2x34 0x5"}),
    "ShoalNoPlacement": ({EPOCH: None}, {EPOCH: "7x27 _x12"}),
    "ShoalNotReady": ({READY: "0"}, {READY: "1x34 0x5"}),
    "ShoalScalingBlind": ({UNDECIDED: "0+1"}, {UNDECIDED: "0x25 9x14"}),
    "ShoalWorkersMissing": ({WANTED: "5"}, {WANTED: "3x25 5x14"}),
    "ShoalWorkersDie": ({DEATHS: "8x25 12x14"}, {DEATHS: "8x25 10x14"}),
    "ShoalImbalance": ({BUSY: "0.9"}, {BUSY: "0.9", IMBALANCE: "1.9"}),
    "ShoalFirstTokenSlow": (first_token(20), first_token(9)),
    "ShoalTokensSlow": (token_gap(20), token_gap(9)),
    "ShoalRequestsRefused": ({OVERLOADED: "0+6"}, {OVERLOADED: "0+5"}),
    "ShoalRequestsFail": ({FAILED: "3x33 4x6"}, {LATE: "0+1"}),
    "ShoalRequestsParked": ({PARKED: "1"}, {PARKED: "0x34 1x5"}),
    "ShoalCacheFull": ({WAITING: "1"}, {WAITING: "1", CACHE: "0.9"}),
    "ShoalHopsSlow": (hop(20), hop(9)),
    "ShoalHedging": ({HEDGES: "0+110"}, {HEDGES: "0+90"}),
    "ShoalHopsFail": ({HOP_FAULTS: "0+1"}, {HOP_FAULTS: "40x25 90x14"}),
    "ShoalFramesDamaged": ({FRAMES: "3x33 4x6"}, {FRAMES: "3x15 4x24"}),
}
"""Alert -> (what makes it fire at minute 35, what is not enough); the rest is a good day."""


def scenario(changes: Series, firing: set[str]) -> dict[str, Any]:
    """A test of promtool: of all alerts exactly `firing` fire."""
    series = {name: values for name, values in (GOOD_DAY | changes).items() if values is not None}
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(firing)]
    query = 'group by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "interval": "1m",
        "input_series": [_input(name, values) for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": f"{NOW_MIN}m", "exp_samples": expected}],
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
    assert promtool(tmp_path, scenario(enough, {name}), scenario(not_enough, set())) == ""


@needs_promtool
def test_a_wrong_expectation_is_told(tmp_path: Path) -> None:
    assert "ShoalHeadDown" in promtool(tmp_path, scenario({}, {"ShoalHeadDown"}))


@needs_promtool
def test_when_every_request_is_refused_there_is_no_success_to_compare_with(tmp_path: Path) -> None:
    refused = scenario({ENDED: None, OVERLOADED: "0+60"}, {"ShoalRequestsRefused"})
    assert promtool(tmp_path, refused) == ""


@needs_promtool
def test_what_a_person_reads(tmp_path: Path) -> None:
    (alert,) = (a for a in alerts(SCOPE, AlertLimits()) if a.name == "ShoalWorkersMissing")
    test = scenario({WANTED: "5"}, {"ShoalWorkersMissing"})
    summary = "2 workers of experts are wanted and not there"
    expected = {
        "exp_labels": {"severity": "warning", "tier": "experts"},
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
    limits = AlertLimits(first_token_s=30, token_gap_s=1, hop_s=0.25)
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
