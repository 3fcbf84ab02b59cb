"""Train the model that ships with Shoal: `python tools/train_default_model.py train`."""

from __future__ import annotations

import os

# Two threads that spin for each other slow down twenty times when something else needs a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated  # noqa: E402

import torch  # noqa: E402
import typer  # noqa: E402
from rich.progress import (  # noqa: E402
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from default_model.settings import CONFIG, Recipe  # noqa: E402
from default_model.training import Trainer  # noqa: E402
from default_model.vocabulary import load_tokenizer, train_tokenizer  # noqa: E402

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Run = Annotated[Path, typer.Option(help="Folder of the run: tokenizer, checkpoint, log.")]
DEFAULT_RUN = Path("build/default-model")


@app.command()
def train(
    run: Run = DEFAULT_RUN,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 4,096 tokens.")] = Recipe.steps,
    seed: Annotated[int, typer.Option(help="Of the data and of the first weights.")] = Recipe.seed,
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
