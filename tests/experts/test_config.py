"""ModelConfig: what config.json files of the supported families say, and what is refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.tiny_checkpoint import PRESETS
from experts.config import ModelConfig
from experts.errors import CheckpointError

V2LITE_REAL = PRESETS["v2-lite"] | {
    "num_hidden_layers": 27,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
YARN = {"factor": 32.0, "original_max_position_embeddings": 4096}
FP8 = PRESETS["v3fp8"]["quantization_config"]


def parse(
    preset: str = "v3", generation: dict[str, Any] | None = None, **fields: Any
) -> ModelConfig:
    return ModelConfig.parse(PRESETS[preset] | fields, generation)


def without(preset: str, *names: str) -> dict[str, Any]:
    return {name: value for name, value in PRESETS[preset].items() if name not in names}


def test_latent_width() -> None:
    assert ModelConfig.parse(V2LITE_REAL).latent_width == 512 + 64


def test_moe_layers_follow_the_dense_ones_at_the_given_frequency() -> None:
    assert parse().moe_layers == (1, 2, 3)
    config = parse(num_hidden_layers=9, first_k_dense_replace=3, moe_layer_freq=2)
    assert config.moe_layers == (4, 6, 8)
    assert not config.is_moe_layer(2) and config.is_moe_layer(4)


@pytest.mark.parametrize(
    ("preset", "limited", "per_group"),
    [("v2-lite", False, 16), ("v2", True, 4), ("v3", True, 4), ("kimi-k2", False, 16)],
)
def test_group_limit(preset: str, limited: bool, per_group: int) -> None:
    config = parse(preset)
    assert (config.is_group_limited, config.experts_per_group) == (limited, per_group)


def test_rope_of_old_and_new_files() -> None:
    old = parse(rope_theta=50000, rope_scaling=YARN | {"type": "yarn"})
    parameters = YARN | {"rope_type": "yarn", "rope_theta": 50000.0}
    new = ModelConfig.parse(
        without("v3", "rope_scaling", "rope_theta") | {"rope_parameters": parameters}
    )
    assert old.rope_scaling == new.rope_scaling and old.rope_theta == new.rope_theta == 50000.0
    assert new.rope_scaling is not None and new.rope_scaling.factor == 32.0
    assert (new.rope_scaling.mscale, new.rope_scaling.mscale_all_dim) == (1.0, 0.0)


@pytest.mark.parametrize("plain", [None, {}, {"rope_type": "default", "rope_theta": 7.0}])
def test_plain_rope(plain: dict[str, Any] | None) -> None:
    config = parse(rope_parameters=plain, rope_scaling=None, rope_theta=7)
    assert config.rope_scaling is None and config.rope_theta == 7.0


@pytest.mark.parametrize(
    ("removed", "added", "field", "value"),
    [
        ("num_nextn_predict_layers", {"num_mtp_layers": 2}, "num_nextn_predict_layers", 2),
        ("n_routed_experts", {"num_experts": 32}, "n_routed_experts", 32),
        ("n_routed_experts", {"num_local_experts": 32}, "n_routed_experts", 32),
        ("torch_dtype", {"dtype": "float32"}, "torch_dtype", "float32"),
        ("q_lora_rank", {"q_lora_rank": 0}, "q_lora_rank", None),
        ("q_lora_rank", {}, "q_lora_rank", None),
        ("topk_method", {}, "topk_method", "noaux_tc"),
        ("topk_method", {"topk_method": "gready"}, "topk_method", "greedy"),
        ("scoring_func", {}, "scoring_func", "sigmoid"),
        ("norm_topk_prob", {"norm_topk_prob": None}, "norm_topk_prob", True),
        ("routed_scaling_factor", {}, "routed_scaling_factor", 2.5),
        ("moe_layer_freq", {}, "moe_layer_freq", 1),
    ],
)
def test_other_spellings_and_defaults(
    removed: str, added: dict[str, Any], field: str, value: object
) -> None:
    assert getattr(ModelConfig.parse(without("v3", removed) | added), field) == value


def test_missing_groups_are_one_group() -> None:
    config = parse(n_group=None, topk_group=None)
    assert (config.n_group, config.topk_group, config.is_group_limited) == (1, 1, False)


def test_v2_defaults_differ_from_v3() -> None:
    names = ("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor")
    config = ModelConfig.parse(without("v2-lite", *names))
    assert [getattr(config, name) for name in names] == ["softmax", "greedy", False, 1.0]


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (1, None, (1,)),
        ([1, 5], None, (1, 5)),
        (1, [2, 3], (2, 3)),
        (None, 4, (4,)),
        (None, None, ()),
    ],
)
def test_eos_ids(in_config: Any, in_generation: Any, expected: tuple[int, ...]) -> None:
    config = parse(eos_token_id=in_config, generation={"eos_token_id": in_generation})
    assert config.eos_token_ids == expected


def test_kimi_k2_is_read_like_v3() -> None:
    config = ModelConfig.parse(without("kimi-k2", "scoring_func") | {"model_type": "kimi_k2"})
    assert config.scoring_func == "sigmoid" and config.q_lora_rank is None


@pytest.mark.parametrize("preset", PRESETS)
def test_fp8_is_there_only_when_the_file_says_so(preset: str) -> None:
    quantization = parse(preset).quantization
    assert (quantization is not None) == preset.startswith("v3fp8")
    if preset == "v3fp8-ue8m0":
        assert quantization is not None and quantization.scale_fmt == "ue8m0"


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "deepseek_v32"},
        "'deepseek_v2', 'deepseek_v3' or 'kimi_k2', found 'deepseek_v32'",
    ),
    ({"model_type": "llama"}, "found 'llama'"),
    ({"model_type": ["x"]}, "model_type"),
    ({"topk_method": "best"}, "'greedy', 'group_limited_greedy' or 'noaux_tc', found 'best'"),
    ({"scoring_func": "tanh"}, "scoring_func to be 'softmax' or 'sigmoid', found 'tanh'"),
    ({"hidden_act": "gelu"}, "hidden_act to be 'silu', found 'gelu'"),
    ({"torch_dtype": "float16"}, "float16 overflows in these models: convert"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"rope_interleave": False}, "rope_interleave"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type to be 'yarn'"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_scaling": YARN | {"type": "yarn", "attention_factor": 2.0}}, "attention_factor"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method to be 'fp8', found 'awq'"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt to be 'e4m3', found 'e5m2'"),
    ({"quantization_config": FP8 | {"weight_block_size": [64, 64]}}, "weight_block_size"),
    ({"quantization_config": FP8 | {"weight_block_size": None}}, "weight_block_size"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme"),
    ({"n_group": 3}, "n_group dividing n_routed_experts, found n_group 3"),
    ({"topk_group": 5}, "topk_group of at most n_group"),
    ({"num_experts_per_tok": 9}, "at most 8, the experts in the kept groups, found 9"),
    ({"n_group": 16, "topk_group": 4}, "at least 2 experts in a group"),
    ({"first_k_dense_replace": 4}, "at least one mixture-of-experts layer"),
    ({"eos_token_id": 512}, "below vocab_size 512"),
    ({"eos_token_id": "</s>"}, "eos_token_ids"),
    ({"hidden_size": "256"}, "hidden_size to be a valid integer, found '256'"),
    ({"hidden_size": -1}, "hidden_size"),
    ({"hidden_size": None}, "a field hidden_size"),
    ({"qk_rope_head_dim": 15}, "qk_rope_head_dim"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
    ({"vocab_size": 10**30}, "vocab_size"),
    ({"n_routed_experts": None}, "a field n_routed_experts"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_in_one_line_that_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(**fields)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: expected ")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "valid JSON"),
        ("{", "valid JSON"),
        ("[]", "a JSON object"),
        ("[" * 100_000, "valid JSON"),
        ('{"model_type": "deepseek_v3", "model_type": "x"}', "valid JSON"),
        ("\udcff", "valid JSON"),
    ],
    ids=["empty", "cut", "list", "deep", "key twice", "not UTF-8"],
)
def test_damaged_config_file(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.load(tmp_path)
    assert caught.value.expected == expected
    assert caught.value.file == str(tmp_path / "config.json")


def test_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="config.json: expected a readable file, found No such"
    ):
        ModelConfig.load(tmp_path)


def test_load_reads_generation_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["v3"]))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == (7, 9)


def test_error_survives_a_process_boundary() -> None:
    error = CheckpointError("f", "x", "y\nz", tensor="t", hint="h")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - what multiprocessing and Ray do
    assert str(again) == str(error) == "f: tensor t: expected x, found y z (h)"
    assert (again.file, again.tensor, again.expected, again.hint) == ("f", "t", "x", "h")


def test_config_is_read_without_torch() -> None:
    """`shoal --help` and planning import it; torch costs 200 MB and a second."""
    code = "import experts.config, sys; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
