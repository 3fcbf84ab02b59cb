"""A plan as a whole: cost, what it suggests to deploy, what it refuses."""

from __future__ import annotations

import pytest

from cluster.config import ConfigError, parse_config
from cluster.deploy.config import parse_deploy_config
from cluster.deploy.hardware import known_gpu, known_network
from cluster.deploy.known_models import known_model
from cluster.deploy.plan import Nodes, Plan, colocated_traffic_limit, plan
from cluster.deploy.plan_report import as_dict
from cluster.deploy.sizing import size

V3, H200 = known_model("v3"), known_gpu("h200")


def planned(
    model: str = "v3", nodes: str = "4x8", context: int = 4096, tpot_ms: float = 50.0
) -> Plan:
    machines = Nodes.parse(nodes)
    network = known_network("nvlink" if machines.count == 1 else "400g")
    return plan(known_model(model), H200, machines, context, tpot_ms, network, 2.0)


class TestPlan:
    def test_cost_follows_from_price_and_rate(self) -> None:
        made = planned()
        cost = made.cost_per_million(made.colocated)
        hourly = made.colocated.tokens_per_s_per_gpu * 3600
        assert cost is not None
        assert cost * hourly / 1e6 == pytest.approx(2.0)

    def test_a_plan_that_cannot_work_still_says_what_would(self) -> None:
        made = planned(nodes="1x4")
        assert not made.works
        assert made.suggestion is None
        assert made.min_expert_gpus == 6
        assert made.cost_per_million(made.colocated) is None

    def test_ports_that_carry_both_directions_are_mentioned(self) -> None:
        # 58 layers x 4 devices x (7,392 out + 14,336 back) bytes at 50 GB/s
        made = planned(nodes="4x8", context=1024)
        limit = colocated_traffic_limit(made.setting, made.colocated.pool)
        assert limit == pytest.approx(50e9 / (58 * 4 * (7392 + 14336)))
        assert made.colocated.tokens_per_s_per_gpu > limit

    def test_several_nodes_are_divided_whole(self) -> None:
        suggested = planned(nodes="4x8").suggestion
        assert suggested is not None
        pool = suggested.layout.pool
        assert (pool.attention_gpus % 8, pool.expert_gpus % 8) == (0, 0)
        assert suggested.gpus_per_pod == (8, 8)
        assert sum(suggested.pods) == 4

    def test_pods_of_equal_size_where_whole_nodes_do_not_work(self) -> None:
        # Two nodes of four: a whole one holds no copy of the experts, six of the eight GPUs do.
        suggested = planned(nodes="2x4", tpot_ms=100).suggestion
        assert suggested is not None
        assert suggested.gpus_per_pod == (2, 2)
        assert suggested.pods == (1, 3)

    def test_redundancy_is_what_has_room(self) -> None:
        # 6 x 2,880 slots of 44 MB in 126.9 GB: 2,432 more than 14,848 experts, an eighth is 1,856.
        suggested = planned(nodes="1x8", tpot_ms=100).suggestion
        assert suggested is not None
        assert suggested.redundancy == 1856
        held = V3.expert_worker_bytes(suggested.slots_per_worker)
        assert held <= H200.usable_bytes

    @pytest.mark.parametrize(
        ("model", "nodes"),
        [("v2-lite", "1x2"), ("v2", "2x8"), ("v3", "2x8"), ("v3", "2x4"), ("kimi-k2", "3x8")],
    )
    def test_the_suggestion_can_be_deployed(self, model: str, nodes: str) -> None:
        made = planned(model, nodes, tpot_ms=100)
        report = as_dict(made)["suggestion"]
        named = {"name": model, "path": "/models/x"}
        assert parse_config(report["deploy"]["settings"]).attention.engine.max_num_seqs > 64
        config = parse_deploy_config({"preset": "gpu-large", "model": named} | report["deploy"])
        sizing = size(config)
        assert sizing.slots_per_worker == report["slots_per_worker"]
        assert config.attention.num_workers == made.suggestion.layout.pool.attention_gpus
        assert config.experts.num_workers == made.suggestion.layout.pool.expert_gpus
        per_token = known_model(model).cache_bytes_per_token()
        assert report["cache_tokens_per_attention_gpu"] == sizing.kv_cache_bytes // per_token

    def test_a_context_beyond_the_model_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="context = 163841: v3 has at most 163840"):
            planned(context=163841)

    @pytest.mark.parametrize("nodes", ["4", "0x8", "4x", "x8", "4x8x2", "-1x8", "٤x8", ""])
    def test_nodes_that_are_none(self, nodes: str) -> None:
        with pytest.raises(ConfigError, match="expected MACHINESxGPUS as in 4x8"):
            Nodes.parse(nodes)

    def test_too_many_gpus(self) -> None:
        with pytest.raises(ConfigError, match="1040 GPUs, at most 1024"):
            Nodes.parse("130x8")
