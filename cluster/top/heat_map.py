"""Rows of layers x experts as text: bars whose height and colour say how hot. Pure.

Hot is relative: times the layer's even share, in which each expert has as many rows as any other.
So the map neither flickers with the traffic nor fades beside one very hot expert. Where the
experts are more than the columns, a column shows the hottest of several: none is lost. Where there
is room, an expert has several columns. Without colours the bars' heights remain.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
SHARES = (0.25, 0.5, 1, 2, 4, 8, 16)
"""Times the even share: where a bar ends and the next begins, from that of level 1 on."""
SHARE_NAMES = ("¼", "½", "1", "2", "4", "8", "16")
NOBODY, NOBODY_STYLE = "!", "bold red"
"""In the place of an expert that nobody holds."""
MAX_CELL_WIDTH = 3
BALANCE_HEAD = " even"
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

    @property
    def width(self) -> int:
        """Columns that are used."""
        return len(self.cells()) * self.cell_width

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
    room = max(width - label_width - len(BALANCE_HEAD), 1)
    grid = Grid.fit(len(load.recent_rows[0]), room)
    axis = " " * label_width + grid.axis().ljust(grid.width) + BALANCE_HEAD
    lines = [_head(load, grid, shown), Text(axis, "dim")]
    for position in shown:
        label, balance = f"{load.layers[position]:{label_width - 1}} ", load.balancedness[position]
        cells = _cells(load.recent_rows[position], load.holders[position], grid)
        lines.append(Text.assemble((label, "dim"), cells, (f" {balance:.2f}", "dim")))
    return lines


def _head(load: Load, grid: Grid, shown: range) -> Text:
    head = Text.assemble(("experts", "bold"), "  times the even share ")
    for bar, colour, share in zip_longest(BARS[1:], COLOURS[1:], SHARE_NAMES, fillvalue=""):
        head.append(bar, colour).append(share)
    if grid.experts_per_cell > 1:
        head.append(f"  hottest of {grid.experts_per_cell}")
    if len(shown) < len(load.layers):
        first, last = load.layers[shown.start], load.layers[shown.stop - 1]
        head.append(f"  layers {first}-{last} of {load.layers[0]}-{load.layers[-1]}")
    return head


def _cells(rows: Sequence[int], holders: Sequence[Sequence[int]], grid: Grid) -> Text:
    line = Text()
    even = sum(rows) / len(rows)
    for expert in grid.cells():
        members = slice(expert, expert + grid.experts_per_cell)
        if all(holders[members]):
            level = level_of(max(rows[members]), even)
            line.append(BARS[level] * grid.cell_width, COLOURS[level])
        else:
            line.append(NOBODY * grid.cell_width, NOBODY_STYLE)
    return line


def level_of(rows: int, even: float) -> int:
    """Of BARS and COLOURS: 0 for no rows, else by SHARES of the rows that are the even share."""
    return bisect_right(SHARES, rows / even) + 1 if rows else 0
