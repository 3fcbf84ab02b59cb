"""Bounds of a pool of GPUs: the published comparison, what limits them, and what never hurts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import ConfigError
from cluster.deploy.config import parse_deploy_config
from cluster.deploy.hardware import Gpu, known_gpu, known_network
from cluster.deploy.known_models import known_model
from cluster.deploy.layout import Layout, best_colocated, best_layout, best_split
from cluster.deploy.plan import Nodes, Plan, plan
from cluster.deploy.plan_report import as_dict
from cluster.deploy.sizing import size
from cluster.deploy.step_time import Pool, Setting, step_bound
from cluster.deploy.token_costs import decode_bound

V3, H200 = known_model("v3"), known_gpu("h200")


def setting(
    model: str = "v3",
    network: str = "400g",
    context: int = 4096,
    tpot_ms: float = 50,
    gpu: Gpu = H200,
) -> Setting:
    return Setting(known_model(model), gpu, known_network(network), context, tpot_ms / 1e3)


def planned(
    model: str = "v3", nodes: str = "4x8", context: int = 4096, tpot_ms: float = 50.0
) -> Plan:
    machines = Nodes.parse(nodes)
    network = known_network("nvlink" if machines.count == 1 else "400g")
    return plan(known_model(model), H200, machines, context, tpot_ms, network, 2.0)


# ---- the published comparison

AS_PUBLISHED = replace(
    H200, memory_bytes=H200.memory_bytes + (V3.attention_worker_bytes() - 18.8e9) / 0.9
)
"""The table counts 18.8 GB of attention side; a worker of ours holds 3.4 GB more (copies of kv_b,
gates, scales)."""
PUBLISHED_TPOT_MS = 62.5
"""The table does not say its time per token: this fits it best."""
SPLIT_AND_COLOCATED = {
    # (context, GPUs, network): colocated, split, attention + expert GPUs
    (1024, 8, "nvlink"): (9.2, 5.2, 2, 6),
    (1024, 16, "400g"): (13.6, 6.8, 8, 8),
    (1024, 32, "400g"): (13.7, 7.2, 16, 16),
    (1024, 64, "400g"): (13.8, 7.2, 32, 32),
    (1024, 32, "nvlink"): (14.9, 14.5, 19, 13),
    (4096, 8, "nvlink"): (2.7, 1.8, 2, 6),
    (4096, 16, "400g"): (5.0, 3.2, 8, 8),
    (4096, 32, "400g"): (7.1, 4.3, 16, 16),
    (4096, 64, "400g"): (7.5, 4.8, 35, 29),
    (4096, 32, "nvlink"): (7.1, 5.9, 21, 11),
    (16384, 8, "nvlink"): (0.69, 0.47, 2, 6),
    (16384, 16, "400g"): (1.48, 1.02, 9, 7),
    (16384, 32, "400g"): (1.81, 1.44, 21, 11),
    (16384, 64, "400g"): (2.09, 1.74, 50, 14),
    (16384, 32, "nvlink"): (2.03, 1.66, 23, 9),
}
TOLERANCE = 0.065
"""The rest of the deviation is mostly the head, 2.3 us a token: the table leaves it out, or its
14.9k would be above the compute bound of 14.4k."""
COLOCATED_TOLERANCE = {(1024, 16, "400g"): 0.09}


class TestPublishedComparison:
    """V3 in fp8 on H200, 15 us a hop, k tokens/s a GPU."""

    @pytest.mark.parametrize("case", SPLIT_AND_COLOCATED)
    def test_split(self, case: tuple[int, int, str]) -> None:
        context, _, network = case
        _, expected, attention, experts = SPLIT_AND_COLOCATED[case]
        there = setting("v3", network, context, PUBLISHED_TPOT_MS, AS_PUBLISHED)
        found = best_layout(there, Pool(True, attention, experts))
        assert found.tokens_per_s_per_gpu / 1e3 == pytest.approx(expected, rel=TOLERANCE)

    @pytest.mark.parametrize("case", SPLIT_AND_COLOCATED)
    def test_colocated(self, case: tuple[int, int, str]) -> None:
        context, gpus, network = case
        expected = SPLIT_AND_COLOCATED[case][0]
        there = setting("v3", network, context, PUBLISHED_TPOT_MS, AS_PUBLISHED)
        found = best_colocated(there, gpus).tokens_per_s_per_gpu / 1e3
        assert found == pytest.approx(expected, rel=COLOCATED_TOLERANCE.get(case, TOLERANCE))

    def test_all_of_it_on_average(self) -> None:
        errors = []
        for (context, gpus, network), row in SPLIT_AND_COLOCATED.items():
            there = setting("v3", network, context, PUBLISHED_TPOT_MS, AS_PUBLISHED)
            colocated = best_colocated(there, gpus).tokens_per_s_per_gpu
            split = best_layout(there, Pool(True, row[2], row[3])).tokens_per_s_per_gpu
            errors += [abs(colocated / row[0] / 1e3 - 1), abs(split / row[1] / 1e3 - 1)]
        assert sum(errors) / len(errors) < 0.03

    @pytest.mark.parametrize("case", SPLIT_AND_COLOCATED)
    def test_the_best_division_is_no_worse_than_the_published_one(
        self, case: tuple[int, int, str]
    ) -> None:
        context, gpus, network = case
        _, _, attention, experts = SPLIT_AND_COLOCATED[case]
        there = setting("v3", network, context, PUBLISHED_TPOT_MS, AS_PUBLISHED)
        published = best_layout(there, Pool(True, attention, experts))
        best = best_split(there, gpus)
        assert best.tokens_per_s_per_gpu >= published.tokens_per_s_per_gpu

    def test_the_splits_that_have_one_choice(self) -> None:
        # Six H200 are the fewest that hold the experts: of eight, two are left.
        best = best_split(setting(network="nvlink", tpot_ms=60), 8)
        assert (best.pool.attention_gpus, best.pool.expert_gpus) == (2, 6)


class TestBounds:
    @pytest.mark.parametrize("model", ["v2-lite", "v2", "v3", "kimi-k2"])
    @pytest.mark.parametrize("context", [512, 4096, 32768])
    @pytest.mark.parametrize("gpus", [16, 48])
    def test_no_layout_exceeds_the_compute_bound(self, model: str, context: int, gpus: int) -> None:
        there = setting(model, "nvlink5", context, 1000)
        bound = decode_bound(there.sizes, there.gpu, context)
        for layout in (best_split(there, gpus), best_colocated(there, gpus)):
            assert layout.tokens_per_s_per_gpu <= bound * (1 + 1e-9)

    @pytest.mark.parametrize("context", [1024, 16384])
    @pytest.mark.parametrize("gpus", [8, 32])
    @pytest.mark.parametrize(
        "field",
        ["memory_bytes", "bandwidth_bytes_per_s", "bf16_flops_per_s", "fp8_flops_per_s"],
    )
    def test_a_better_gpu_is_never_slower(self, context: int, gpus: int, field: str) -> None:
        better = replace(H200, **{field: 1.5 * getattr(H200, field)})
        for search in (best_split, best_colocated):
            before = search(setting(context=context), gpus).tokens_per_s_per_gpu
            assert search(setting(context=context, gpu=better), gpus).tokens_per_s_per_gpu >= before

    @pytest.mark.parametrize("gpus", [8, 16, 32])
    def test_a_faster_network_is_never_slower(self, gpus: int) -> None:
        for search in (best_split, best_colocated):
            rates = [
                search(setting(network=network), gpus).tokens_per_s_per_gpu
                for network in ("shm", "200g", "400g", "800g", "nvlink", "nvlink5")
            ]
            assert rates == sorted(rates)

    def test_more_time_per_token_is_never_slower(self) -> None:
        rates = [
            best_split(setting(tpot_ms=tpot_ms), 16).tokens_per_s_per_gpu
            for tpot_ms in (5, 20, 30, 40, 50, 60, 100, 1000)
        ]
        assert rates == sorted(rates)
        assert rates[0] == 0

    def test_longer_contexts_are_never_faster(self) -> None:
        rates = [
            best_split(setting(context=context), 16).tokens_per_s_per_gpu
            for context in (128, 1024, 4096, 16384, 65536)
        ]
        assert rates == sorted(rates, reverse=True)

    def test_the_step_keeps_the_time_per_token_and_the_next_sequence_would_not(self) -> None:
        there = setting(network="nvlink", context=1024, tpot_ms=60)
        found = best_split(there, 8)
        assert found.limit == "latency"
        assert found.step_s <= 0.060
        longer = step_bound(there, found.pool, found.sequences + 1, found.micro_batches)
        assert longer.seconds > 0.060

    def test_one_gpu_needs_no_network(self) -> None:
        slow, fast = (setting("v2-lite", network) for network in ("shm", "nvlink5"))
        assert best_colocated(slow, 1) == best_colocated(fast, 1)
        assert best_colocated(slow, 1).sequences > 0


class TestLimits:
    """What is said to limit is what raises the bound when there is more of it."""

    @pytest.mark.parametrize(
        ("model", "network", "context", "tpot_ms", "pool", "limit"),
        [
            ("v3", "nvlink", 4096, 60, Pool(True, 2, 6), "memory"),
            ("v3", "nvlink", 1024, 60, Pool(True, 2, 6), "latency"),
            ("v3", "400g", 1024, 60, Pool(True, 16, 16), "network"),
            ("v3", "400g", 16384, 50, Pool(True, 50, 14), "compute"),
            ("v2-lite", "nvlink", 16384, 60, Pool(True, 6, 2), "bandwidth"),
        ],
    )
    def test_by_name(
        self,
        model: str,
        network: str,
        context: int,
        tpot_ms: float,
        pool: Pool,
        limit: str,
    ) -> None:
        there = setting(model, network, context, tpot_ms)
        found = best_layout(there, pool)
        assert found.limit == limit

        def doubled(**changes: object) -> Layout:
            return best_layout(replace(there, **changes), pool)

        gpu, net = there.gpu, there.network
        relieved = {
            "memory": doubled(gpu=replace(gpu, memory_bytes=2 * gpu.memory_bytes)),
            "latency": doubled(tpot_s=2 * there.tpot_s),
            "network": doubled(network=replace(net, bytes_per_s=2 * net.bytes_per_s)),
            "compute": doubled(gpu=replace(gpu, bf16_flops_per_s=2 * gpu.bf16_flops_per_s)),
            "bandwidth": doubled(
                gpu=replace(gpu, bandwidth_bytes_per_s=2 * gpu.bandwidth_bytes_per_s)
            ),
        }
        assert relieved[limit].tokens_per_s_per_gpu > 1.02 * found.tokens_per_s_per_gpu

    @pytest.mark.parametrize(
        ("pool", "context", "tpot_ms", "limit", "why"),
        [
            (Pool(True, 3, 5), 4096, 50, "memory", "the experts do not fit on 5 GPUs"),
            (Pool(False, 6, 6), 4096, 50, "memory", "the weights do not fit"),
            (Pool(False, 7, 7), 163840, 50, "memory", "less than one context"),
            (Pool(True, 8, 8), 4096, 2, "latency", "even 1 sequence(s) a GPU take"),
        ],
    )
    def test_what_cannot_work_says_why(
        self, pool: Pool, context: int, tpot_ms: float, limit: str, why: str
    ) -> None:
        found = best_layout(setting("v3", "400g", context, tpot_ms), pool)
        assert found.tokens_per_s_per_gpu == 0
        assert found.limit == limit
        assert why in found.why


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
