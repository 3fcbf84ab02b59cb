"""The command line of the trainer: train, export, and what it refuses."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from cluster.model_store import check_model
from default_model import vocabulary
from default_model.training import CHECKPOINT
from tests.tools.conftest import NUM_DIALOGUES, TINY
from train_default_model import app

pytestmark = pytest.mark.usefixtures("tiny")
STEPS = 2


def command(*args: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def train(run: Path, *more: str) -> Result:
    return command(
        "train", "--run", run, "--steps", str(STEPS), "--device", "cpu", "--threads", "1", *more
    )


@pytest.fixture(scope="module")
def run(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a run of two steps; what the command sets for its process is set back."""
    folder = tmp_path_factory.mktemp("run")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "NUM_DIALOGUES", NUM_DIALOGUES)
        result = train(folder)
        assert result.exit_code == 0, result.output
        yield folder
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_export_writes_a_checkpoint_that_can_be_served(run: Path, tmp_path: Path) -> None:
    result = command("export", "--run", run, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    weights = tmp_path / "out" / "model.safetensors"
    assert f"{weights.stat().st_size / 1e6:.1f} MB" in result.output
    model = check_model(tmp_path / "out")
    assert (model.vocab_size, model.hidden_size) == (TINY["vocab_size"], TINY["hidden_size"])


def test_a_finished_run_keeps_its_tokenizer_and_weights(run: Path) -> None:
    tokenizer = (run / "tokenizer.json").read_bytes()
    weights = torch.load(run / CHECKPOINT)["model"]
    assert train(run).exit_code == 0
    assert (run / "tokenizer.json").read_bytes() == tokenizer
    torch.testing.assert_close(torch.load(run / CHECKPOINT)["model"], weights, rtol=0, atol=0)


def test_a_run_is_not_continued_with_another_seed(run: Path) -> None:
    before = (run / CHECKPOINT).stat().st_mtime_ns
    result = train(run, "--seed", "7")
    assert result.exit_code == 2
    assert "seed" in result.output and "Traceback" not in result.output
    assert (run / CHECKPOINT).stat().st_mtime_ns == before
