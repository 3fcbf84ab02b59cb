"""Boards as Grafana reads them: typed panels -> JSON of a dashboard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

SCHEMA_VERSION = 39
"""Of the JSON; Grafana 10 and newer read it."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS, ROW_HEIGHT = 24, 1
Unit = Literal["s", "short", "percentunit", "reqps", "ops", "Bps", "bool_yes_no"]
"""Grafana's names."""
Kind = Literal["stat", "table", "timeseries"]
SIZES: dict[Kind, tuple[int, int]] = {"stat": (4, 4), "table": (8, 8), "timeseries": (8, 8)}
"""Width and height of a panel in Grafana's grid."""


@dataclass(frozen=True)
class Line:
    """A query, and what its series are called: `{{label}}` is the value of a label."""

    query: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A diagram, one number, or a table: a row for each series, a column for each line."""

    title: str
    unit: Unit
    lines: tuple[Line, ...]
    description: str
    kind: Kind = "timeseries"


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice above the board: values of a label; at first all."""

    name: str
    query: str


@dataclass(frozen=True)
class Board:
    """A dashboard; `uid` is also its file's name and its part of links."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]

    @property
    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def dump(board: Board, tag: str) -> str:
    """The text of its file. Boards of one `tag` link to each other."""
    return json.dumps(_dashboard(board, tag), indent=1, ensure_ascii=False) + "\n"


def _dashboard(board: Board, tag: str) -> dict[str, Any]:
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.description,
        "tags": [tag],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # the cross-hair is in all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "links": [_link(tag)],
        "templating": {"list": [_datasource(), *map(_variable, board.variables)]},
        "panels": list(_panels(board.rows)),
    }


def _link(tag: str) -> dict[str, Any]:
    """To the other boards, which keep the choice of variables and time."""
    link = {"type": "dashboards", "tags": [tag], "title": "Boards", "asDropdown": False}
    return link | {"includeVars": True, "keepTime": True}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource"} | {
        "query": "prometheus",
        "refresh": 1,
    }


def _variable(variable: Variable) -> dict[str, Any]:
    return {
        "name": variable.name,
        "label": variable.name,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": variable.query, "refId": variable.name},
        "refresh": 2,  # with the time range: workers come and go
        "includeAll": True,
        "allValue": ".*",  # also series without the label
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
        "sort": 1,
    }


def _panels(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """From left to right, from top to bottom; ids count from 1."""
    number, y = 1, 0
    for row in rows:
        place = {"x": 0, "y": y, "w": COLUMNS, "h": ROW_HEIGHT}
        yield {"id": number, "type": "row", "title": row.title, "gridPos": place, "panels": []}
        number, y, x, lowest = number + 1, y + ROW_HEIGHT, 0, 0
        for panel in row.panels:
            width, height = SIZES[panel.kind]
            if x + width > COLUMNS:
                x, y, lowest = 0, y + lowest, 0
            place = {"x": x, "y": y, "w": width, "h": height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            number, x, lowest = number + 1, x + width, max(lowest, height)
        y += lowest


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": [_target(i, line, panel.kind) for i, line in enumerate(panel.lines)],
        **_LOOKS[panel.kind],
        **(_columns(panel.lines) if panel.kind == "table" else {}),
    }


_LOOKS: dict[Kind, dict[str, Any]] = {
    "stat": {"options": {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area"}},
    "table": {},
    "timeseries": {"options": {"tooltip": {"mode": "multi", "sort": "desc"}}},
}


def _columns(lines: Sequence[Line]) -> dict[str, Any]:
    """Joins the queries' answers by their labels; each value is named as its line."""
    names = {f"Value #{_letter(i)}": line.legend for i, line in enumerate(lines)}
    organize = {"excludeByName": {"Time": True}, "renameByName": names}
    return {
        "transformations": [
            {"id": "merge", "options": {}},
            {"id": "organize", "options": organize},
        ]
    }


def _target(position: int, line: Line, kind: Kind) -> dict[str, Any]:
    target = {
        "refId": _letter(position),
        "datasource": SOURCE,
        "expr": line.query,
        "legendFormat": line.legend,
    }
    return target | ({"format": "table", "instant": True} if kind == "table" else {})


def _letter(position: int) -> str:
    return chr(ord("A") + position)
