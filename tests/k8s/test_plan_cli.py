"""`shoal plan`: what it prints, in 80 columns and as JSON, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.deploy import plan_cli
from cluster.deploy.known_models import KNOWN

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(plan_cli.plan)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cli, "stdout", Console(highlight=False, width=80))


def shoal_plan(*words: str, exit_code: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == exit_code, result.output
    return result.stdout


def as_json(*words: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(shoal_plan(*words, "--json"))
    return body


def refused(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """The one line on standard error."""
    errors = Console(stderr=True, width=1000)
    monkeypatch.setattr("cluster.cli_common.stderr", errors)
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    return result.stderr


class TestText:
    def test_v3_on_four_nodes(self) -> None:
        text = shoal_plan("v3", "--gpu", "h200", "--nodes", "4x8", "--price", "2.5")
        for said in (
            "v3 (fp8) on 4 x 8 h200, 400g: 4,096 tokens of context, 50 ms a token",
            "Bounds at full efficiency, not promises",
            "25-30 % of them",
            "109.6 us",
            "25.9 us",
            "6, for 654 GB",
            "4.24 attention GPUs keep an expert GPU busy",
            "attention: {gpu: h200, gpus_per_pod: 8, pods: 2}",
        ):
            assert said in text

    @pytest.mark.parametrize(
        "words",
        [
            ("v3", "--nodes", "64x8"),
            ("v3", "--nodes", "1x4"),
            ("v2-lite", "--nodes", "1x1", "--context", "128"),
            ("embedded", "--nodes", "1x2", "--gpu", "l40s", "--network", "shm"),
            ("kimi-k2", "--gpu", "l40s", "--nodes", "128x8", "--tpot-ms", "1000"),
            ("v2", "--nodes", "2x8", "--context", "131072", "--weights", "fp8"),
        ],
    )
    def test_no_line_is_longer_than_80_and_nothing_is_cut(self, words: tuple[str, ...]) -> None:
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code in (0, 1)
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "…" not in result.stdout

    def test_every_bound_is_shown_as_one(self) -> None:
        text = shoal_plan("v3", "--nodes", "4x8")
        rows = re.findall(r"^ (?:split|colocated|whole nodes) .*$", text, re.MULTILINE)
        assert len(rows) == 3
        assert all("<= " in row and ">= " in row for row in rows)

    def test_the_lines_for_deploy_yaml_are_yaml(self) -> None:
        text = shoal_plan("v3", "--nodes", "4x8")
        block = text.split("For deploy.yaml\n")[1].split("\n(")[0]
        assert yaml.safe_load(block) == as_json("v3", "--nodes", "4x8")["suggestion"]["deploy"]

    def test_every_formula_is_printed_with_its_source(self) -> None:
        words = " ".join(shoal_plan("v3").split())
        for formula in as_json("v3")["formulas"]:
            source = " ".join(formula["source"].split())
            assert f"{formula['name']}: {formula['formula']} [{source}]" in words

    def test_what_does_not_fit_says_what_would_and_fails(self) -> None:
        text = shoal_plan("v3", "--nodes", "1x4", exit_code=1)
        assert "colocated: the experts do not fit on 4 GPUs" in text
        assert "6, for 654 GB" in text
        assert "deploy.yaml" not in text

    def test_the_document_shows_what_is_printed(self) -> None:
        document = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
        command, shown = document.split("```console\n$ shoal ")[1].split("\n```")[0].split("\n", 1)
        printed = shoal_plan(*command.split()[1:]).split("\nFormulas and sources")[0]
        assert [line.rstrip() for line in printed.rstrip().splitlines()] == shown.splitlines()

    def test_v3s_traffic_both_ways_is_mentioned_where_it_matters(self) -> None:
        said = "colocated is generous: ports that dispatch and return at once allow 9.92k"
        assert said in shoal_plan("v3", "--nodes", "4x8", "--context", "1024")
        assert "generous" not in shoal_plan("v3", "--nodes", "4x8")


class TestJson:
    def test_figures_agree_with_each_other(self) -> None:
        body = as_json("v3", "--nodes", "4x8", "--price", "3")
        for layout in body["layouts"].values():
            attention, experts = layout["attention_gpus"], layout["expert_gpus"]
            gpus = attention if attention == experts == 32 else attention + experts
            assert gpus == 32
            made = layout["sequences_per_attention_gpu"] * attention / layout["step_s"]
            assert layout["tokens_per_s_per_gpu"] == pytest.approx(made / 32)
            cost = 3 / (layout["tokens_per_s_per_gpu"] * 3600) * 1e6
            assert layout["cost_per_million_tokens"] == pytest.approx(cost)
            assert layout["step_s"] <= body["tpot_s"]

    def test_gpu_network_and_formulas_carry_sources(self) -> None:
        body = as_json("v2-lite")
        sourced = [body["gpu"], body["network"], *body["formulas"]]
        assert all(item["source"] for item in sourced)

    def test_one_gpu_has_no_split(self) -> None:
        body = as_json("v2-lite", "--nodes", "1x1")
        assert set(body["layouts"]) == {"colocated"}
        assert body["suggestion"] is None
        assert body["token"]["port_tokens_per_s"] is None

    def test_the_network_is_the_nodes_own_unless_there_are_several(self) -> None:
        assert as_json("v3", "--nodes", "1x8")["network"]["name"] == "nvlink"
        assert as_json("v3", "--nodes", "2x8")["network"]["name"] == "400g"
        named = as_json("v3", "--nodes", "2x8", "--network", "nvlink")
        assert named["network"]["name"] == "nvlink"

    def test_a_folder_is_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(KNOWN["v2-lite"]))
        body = as_json(str(tmp_path))
        assert body["model"]["total_params"] == as_json("v2-lite")["model"]["total_params"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (("v33",), "model = 'v33': not known, did you mean v3?"),
            (("v3", "--gpu", "h20"), "gpu = 'h20': not known, did you mean h200?"),
            (("v3", "--network", "400"), "network = '400': not known, did you mean 400g?"),
            (("v3", "--nodes", "4*8"), "nodes = '4*8': expected MACHINESxGPUS as in 4x8"),
            (("v3", "--context", "200000"), "context = 200000: v3 has at most 163840 positions"),
            (("v3", "--price", "inf"), "price = inf: expected a number"),
            (("v3", "--tpot-ms", "inf"), "tpot_ms = inf: expected a number"),
            (("./nowhere",), "model = './nowhere': no such folder"),
        ],
    )
    def test_in_one_line(
        self, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
    ) -> None:
        assert said in refused(monkeypatch, *words)

    def test_a_broken_config(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert "config.json: expected a field" in refused(monkeypatch, str(tmp_path))
