"""A running HTTP server as a system to measure. Standard library only."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from serving.plan import Scenario
from serving.summary import RequestRecord

LOAD_SCRIPT = Path(__file__).parents[1] / "http_load.py"


class HttpSystem:
    """`close` ends the server at `url`, which is ready."""

    def __init__(self, url: str, close: Callable[[], None]) -> None:
        self._url = url
        self.close = close

    def run(self, scenario: Scenario, seed: int) -> list[RequestRecord]:
        """Do a whole scenario from another process."""
        job = {"url": self._url, "scenario": asdict(scenario), "seed": seed}
        load = subprocess.run(
            [sys.executable, str(LOAD_SCRIPT)],
            input=json.dumps(job),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        return [RequestRecord(**record) for record in json.loads(load.stdout)]
