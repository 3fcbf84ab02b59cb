"""The heat map of domains and experts."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from default_model.evaluation import Evaluation
from default_model.settings import CONFIG


def save_heat_map(evaluation: Evaluation, first_layer: int, path: Path) -> None:
    """Share of each domain's rows by expert, a panel a MoE layer, groups apart by white lines."""
    grades = evaluation.grades
    num_layers, num_experts = grades[0].loads.shape
    size = (11, 2.3 * num_layers)
    figure, grid = plt.subplots(num_layers, 1, figsize=size, sharex=True, squeeze=False)
    panels = grid[:, 0]
    group_size = num_experts // CONFIG["n_group"]
    top = max(float(grade.loads.max()) for grade in grades)
    for layer, panel in enumerate(panels):
        rows = [grade.loads[layer].tolist() for grade in grades]
        image = panel.imshow(rows, aspect="auto", cmap="viridis", vmin=0.0, vmax=top)
        panel.set_yticks(range(len(grades)), [grade.domain for grade in grades], fontsize=8)
        panel.set_ylabel(f"layer {first_layer + layer}")
        for edge in range(group_size, num_experts, group_size):
            panel.axvline(edge - 0.5, color="white", linewidth=1.2)
    panels[-1].set_xticks(range(0, num_experts, 4))
    panels[-1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=panels, format=PercentFormatter(1.0))
    bar.set_label(f"share of the domain's rows (even: {1 / num_experts:.1%})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
