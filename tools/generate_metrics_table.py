"""Write the table of all metrics in docs/observability.md from cluster/observability/catalog.py.

`--check` fails if the table is not what the catalogue gives.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cluster.observability.catalog import METRICS, Metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "observability.md"
BEGIN, END = "<!-- metrics: tools/generate_metrics_table.py -->", "<!-- end of metrics -->"


def table() -> str:
    """Markdown, a row a metric."""
    rows = ["| name | kind | labels | told by | what |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *map(_row, METRICS)])


def _row(metric: Metric) -> str:
    labels, roles = ", ".join(metric.labels), ", ".join(metric.roles)
    return f"| `{metric.name}` | {metric.kind} | {labels} | {roles} | {metric.help} |"


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, only compare")
    page = PAGE.read_text()
    if not parser.parse_args().check:
        PAGE.write_text(with_table(page))
    elif page != with_table(page):
        print(f"{PAGE.name} is stale: run tools/generate_metrics_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
