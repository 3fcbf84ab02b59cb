"""Train the model that ships with Shoal: `python tools/train_default_model.py train`."""

from __future__ import annotations

import os

# Two threads that spin for each other slow down twenty times when something else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from default_model.export import export as write_files
from default_model.settings import CONFIG, Recipe
from default_model.training import CHECKPOINT, Trainer, load_model
from default_model.vocabulary import load_tokenizer, train_tokenizer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Run = Annotated[Path, typer.Option(help="Folder of the run: tokenizer, checkpoint, log.")]
SHIPPED = Path(__file__).parent.parent / "cluster/models/shoal-tiny"
DEFAULT_RUN = Path("build/default-model")


@app.callback()
def main() -> None:
    """Train, export and grade the model that ships with Shoal."""


@app.command()
def train(
    run: Run = DEFAULT_RUN,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 4,096 tokens.")] = Recipe().steps,
    seed: Annotated[int, typer.Option(help="Of data and first weights.")] = Recipe().seed,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: all cores.")] = 0,
) -> None:
    """Train, or continue the run of the folder. Ctrl-C loses nothing: the state is saved."""
    recipe = replace(Recipe(), steps=steps, seed=seed)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(threads or os.cpu_count() or 1)
    run.mkdir(parents=True, exist_ok=True)
    vocabulary = run / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(seed, CONFIG["vocab_size"]).save(str(vocabulary))
    trainer = Trainer(run, load_tokenizer(vocabulary), recipe, device)
    with _progress() as progress:
        task = progress.add_task("", total=steps, completed=trainer.step)
        try:
            for step in trainer.run():
                progress.update(task, completed=step, description=_describe(trainer))
        except KeyboardInterrupt:
            trainer.save()
            raise typer.Exit(130) from None


@app.command()
def export(
    run: Run = DEFAULT_RUN,
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")] = SHIPPED,
) -> None:
    """Write the run's model as a checkpoint folder: fp8 weights, tokenizer, configs."""
    tokenizer = load_tokenizer(run / "tokenizer.json")
    num_bytes = write_files(load_model(run / CHECKPOINT), tokenizer, out)
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB of weights")


def _progress() -> Progress:
    return Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip


def _describe(trainer: Trainer) -> str:
    losses = [loss for loss in trainer.averages.losses if loss == loss]
    speed = trainer.num_tokens / max(trainer.train_s, 1e-9)
    return f"loss {sum(losses) / len(losses):.3f}, {speed:,.0f} tokens/s"


if __name__ == "__main__":
    app()
