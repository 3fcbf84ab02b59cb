"""Dashboards, and what Prometheus and Ray's dashboard are told."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import ConfigError
from cluster.deploy.manifests.alerting import Scope
from cluster.deploy.manifests.alerts import alerts
from cluster.deploy.manifests.boards import BOARDS, TAG
from cluster.deploy.manifests.grafana import COLUMNS, SIZES, Board, dump
from cluster.deploy.manifests.monitoring import TARGET_LABELS, by_hand
from cluster.deploy.manifests.promql import NoneOf, Queries
from cluster.deploy.sections import AlertLimits
from cluster.observability.catalog import METRICS
from tests.k8s.deployments import deployment, rendered, templates

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool: apt-get install prometheus"
)
GUIDE = Path(__file__).resolve().parents[2] / "docs/kubernetes.md"
NOT_SHOWN = {
    "vllm_num_requests_swapped",  # always 0; for boards made for vLLM, as the next
    "vllm_request_time_per_output_token_seconds",
    "shoal_worker_requests_total",  # the same as vllm_request_success_total, by worker
    "shoal_worker_rows_per_s",  # for readers without a Prometheus, which has the rate
}
URLS = {
    "prometheus_url": "http://prometheus.monitoring:9090",
    "grafana_url": "http://grafana.monitoring:3000",
}


def monitored(**more: Any) -> Any:
    return deployment("cpu-dev", monitoring={"enabled": True, **more})


@pytest.fixture(params=BOARDS)
def board(request: pytest.FixtureRequest) -> Board:
    return BOARDS[request.param]


class TestBoards:
    def test_panels_lie_side_by_side_and_have_numbers_of_their_own(self, board: Board) -> None:
        panels = json.loads(dump(board, TAG))["panels"]
        assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
        cells: set[tuple[int, int]] = set()
        for panel in panels:
            x, y, width, height = (panel["gridPos"][key] for key in "xywh")
            mine = set(itertools.product(range(x, x + width), range(y, y + height)))
            assert x + width <= COLUMNS and not mine & cells
            cells |= mine

    def test_panels_say_what_they_show_and_in_which_unit(self, board: Board) -> None:
        titles = [panel.title for panel in board.panels]
        assert len(set(titles)) == len(titles)
        for panel in board.panels:
            assert panel.description.endswith(".") and panel.unit and panel.lines
            assert panel.kind in SIZES
            legends = [line.legend for line in panel.lines]
            assert all(legends) and len(set(legends)) == len(legends)

    def test_a_legend_names_labels_that_its_query_keeps(self, board: Board) -> None:
        for panel in board.panels:
            for line in panel.lines:
                kept = {
                    label
                    for by in re.findall(r" by \(([^)]*)\)", line.query)
                    for label in by.split(", ")
                }
                assert set(re.findall(r"{{(\w+)}}", line.legend)) <= kept

    def test_every_query_obeys_the_variables(self, board: Board) -> None:
        text = dump(board, TAG)
        names = [v["name"] for v in json.loads(text)["templating"]["list"]]
        assert names == ["datasource", "job", "cluster"]
        for panel in board.panels:
            for line in panel.lines:
                selectors = re.findall(r"ray_\w+({[^}]*})", line.query)
                assert selectors
                for selector in selectors:
                    assert selector.startswith('{job=~"$job",ray_io_cluster=~"$cluster"')

    @needs_promtool
    def test_every_query_is_one(self, board: Board, tmp_path: Path) -> None:
        queries = [line.query for panel in board.panels for line in panel.lines]
        rules = [
            {"record": f"panel:{i}", "expr": query.replace("$__rate_interval", "1m")}
            for i, query in enumerate(queries)
        ]
        file = tmp_path / "rules.yml"
        file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
        done = subprocess.run([str(PROMTOOL), "check", "rules", file], capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_all_metrics_are_on_a_board_or_in_an_alert(self) -> None:
        queries = [
            line.query for b in BOARDS.values() for panel in b.panels for line in panel.lines
        ]
        queries += [a.query for a in alerts(Scope("ray", 'job="ray"'), AlertLimits())]
        asked = {
            re.sub("_(bucket|sum|count)$", "", name)
            for query in queries
            for name in re.findall(r"ray_(\w+){", query)
        }
        assert {metric.name for metric in METRICS} - asked == NOT_SHOWN


class TestQueries:
    queries = Queries('job="ray"', "5m")

    def test_are_written_with_the_names_of_ray(self) -> None:
        assert self.queries.rate("shoal_hop_faults_total", "fault") == (
            'sum by (fault) (rate(ray_shoal_hop_faults_total{job="ray"}[5m]))'
        )
        assert self.queries.peak("shoal_worker_busy", worker_id=NoneOf(("a", "b"))) == (
            'max(max_over_time(ray_shoal_worker_busy{job="ray",worker_id!~"a|b"}[5m]))'
        )
        assert self.queries.quantile(0.9, "shoal_hop_seconds", part=("queue", "wire")) == (
            "histogram_quantile(0.9, sum by (le) (rate("
            'ray_shoal_hop_seconds_bucket{job="ray",part=~"queue|wire"}[5m])))'
        )

    def test_that_make_no_sense_are_refused(self) -> None:
        with pytest.raises(ValueError, match="shoal_worker_busy is a gauge"):
            self.queries.rate("shoal_worker_busy")
        with pytest.raises(ValueError, match="shoal_hedges_total is a counter"):
            self.queries.rate("shoal_hedges_total", "layer")
        with pytest.raises(KeyError):
            self.queries.rate("shoal_hedgehogs_total")


class TestObjects:
    def test_each_board_is_a_config_map_that_grafanas_sidecar_finds(self) -> None:
        objects = rendered(monitored(dashboard_labels={"board": "yes"}))
        for name, board in BOARDS.items():
            found = objects[f"ConfigMap/shoal-{name}"]
            assert found["metadata"]["labels"]["board"] == "yes"
            text = found["data"][f"{board.uid}.json"]
            assert json.loads(text)["uid"] == board.uid and len(text) < 2**20
        found = rendered(monitored())["ConfigMap/shoal-overview"]
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"

    def test_two_deployments_in_one_namespace_have_objects_of_their_own(self) -> None:
        first, second = (
            set(rendered(monitored().model_copy(update={"name": name}))) for name in ("a", "b")
        )
        assert {"Namespace/shoal"} == first & second

    def test_rules_are_of_this_deployment(self) -> None:
        config = monitored().model_copy(update={"namespace": "ns", "name": "mine"})
        (group,) = rendered(config)["PrometheusRule/mine"]["spec"]["groups"]
        for rule in group["rules"]:
            selectors = re.findall(r"\w+{([^}]*)}", rule["expr"])
            assert selectors and all('job="ns/mine"' in selector for selector in selectors)

    def test_what_scraping_adds_hides_no_label_of_a_metric(self) -> None:
        labels = {label for metric in METRICS for label in metric.labels} | {"worker_id"}
        prometheus = {"job", "instance", "namespace", "pod", "container", "endpoint"}
        assert not labels & (TARGET_LABELS.keys() | prometheus)

    @needs_promtool
    def test_a_prometheus_by_hand_starts_with_these_files(self, tmp_path: Path) -> None:
        for name, text in by_hand().items():
            (tmp_path / name).write_text(text)
        command = [str(PROMTOOL), "check", "config", str(tmp_path / "prometheus.yml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "1 rule files found" in done.stdout


class TestRaysDashboard:
    def environment(self, config: Any) -> dict[str, str]:
        variables = templates(config)["head"]["containers"][0]["env"]
        return {v["name"]: v["value"] for v in variables if re.match("RAY_(PROM|GRAF)", v["name"])}

    def test_is_told_nothing_unless_asked(self) -> None:
        assert self.environment(monitored()) == {}

    def test_is_told_where_prometheus_and_grafana_are(self) -> None:
        browser_url = "https://grafana.example.com/base"
        assert self.environment(monitored(**URLS, grafana_browser_url=browser_url)) == {
            "RAY_PROMETHEUS_HOST": URLS["prometheus_url"],
            "RAY_GRAFANA_HOST": URLS["grafana_url"],
            "RAY_GRAFANA_IFRAME_HOST": browser_url,
        }
        assert self.environment(monitored(**URLS))["RAY_GRAFANA_IFRAME_HOST"] == URLS["grafana_url"]

    def test_reaches_them(self) -> None:
        def peers(**monitoring: Any) -> list[Any]:
            config = deployment("gpu-small", monitoring={"namespace": "watch", **monitoring})
            policy = rendered(config)["NetworkPolicy/shoal-head"]["spec"]
            return [rule["to"] for rule in policy["egress"] if "to" in rule]

        label = {"kubernetes.io/metadata.name": "watch"}
        assert peers() == []
        assert peers(**URLS) == [[{"namespaceSelector": {"matchLabels": label}}]]

    def test_wants_urls(self) -> None:
        for wrong in ("grafana:3000", "http://", "ftp://grafana", "http://a b"):
            with pytest.raises(ConfigError, match=r"monitoring\.grafana_url"):
                monitored(grafana_url=wrong)


def test_what_the_guide_shows_can_be_configured() -> None:
    blocks = re.findall("```yaml\n(monitoring:.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        assert rendered(deployment("gpu-small", **yaml.safe_load(block)))["PrometheusRule/shoal"]
    count = len(alerts(Scope("ray", 'job="ray"'), AlertLimits()))
    assert f"| PrometheusRule | {count} alerts" in GUIDE.read_text()
