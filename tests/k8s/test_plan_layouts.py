"""Bounds of a pool of GPUs: what limits them, and what never hurts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.deploy.hardware import Gpu, known_gpu, known_network
from cluster.deploy.known_models import known_model
from cluster.deploy.layout import Layout, best_colocated, best_layout, best_split
from cluster.deploy.step_time import Pool, Setting, step_bound
from cluster.deploy.token_costs import decode_bound

H200 = known_gpu("h200")


def setting(
    model: str = "v3",
    network: str = "400g",
    context: int = 4096,
    tpot_ms: float = 50,
    gpu: Gpu = H200,
) -> Setting:
    return Setting(known_model(model), gpu, known_network(network), context, tpot_ms / 1e3)


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
