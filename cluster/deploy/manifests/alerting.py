"""What an alert is: a query, how long it must hold, and what a person should know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cluster.deploy.manifests.promql import Queries

Severity = Literal["critical", "warning"]


@dataclass(frozen=True)
class Scope:
    """Of which deployment."""

    job: str
    head: str
    """Matchers of the scrapes of Ray's head."""

    def over(self, window: str) -> Queries:
        return Queries(f'job="{self.job}"', window)

    @property
    def was_ready(self) -> str:
        """True within an hour of a time when all was there: this is not the first start."""
        return f"{self.over('1h').peak('shoal_placement_ready')} == 1"


@dataclass(frozen=True)
class Alert:
    """A query that gives a series while something is wrong, and a person's first steps."""

    name: str
    query: str
    wait: str
    """So long it must be wrong."""
    severity: Severity
    summary: str
    """One line; may name labels of the series: `{{ $labels.tier }}`."""
    meaning: str
    todo: str

    @property
    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.query,
            "for": self.wait,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "description": f"{self.meaning} To do: {self.todo}",
            },
        }
