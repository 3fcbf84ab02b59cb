"""Rows of layers x experts as text: bars whose height and colour say how hot. Pure.

Where the experts are more than the columns, a column shows the hottest of several: none is lost.
Where there is room, an expert has several columns. Without colours the bars' heights remain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from cluster.top.reading import Load

BARS = "·▁▂▃▄▅▆▇█"
COLOURS = (
    "dim",
    "#4575b4",
    "#4d93c1",
    "#57b0a7",
    "#7fbf5a",
    "#d9b93b",
    "#f0932b",
    "#e8602c",
    "#d7191c",
)
"""By level, as BARS: no rows at all, then eighths of the hottest expert's."""
NOBODY, NOBODY_STYLE = "!", "bold red"
"""In the place of an expert that nobody holds."""
MAX_CELL_WIDTH = 3
BALANCE_WIDTH = 5
MIN_TICK_WIDTH = 6


@dataclass(frozen=True)
class Grid:
    """How E experts fill the columns."""

    num_experts: int
    experts_per_cell: int
    cell_width: int

    @classmethod
    def fit(cls, num_experts: int, width: int) -> Grid:
        """The widest that `width` columns (at least 1) have room for."""
        experts_per_cell = math.ceil(num_experts / width)
        num_cells = math.ceil(num_experts / experts_per_cell)
        return cls(num_experts, experts_per_cell, min(MAX_CELL_WIDTH, width // num_cells))

    def cells(self) -> range:
        """The first expert of each cell."""
        return range(0, self.num_experts, self.experts_per_cell)

    def axis(self) -> str:
        """Numbers of experts above the cells that they begin."""
        text = ""
        for cell, expert in enumerate(self.cells()):
            column = cell * self.cell_width
            if column >= len(text) and column % MIN_TICK_WIDTH == 0:
                text = text.ljust(column) + str(expert)
        return text


def heat_map(load: Load, width: int, first: int = 0, num_layers: int | None = None) -> list[Text]:
    """A head, an axis and a line for each of `num_layers` layers from position `first` on."""
    shown = range(first, len(load.layers))[:num_layers]
    label_width = max(len(str(layer)) for layer in load.layers) + 1
    grid = Grid.fit(len(load.recent_rows[0]), max(width - label_width - BALANCE_WIDTH, 1))
    hottest = max(max(rows) for rows in load.recent_rows)
    lines = [_head(load, grid, hottest, shown), Text(" " * label_width + grid.axis(), "dim")]
    for position in shown:
        line = Text(f"{load.layers[position]:{label_width - 1}} ", "dim")
        line.append_text(_cells(load.recent_rows[position], load.holders[position], grid, hottest))
        line.append(f" {load.balancedness[position]:.2f}", "dim")
        lines.append(line)
    return lines


def _head(load: Load, grid: Grid, hottest: int, shown: range) -> Text:
    head = Text("experts", "bold")
    head.append(f"  rows of the last {load.recent_s:g} s, █ = {load.per_s(hottest):.3g}/s")
    if grid.experts_per_cell > 1:
        head.append(f"; the hottest of each {grid.experts_per_cell}")
    if len(shown) < len(load.layers):
        head.append(
            f"; layers {load.layers[shown.start]}-{load.layers[shown.stop - 1]}"
            f" of {load.layers[0]}-{load.layers[-1]}"
        )
    return head.append("; right: balance", "dim")


def _cells(rows: Sequence[int], holders: Sequence[Sequence[int]], grid: Grid, hottest: int) -> Text:
    line = Text()
    for expert in grid.cells():
        members = slice(expert, expert + grid.experts_per_cell)
        if all(holders[members]):
            level = level_of(max(rows[members]), hottest)
            line.append(BARS[level] * grid.cell_width, COLOURS[level])
        else:
            line.append(NOBODY * grid.cell_width, NOBODY_STYLE)
    return line


def level_of(value: float, highest: float) -> int:
    """Of BARS. 0 for nothing, else 1..8: eighths of the highest, begun ones too."""
    return math.ceil(value * 8 / highest) if value else 0
