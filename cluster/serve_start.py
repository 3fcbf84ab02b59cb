"""Put an application on Serve and wait until it runs, or until it is known that it never will.

Serve starts a replica whose constructor raised again, three times, which takes a minute for what
the first time said in a line: no such device, a cache that does not fit. And it then tells which
deployment failed, not why.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from typing import Any

from cluster.config import StartFailed

POLL_S = 0.5
"""A look costs 50 ms of a core in this process and the controller, which the workers want."""
LASTING = ("DeviceError", "ConfigError", "CheckpointError", "ValueError", "TracesUnavailable")
"""Errors of a constructor that another attempt does not mend."""


def run_application(app: Any, name: str, logging_config: Any) -> None:
    """Returns once every deployment's replicas run. Raises StartFailed with the cause."""
    from ray import serve

    warnings.filterwarnings("ignore", "The `metrics_interval_s`", DeprecationWarning)  # see app.py
    target = serve.RunTarget(app, name=name, logging_config=logging_config)
    serve.run_many([target], wait_for_applications_running=False)
    while True:
        status = serve.status().applications[name]
        if status.status == "RUNNING":
            return
        messages = [deployment.message for deployment in status.deployments.values()]
        cause = start_failure(str(status.status), status.message, messages)
        if cause is not None:
            raise StartFailed(cause)
        time.sleep(POLL_S)


def start_failure(status: str, message: str, deployments: Iterable[str]) -> str | None:
    """Why an application will not run, in a line; None while it may. Pure.

    status, message: of the application. deployments: their messages, which end with the traceback
    of a replica that could not be made.
    """
    causes = [_last_line(each) for each in deployments if "Error:\n" in each]
    for cause in causes:
        error, _, text = cause.partition(": ")
        if error.rpartition(".")[2] in LASTING:
            return text
    if status == "DEPLOY_FAILED":
        return causes[0] if causes else _last_line(message)
    return None


def _last_line(text: str) -> str:
    """The last line, of a traceback what was raised, without colours."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).strip().splitlines()
    return lines[-1].strip() if lines else "no reason is known"
