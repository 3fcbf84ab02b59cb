"""Train the model that ships with Shoal: `python tools/train_default_model.py train`."""

from __future__ import annotations

import os

# Two threads that spin for each other slow down twenty times when something else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import signal
from dataclasses import replace
from pathlib import Path
from threading import Event
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
from default_model.training import RecipeChanged, Trainer, load_run
from default_model.vocabulary import load_tokenizer, train_tokenizer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Run = Annotated[Path, typer.Option(help="Folder of the run: tokenizer, checkpoint, log.")]
ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "cluster/models/shoal-tiny"
HEAT_MAP = ROOT / "docs/default-model-experts.png"
DEFAULT_RUN = ROOT / "runs/default-model"


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
    torch.set_float32_matmul_precision("high")
    torch.set_num_threads(threads or os.cpu_count() or 1)
    run.mkdir(parents=True, exist_ok=True)
    vocabulary = run / "tokenizer.json"
    if not vocabulary.exists():
        train_tokenizer(seed, CONFIG["vocab_size"]).save(str(vocabulary))
    try:
        trainer = Trainer(run, load_tokenizer(vocabulary), recipe, device)
    except RecipeChanged as error:
        raise typer.BadParameter(str(error)) from None
    stopped = _stop_on_signal()
    with _progress() as progress:
        task = progress.add_task("", total=steps, completed=trainer.step)
        for step in trainer.run():
            progress.update(task, completed=step, description=_describe(trainer))
            if stopped.is_set():
                trainer.save()
                raise typer.Exit(130)


def _stop_on_signal() -> Event:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in the middle."""
    stopped = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    return stopped


@app.command()
def export(
    run: Run = DEFAULT_RUN,
    out: Annotated[Path, typer.Option(help="The checkpoint folder to write.")] = SHIPPED,
) -> None:
    """Write the run's model as a checkpoint folder: fp8 weights, tokenizer, configs."""
    tokenizer = load_tokenizer(run / "tokenizer.json")
    model, story = load_run(run)
    num_bytes = write_files(model, tokenizer, story, out)
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB of weights")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Option(help="The checkpoint folder to grade.")] = SHIPPED,
    items: Annotated[int, typer.Option(min=1, help="Held-out items a domain.")] = 200,
    figure: Annotated[Path, typer.Option(help="Where the heat map goes.")] = HEAT_MAP,
) -> None:
    """Grade a folder on held-out items; writes its model card and the heat map."""
    from default_model.card import SAMPLE_PROMPTS, model_card
    from default_model.evaluation import evaluate as grade
    from default_model.figures import save_heat_map

    result = grade(folder, items, SAMPLE_PROMPTS)
    card = model_card(result, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    save_heat_map(result, CONFIG["first_k_dense_replace"], figure)
    typer.echo(card)


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
