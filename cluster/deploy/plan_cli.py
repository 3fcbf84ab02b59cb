"""`shoal plan`: how many GPUs a model needs and what they can do at most."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cluster.cli_common import JsonOption, user_errors
from cluster.console import stdout

CONTEXT_TOKENS = 4096


class Weights(StrEnum):
    """How the matrices are stored."""

    FP8 = "fp8"
    BF16 = "bf16"
    FLOAT32 = "float32"


def plan(
    model: Annotated[
        str,
        typer.Argument(help="v2-lite, v2, v3, kimi-k2, embedded, or a folder with config.json."),
    ],
    gpu: Annotated[str, typer.Option(help="h200, h100-80, b200, a100-80 or l40s.")] = "h200",
    nodes: Annotated[str, typer.Option(help="Machines x GPUs of each.")] = "1x8",
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of context of a sequence, on average; 4096 if the model has them."
        ),
    ] = None,
    tpot_ms: Annotated[
        float, typer.Option(min=0.001, help="Time per output token to keep, in ms.")
    ] = 50.0,
    network: Annotated[
        str | None,
        typer.Option(
            help="Between GPUs: 200g, 400g, 800g, nvlink, nvlink5, shm, ..; without it what "
            "connects the GPUs of one node, or 400g for several."
        ),
    ] = None,
    price: Annotated[float, typer.Option(min=0, help="Of one GPU for an hour.")] = 2.0,
    weights: Annotated[
        Weights | None, typer.Option(help="Their type; without it as the model is published.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what GPUs can serve of a model, at most: memory, division, tokens/s, cost."""
    from cluster.deploy.hardware import known_gpu, known_network
    from cluster.deploy.known_models import model_sizes
    from cluster.deploy.plan import Nodes
    from cluster.deploy.plan import plan as make_plan
    from cluster.deploy.plan_report import as_dict
    from cluster.deploy.plan_table import render

    with user_errors():
        sizes = model_sizes(model, weights.value if weights else None)
        machines, chosen = Nodes.parse(nodes), known_gpu(gpu)
        default_network = chosen.node_network if machines.count == 1 else "400g"
        made = make_plan(
            sizes,
            chosen,
            machines,
            context or min(CONTEXT_TOKENS, sizes.config.max_position_embeddings),
            tpot_ms,
            known_network(network or default_network),
            price,
        )
        if as_json:
            stdout.print_json(data=as_dict(made))
        else:
            stdout.print(render(made))
        if not made.works:
            raise typer.Exit(1)
