"""How many replicas Serve's autoscaler wants, for those who watch.

A replica of Ray Serve 2.60 has no public way to learn it. `ask_serve` is the only place that asks
Serve's controller; tests/cluster/test_scaling.py holds the contract.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from experts.messages import Role

logger = logging.getLogger(__name__)

ASK_EVERY_S = 2.0
ASK_TIMEOUT_S = 10.0
"""A controller that was restarted needs some seconds."""
Targets = Mapping[Role, int]


class TargetWatch:
    """A thread that asks, and tells every answer that differs from the one before, until `close`.

    Without an answer what was told last stays: Serve holds its targets too."""

    def __init__(
        self,
        ask: Callable[[], Targets],
        tell: Callable[[Targets], None],
        every_s: float = ASK_EVERY_S,
    ) -> None:
        self._ask = ask
        self._tell = tell
        self._every_s = every_s
        self._told: Targets = {}
        self._failure = ""
        self._closing = threading.Event()
        threading.Thread(target=self._run, name="serve-targets", daemon=True).start()

    def close(self) -> None:
        """End the thread after the question that is under way; returns at once."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
                self._failure = ""
            except Exception as error:  # Ray's are of many kinds; none may end the thread
                self._note(f"{type(error).__name__}: {error}")
            self._closing.wait(self._every_s)

    def _look(self) -> None:
        targets = self._ask()
        if targets != self._told:
            self._tell(targets)
            self._told = targets

    def _note(self, failure: str) -> None:
        """Log it, once while it repeats."""
        if failure != self._failure:
            logger.warning("Serve's targets are not known: %s", failure)
        self._failure = failure


def ask_serve(application: str, deployments: Mapping[Role, str]) -> Targets:
    """Replicas wanted of deployments, by their tier. Raises what Ray raises."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    asked = [
        controller.get_deployment_details.remote(application, deployment)
        for deployment in deployments.values()
    ]
    details = ray.get(asked, timeout=ASK_TIMEOUT_S)
    targets = (each.target_num_replicas for each in details)
    return dict(zip(deployments, targets, strict=True))
