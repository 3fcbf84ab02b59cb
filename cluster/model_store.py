"""Which checkpoint to serve, and the check of all its files before anything starts."""

from __future__ import annotations

from pathlib import Path

from attention.memory import cache_dtype, context_length
from attention.tensor_shapes import attention_tensor_shapes
from cluster.config import ConfigError, ShoalConfig
from cluster.generation_defaults import GenerationDefaults
from experts.config import ModelConfig
from experts.errors import CheckpointError
from experts.tensor_files import TensorFiles
from experts.tensor_shapes import expert_tensor_shapes
from router.tensor_shapes import gate_tensor_shapes

EXAMPLE_PROMPT = "Tell me a story about a brave fox named Pip."
"""A first request that the default model answers well."""


def split_model_and_prompt(words: list[str]) -> tuple[Path | None, str | None]:
    """`[MODEL] [PROMPT]`: a first word that is a folder is the model, the rest is the prompt."""
    if words and _is_folder(words[0]):
        return Path(words[0]), " ".join(words[1:]) or None
    if len(words) > 1 and ("/" in words[0] or words[0].startswith(".")):
        raise ConfigError(f"model = {words[0]!r}: no such folder")
    return None, " ".join(words) or None


def _is_folder(word: str) -> bool:
    try:
        return Path(word).is_dir()
    except (OSError, ValueError):  # longer than any path, or with a zero byte: a prompt
        return False


def check_model(folder: Path) -> ModelConfig:
    """Check what a start depends on: every file, name, shape, scale and the tokenizer.

    Raises CheckpointError; nothing has been started then.
    """
    from cluster.tokenizer import Tokenizer

    if not folder.is_dir():
        raise CheckpointError(folder, "a checkpoint folder", "nothing", hint="check the path")
    files = TensorFiles.open(folder)
    for shapes in (attention_tensor_shapes, gate_tensor_shapes, expert_tensor_shapes):
        files.require(shapes(files.config))
    files.check_scales()
    Tokenizer(folder)
    GenerationDefaults.load(folder)
    return files.config


def check_engine(config: ShoalConfig) -> None:
    """Check the engine's settings against the model. Raises ConfigError."""
    model, on_gpu = ModelConfig.load(config.model), config.may_use_gpu("attention")
    try:
        cache_dtype(config.engine, on_gpu)
        context_length(config.engine, model, on_gpu=on_gpu)
    except ValueError as error:
        raise ConfigError(f"attention.engine: {error}") from None


def verify_model(folder: Path) -> str:
    """One line about a checkpoint that passed every check."""
    config = check_model(folder)
    size_gb = TensorFiles.open(folder).total_bytes / 1e9
    return (
        f"ok, {config.model_type}, {size_gb:.3f} GB, {config.num_hidden_layers} layers, "
        f"{len(config.moe_layers)} of them with {config.n_routed_experts} experts"
    )
