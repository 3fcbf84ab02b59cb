"""Sizes of the released models as published, and memory of the workers that hold them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from cluster.config import default_model, parse_config
from cluster.deploy.hardware import known_gpu
from cluster.deploy.known_models import KNOWN, known_model, model_sizes
from cluster.deploy.sizes import ModelSizes
from cluster.members import slots_per_worker
from cluster.site import expert_space, redundancy
from experts.errors import CheckpointError

RELEASED = ("v2-lite", "v2", "v3", "kimi-k2")


class TestPublishedSizes:
    """docs/planning.md has the same table."""

    @pytest.mark.parametrize(
        ("name", "total", "active", "with_embedding", "routed"),
        [
            ("v2-lite", 15.71, 2.45, 2.66, 14.39),
            ("v2", 235.74, 20.85, 21.38, 222.72),
            ("v3", 671.03, 36.62, 37.55, 653.91),
            ("kimi-k2", 1026.41, 31.69, 32.86, 1014.69),
        ],
    )
    def test_parameters_in_billions(
        self, name: str, total: float, active: float, with_embedding: float, routed: float
    ) -> None:
        sizes = known_model(name)
        assert sizes.total_params / 1e9 == pytest.approx(total, abs=0.005)
        assert sizes.active_params / 1e9 == pytest.approx(active, abs=0.005)
        embedded = sizes.active_params + sizes.embedding_params
        assert embedded / 1e9 == pytest.approx(with_embedding, abs=0.0051)
        assert sizes.routed_params / 1e9 == pytest.approx(routed, abs=0.005)

    @pytest.mark.parametrize(
        ("name", "attention_side_b"),
        [
            ("v2-lite", 0.89),
            ("v2", 11.97),
            ("v3", 15.26),
            ("kimi-k2", 9.37),
        ],
    )
    def test_attention_side(self, name: str, attention_side_b: float) -> None:
        sizes = known_model(name)
        assert sizes.attention_side_params / 1e9 == pytest.approx(attention_side_b, abs=0.005)

    @pytest.mark.parametrize(
        ("name", "fp8_mb", "layer_gb"),
        [
            ("v2-lite", 8.65, 0.554),
            ("v2", 23.59, 3.775),
            ("v3", 44.04, 11.274),
            ("kimi-k2", 44.04, 16.911),
        ],
    )
    def test_one_expert(self, name: str, fp8_mb: float, layer_gb: float) -> None:
        fp8, bf16 = known_model(name, "fp8"), known_model(name, "bf16")
        # The table leaves out the scales: 4 bytes for 128 x 128 weights, 0.024 %.
        assert fp8.expert_bytes / 1e6 == pytest.approx(fp8_mb, rel=1e-3)
        assert bf16.expert_bytes / 1e6 == pytest.approx(2 * fp8_mb, rel=1e-3)
        in_a_layer = fp8.config.n_routed_experts * fp8.expert_bytes
        assert in_a_layer / 1e9 == pytest.approx(layer_gb, rel=1e-3)

    @pytest.mark.parametrize(
        ("name", "per_token_g", "absorbed_m", "naive_m"),
        [
            ("v2-lite", 4.90, 0.94, 0.28),
            ("v2", 41.70, 16.71, 4.92),
            ("v3", 73.25, 16.99, 5.00),
            ("kimi-k2", 63.37, 8.50, 2.50),
        ],
    )
    def test_flops(self, name: str, per_token_g: float, absorbed_m: float, naive_m: float) -> None:
        sizes = known_model(name)
        assert sizes.flops_per_token / 1e9 == pytest.approx(per_token_g, abs=0.005)
        absorbed = sizes.core_flops_per_context_token()
        assert absorbed / 1e6 == pytest.approx(absorbed_m, abs=0.005)
        naive = sizes.core_flops_per_context_token("naive")
        assert naive / 1e6 == pytest.approx(naive_m, abs=0.005)

    @pytest.mark.parametrize(
        ("name", "cache_bytes", "intensity"),
        [("v2-lite", 31104, 30), ("v2", 69120, 242), ("v3", 70272, 242), ("kimi-k2", 70272, 121)],
    )
    def test_cache(self, name: str, cache_bytes: int, intensity: int) -> None:
        sizes = known_model(name)
        assert sizes.cache_bytes_per_token() == cache_bytes
        assert round(sizes.core_flops_per_context_token() / cache_bytes) == intensity

    def test_v3_in_memory(self) -> None:
        # 653.9 GB of experts and 18.8 GB beside them, bf16 gates and fp8 scales not counted.
        v3 = known_model("v3")
        experts = v3.expert_worker_bytes(v3.num_experts_total)
        assert experts / 1e9 == pytest.approx(653.9, rel=5e-4)
        assert v3.attention_side_bytes / 1e9 == pytest.approx(18.8, rel=0.016)

    def test_an_fp8_matrix_has_a_scale_for_every_block(self) -> None:
        # V3's expert: three of 2048 x 7168, 16 x 56 blocks of 4 bytes each.
        v3 = known_model("v3")
        assert v3.expert_bytes - v3.expert_params == 3 * 16 * 56 * 4


class TestRealFiles:
    def test_the_embedded_model_takes_what_its_file_says(self) -> None:
        folder = default_model()
        stored = _tensor_bytes(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        next_token = f"model.layers.{config['num_hidden_layers']}."
        main = {name: size for name, size in stored.items() if not name.startswith(next_token)}
        experts = {name: size for name, size in main.items() if ".mlp.experts." in name}
        sizes = known_model("embedded")
        assert sum(experts.values()) == sizes.expert_worker_bytes(sizes.num_experts_total)
        beside = sum(main.values()) - sum(experts.values())
        assert sizes.attention_side_bytes == pytest.approx(beside, rel=1e-3)  # float32 biases

    def test_a_folder_is_read_like_a_name(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(KNOWN["v2-lite"]))
        assert model_sizes(str(tmp_path)).total_params == known_model("v2-lite").total_params

    def test_a_folder_without_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json"):
            model_sizes(str(tmp_path))

    @pytest.mark.parametrize(
        ("raw", "weights"),
        [
            ({}, "bf16"),
            ({"torch_dtype": "float32"}, "float32"),
            ({"quantization_config": KNOWN["v3"]["quantization_config"]}, "fp8"),
        ],
    )
    def test_the_type_of_the_weights_is_the_configs(
        self, raw: dict[str, Any], weights: str
    ) -> None:
        assert ModelSizes.of(KNOWN["v2-lite"] | raw).weights == weights


class TestWorkers:
    @pytest.mark.parametrize("name", [*RELEASED, "embedded"])
    @pytest.mark.parametrize("workers", [1, 2, 7, 16])
    def test_slots_and_redundancy_are_the_clusters_own(self, name: str, workers: int) -> None:
        sizes = known_model(name)
        config = parse_config({"experts": {"num_workers": workers}})
        assert sizes.default_redundancy == redundancy(config, expert_space(sizes.config))
        assert sizes.slots_per_worker(workers) == slots_per_worker(config, sizes.config)

    @pytest.mark.parametrize(("gpu", "fewest"), [("h200", 6), ("h100-80", 10)])
    def test_one_copy_of_v3s_experts(self, gpu: str, fewest: int) -> None:
        assert known_model("v3").expert_workers_needed(known_gpu(gpu).usable_bytes, 0) == fewest

    @pytest.mark.parametrize("name", RELEASED)
    @pytest.mark.parametrize("redundancy", [0, 1, None])
    def test_the_fewest_workers_fit_and_one_less_does_not(
        self, name: str, redundancy: int | None
    ) -> None:
        sizes, memory = known_model(name), 40e9
        fewest = sizes.expert_workers_needed(memory, redundancy)

        def held(workers: int) -> int:
            return sizes.expert_worker_bytes(sizes.slots_per_worker(workers, redundancy))

        assert held(fewest) <= memory
        assert fewest == 1 or held(fewest - 1) > memory

    def test_memory_too_small_for_a_unit_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"1\.0 GB hold none of v3's units of 32 experts"):
            known_model("v3").expert_workers_needed(1e9)

    def test_an_attention_worker_dequantises_kv_b_and_transposes_half_of_it(self) -> None:
        # 61 layers x 128 heads x 512 latent values x (128 + 128 of kv_b, 128 transposed) in bf16
        v3 = known_model("v3")
        assert v3.attention_copies_bytes == 61 * 128 * 512 * (256 + 128) * 2
        bf16 = known_model("v3", "bf16")
        assert bf16.attention_copies_bytes == 61 * 128 * 512 * 128 * 2

    def test_the_cache_grows_by_the_token(self) -> None:
        lite = known_model("v2-lite")
        grown = lite.attention_worker_bytes(1000) - lite.attention_worker_bytes()
        assert grown == 1000 * 31104
        assert lite.cache_bytes_per_token(itemsize=4) == 2 * 31104


def _tensor_bytes(file: Path) -> dict[str, int]:
    """Of every tensor in a safetensors file, from its header."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {
        name: tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for name, tensor in header.items()
    }
