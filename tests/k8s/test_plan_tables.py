"""The tables of docs/planning.md: what a token costs and sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.deploy import token_costs
from cluster.deploy.hardware import known_gpu, known_network
from cluster.deploy.known_models import known_model
from cluster.deploy.plan import REPORTED, Nodes, plan

H200 = known_gpu("h200")
K = 1024


class TestDecode:
    """V3 on H200, one token at full efficiency."""

    @pytest.mark.parametrize(
        ("context", "attention_us", "ratio", "bound"),
        [
            (512, 32.5, 1.26, 17.1e3),
            (1 * K, 43.6, 1.68, 14.4e3),
            (2 * K, 65.6, 2.54, 10.9e3),
            (4 * K, 109.6, 4.24, 7.4e3),
            (8 * K, 197.7, 7.64, 4.5e3),
            (32 * K, 726, 28, 1.33e3),
            (128 * K, 2840, 110, 349),
        ],
    )
    def test_by_context(
        self, context: int, attention_us: float, ratio: float, bound: float
    ) -> None:
        v3 = known_model("v3")
        attention_s = token_costs.attention_s(v3, H200, context)
        assert attention_s * 1e6 == pytest.approx(attention_us, rel=2e-3)
        assert token_costs.gpu_ratio(v3, H200, context) == pytest.approx(ratio, rel=5e-3)
        assert token_costs.decode_bound(v3, H200, context) == pytest.approx(bound, rel=7e-3)

    def test_the_parts(self) -> None:
        v3 = known_model("v3")
        assert token_costs.expert_s(v3, H200) * 1e6 == pytest.approx(25.9, abs=0.05)
        assert token_costs.matmul_s(v3, H200) * 1e6 == pytest.approx(21.5, abs=0.05)
        per_context_token = token_costs.core_compute_s(v3, H200, 1)
        assert per_context_token * 1e9 == pytest.approx(21.5, abs=0.05)

    def test_h100_reads_longer_than_it_computes(self) -> None:
        v3, h100 = known_model("v3"), known_gpu("h100")
        assert token_costs.core_read_s(v3, h100, 1) > token_costs.core_compute_s(v3, h100, 1)
        # 117 us in the table, which cuts 117.5
        assert token_costs.attention_s(v3, h100, 4 * K) * 1e6 == pytest.approx(117, rel=5e-3)
        assert token_costs.gpu_ratio(v3, h100, 4 * K) == pytest.approx(4.5, rel=0.01)

    @pytest.mark.parametrize(
        ("name", "context", "attention_us", "bound"),
        [
            ("v2-lite", 512, 6.5, 101e3),
            ("v2-lite", 4 * K, 32.4, 27.9e3),
            ("v2", 4 * K, 118.2, 7.2e3),
        ],
    )
    def test_other_models_in_bf16(
        self, name: str, context: int, attention_us: float, bound: float
    ) -> None:
        sizes = known_model(name)
        attention_s = token_costs.attention_s(sizes, H200, context)
        assert attention_s * 1e6 == pytest.approx(attention_us, rel=5e-3)
        assert token_costs.decode_bound(sizes, H200, context) == pytest.approx(bound, rel=5e-3)

    @pytest.mark.parametrize(
        ("prompt", "us", "rate"),
        [(4 * K, 58.1, 17.2e3), (32 * K, 148.8, 6.7e3), (128 * K, 460, 2.2e3)],
    )
    def test_prefill(self, prompt: int, us: float, rate: float) -> None:
        seconds = token_costs.prefill_s(known_model("v3"), H200, prompt)
        assert seconds * 1e6 == pytest.approx(us, rel=1e-3)
        assert 1 / seconds == pytest.approx(rate, rel=0.012)

    def test_what_is_reported_is_the_share_of_the_bound_that_is_claimed(self) -> None:
        # DeepSeek: 14.8k tokens/s on 8 H800 (an H100's rates) at a mean context of 4,989 tokens.
        bound = token_costs.decode_bound(known_model("v3"), known_gpu("h100"), 4989)
        low, high = REPORTED
        assert low <= 14.8e3 / 8 / bound <= high + 0.005


class TestExperts:
    @pytest.mark.parametrize(
        ("num_experts", "chosen", "tokens", "touched"),
        [
            (256, 8, 1, 8),
            (256, 8, 16, 102),
            (256, 8, 32, 163),
            (256, 8, 64, 222),
            (256, 8, 128, 252),
            (64, 6, 1, 6),
            (64, 6, 4, 20.8),
            (64, 6, 16, 50.8),
            (64, 6, 32, 61.2),
        ],
    )
    def test_touched_by_random_tokens(
        self, num_experts: int, chosen: int, tokens: int, touched: float
    ) -> None:
        expected = token_costs.experts_touched(num_experts, chosen, tokens)
        assert expected == pytest.approx(touched, rel=3e-3)

    @pytest.mark.parametrize(
        ("name", "tokens"),
        [("v3", 5879), ("v2-lite", 1960), ("v2", 4899), ("kimi-k2", 8819)],
    )
    @pytest.mark.parametrize("weights", ["fp8", "bf16"])
    def test_tokens_that_outweigh_reading(self, name: str, tokens: int, weights: str) -> None:
        sizes = known_model(name, "fp8" if weights == "fp8" else "bf16")
        # the table leaves out the scales, 0.024 %
        assert token_costs.tokens_to_fill(sizes, H200) == pytest.approx(tokens, rel=5e-4)


class TestNetwork:
    @pytest.mark.parametrize(
        ("name", "fp8", "bf16"),
        [("v3", 7392, 14336), ("v2", 5280, 10240), ("v2-lite", 2112, 4096)],
    )
    def test_bytes_of_a_hop(self, name: str, fp8: int, bf16: int) -> None:
        assert token_costs.dispatch_bytes(known_model(name, "fp8")) == fp8
        assert token_costs.dispatch_bytes(known_model(name, "bf16")) == bf16
        assert token_costs.return_bytes(known_model(name, "fp8")) == bf16

    @pytest.mark.parametrize(
        ("network", "rates"),
        [
            ("400g", (30.1e3, 15.0e3, 7.5e3)),
            ("nvlink", (271e3, 135e3, 67.7e3)),
            ("shm", (4.0e3, 2.0e3, 1.0e3)),
        ],
    )
    def test_limit_of_a_port(self, network: str, rates: tuple[float, ...]) -> None:
        v3, port = known_model("v3"), known_network(network)
        for spread, rate in zip((2, 4, 8), rates, strict=True):
            assert token_costs.port_limit(v3, port, spread) == pytest.approx(rate, rel=0.011)

    def test_a_token_of_v3_through_all_layers(self) -> None:
        v3 = known_model("v3")
        assert 58 * 4 * token_costs.dispatch_bytes(v3) / 1e6 == pytest.approx(1.715, abs=5e-4)
        assert 58 * 4 * token_costs.return_bytes(v3) / 1e6 == pytest.approx(3.326, abs=5e-4)

    @pytest.mark.parametrize(
        ("name", "devices", "reached"),
        [
            ("v3", 4, 3.61),
            ("v3", 8, 5.29),
            ("v3", 16, 6.52),
            ("v3", 32, 7.27),
            ("v2-lite", 4, 3.35),
            ("v2-lite", 8, 4.54),
            ("v2-lite", 16, 5.32),
        ],
    )
    def test_devices_of_uniform_experts(self, name: str, devices: int, reached: float) -> None:
        config = known_model(name).config
        ungrouped = config.model_copy(update={"n_group": 1, "topk_group": 1})
        assert token_costs.destinations(ungrouped, devices) == pytest.approx(reached, abs=0.005)

    def test_groups_limit_the_devices(self) -> None:
        assert token_costs.destinations(known_model("v3").config, 32) == 4
        assert token_costs.destinations(known_model("v2").config, 32) == 3
        assert token_costs.destinations(known_model("v3").config, 2) == 2

    def test_a_device_for_every_expert_and_more(self) -> None:
        assert token_costs.destinations(known_model("v2-lite").config, 100) == 6

    def test_the_port_lowers_the_useful_ratio(self) -> None:
        # An expert GPU could use 38.7k tokens/s; 400 Gb/s let 15.0k through: 1.6 instead of 4.2.
        made = plan(known_model("v3"), H200, Nodes(4, 8), 4096, 50, known_network("400g"), 2.0)
        assert 1 / token_costs.expert_s(known_model("v3"), H200) == pytest.approx(38.7e3, rel=2e-3)
        assert made.port_limit == pytest.approx(15.0e3, rel=3e-3)
        assert made.gpu_ratio == pytest.approx(4.24, abs=0.005)
        assert made.useful_gpu_ratio == pytest.approx(1.65, abs=0.01)


class TestMoreHardwareNeverHurts:
    @pytest.mark.parametrize("name", ["v2-lite", "v2", "v3", "kimi-k2"])
    @pytest.mark.parametrize("context", [64, 4096, 131072])
    @pytest.mark.parametrize(
        "field", ["bandwidth_bytes_per_s", "bf16_flops_per_s", "fp8_flops_per_s"]
    )
    def test_a_token_takes_no_longer(self, name: str, context: int, field: str) -> None:
        sizes = known_model(name)
        better = replace(H200, **{field: 2 * getattr(H200, field)})
        before = token_costs.decode_bound(sizes, H200, context)
        assert token_costs.decode_bound(sizes, better, context) >= before
