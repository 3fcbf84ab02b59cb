"""Small checkpoints: the same bits everywhere, in the layout that safetensors writes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from cluster.tiny_checkpoint import PRESETS, write_checkpoint
from cluster.tiny_weights import quantise_blocks, tensor_shapes, values
from experts.config import ModelConfig

# sha256, first 16 digits, of model-0000{1,2,3}-of-000003.safetensors with the default seed
DIGESTS = {
    "v2-lite": ("82d9067931e6db58", "631de475a956be61", "b74306fc60157d63"),
    "v2": ("a5eee672cf4ed6a4", "284094d65ce97d22", "3b8fb7e397b420ed"),
    "v3": ("e2afc89b947cb335", "bbfd05feb8fbb964", "10cc8086363882a5"),
    "kimi-k2": ("23b8dbb7f708a764", "7c6944645e633bfa", "21cc2e467bd887bd"),
    "v3fp8": ("3a06262f59c8c58f", "eee2908356476f33", "e8c3fdc6e73cdd47"),
    "v3fp8-ue8m0": ("44f061b53b98affc", "e6a25e79aae69576", "8fef07097231825c"),
    "v3fp8-ragged": ("ef974935b8ee3afe", "2551962803818279", "e874e36b7a6213c0"),
}


@pytest.mark.parametrize("preset", DIGESTS)
def test_weights_are_the_same_bits_on_every_machine(
    preset: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    files = sorted(checkpoint_dir(preset).glob("*.safetensors"))
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    assert tuple(digests) == DIGESTS[preset]


def test_files_are_byte_for_byte_what_safetensors_writes(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    for path in checkpoint_dir("v3fp8").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / path.name, metadata={"format": "pt"})
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("v2-lite", 1.859), ("v3", 8.434), ("small", 38.563), ("lite", 1969.770)],
)
def test_parameter_counts(preset: str, millions: float) -> None:
    shapes = tensor_shapes(PRESETS[preset])
    assert sum(map(math.prod, shapes.values())) / 1e6 == pytest.approx(millions, abs=5e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_supported_model(preset: str) -> None:
    config = ModelConfig.parse(PRESETS[preset])
    assert config.moe_layers[0] == config.first_k_dense_replace == 1


def test_index_names_every_tensor_and_totals_their_bytes(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    num_bytes = write_checkpoint(
        tmp_path / "m",
        "v2-lite",
        shards=2,
        progress=lambda done, total: reported.append((done, total)),
    )
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == num_bytes == 2 * 1_858_944  # bfloat16, no gate bias
    assert set(index["weight_map"]) == set(tensor_shapes(PRESETS["v2-lite"]))
    assert set(index["weight_map"].values()) == {
        "model-00001-of-000002.safetensors",
        "model-00002-of-000002.safetensors",
    }
    assert reported[-1] == (num_bytes, num_bytes) and reported == sorted(reported)


def test_another_seed_gives_other_weights() -> None:
    one, other = (values("lm_head.weight", (4, 8), seed) for seed in (1, 2))
    assert not torch.equal(one, other)


def test_next_token_module_holds_copies_of_the_shared_matrices() -> None:
    copy = values("model.layers.4.shared_head.head.weight", (4, 8), seed=1)
    assert torch.equal(copy, values("lm_head.weight", (4, 8), seed=1))


@pytest.mark.parametrize(("power_of_two", "scale"), [(False, 0.5580357), (True, 1.0)])
def test_fp8_vector(power_of_two: bool, scale: float) -> None:
    """By hand: 250 / 448 = 0.5580357; 0.1 / 0.5580357 = 0.1792, e4m3 0.171875, back 0.09591."""
    row = torch.zeros(1, 128)
    row[0, :4] = torch.tensor([0.1, -1.0, 3.3, 250.0])
    codes, scales = quantise_blocks(row, power_of_two)
    assert scales.shape == (1, 1) and scales.item() == pytest.approx(scale, rel=1e-6)
    if not power_of_two:
        assert codes.view(torch.uint8)[0, :5].tolist() == [35, 190, 76, 126, 0]
        back = (codes.float() * scales)[0, :4].tolist()
        assert back == pytest.approx([0.0959124, -0.9765625, 3.3482144, 250.0], rel=1e-6)


def test_partial_blocks_have_their_own_scale() -> None:
    weight = torch.ones(130, 200)
    weight[128:, 128:] = 448.0
    codes, scales = quantise_blocks(weight, power_of_two=False)
    assert codes.shape == (130, 200) and scales.shape == (2, 2)
    assert scales[1, 1] == 1.0 and scales[0, 0] == pytest.approx(1 / 448)


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "m", "v2-lite", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        write_checkpoint(tmp_path, "v2-lite")


def test_unknown_preset_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'v9': expected one of v2-lite, v2, v3, kimi-k2"):
        write_checkpoint(tmp_path / "m", "v9")


def test_files_have_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    """safetensors' own writer makes 0600, which a server of another uid cannot read."""
    before = os.umask(0o022)
    try:
        write_checkpoint(tmp_path / "m", "v2-lite")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "m").iterdir()}
    assert modes == {0o644} and stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o755


def test_tokenizer_gives_any_text_back(checkpoint_dir: Callable[[str], Path]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint_dir("small") / "tokenizer.json"))
    text = "Gruß, 世界 🐟\x00\n\t<think>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.get_vocab_size() == 273 and ids[-1] == 5  # <think> is one token
    assert ids[:2] == [17 + ord("G"), 17 + ord("r")]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
