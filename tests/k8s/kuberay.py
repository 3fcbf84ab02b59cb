"""A stand-in for the KubeRay operator 1.7 and the kubelet in one namespace: the objects, labels and
status transitions that KubeRay's source describes. It acts on events and never sleeps."""

from __future__ import annotations

import threading
import traceback
from dataclasses import replace
from typing import Any

from tests.k8s.api_server.client import Client, Watch
from tests.k8s.api_server.errors import ApiError
from tests.k8s.kuberay_operator import Operator, ServeBackend
from tests.k8s.kuberay_status import Faults

WATCHED = ("RayService", "RayCluster", "Pod")
CRASH_S = 0.1
"""So long a faulty pod runs before it fails again."""
POLL_S = 1.0
"""How often a real Ray is asked while its applications are not running."""


class KubeRay:
    """The operator, from `start` to `close`."""

    def __init__(
        self,
        client: Client,
        namespace: str,
        faults: Faults | None = None,
        serve: ServeBackend | None = None,
    ) -> None:
        self.errors: list[str] = []
        """Tracebacks of what the operator itself did wrong."""
        self._client = client
        self._namespace = namespace
        self._operator = Operator(client, namespace, serve)
        self._faults = faults or Faults()
        self._changed = threading.Event()
        self._is_closed = threading.Event()
        self._watches: dict[str, Watch] = {}
        self._threads = [threading.Thread(target=self._run)]
        self._threads += [threading.Thread(target=self._follow, args=(kind,)) for kind in WATCHED]

    def start(self) -> KubeRay:
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        self._is_closed.set()
        self._changed.set()
        for watch in list(self._watches.values()):
            watch.cut()
        for thread in self._threads:
            thread.join()

    def set_faults(self, **changes: Any) -> None:
        """Change fields of `Faults` and act on it: `set_faults(application="RUNNING")`."""
        self._faults = replace(self._faults, **changes)
        self._changed.set()

    def _run(self) -> None:
        while True:
            self._changed.clear()
            if self._is_closed.is_set():  # `close` sets it before it wakes this thread
                return
            is_settled = True
            try:
                is_settled = self._operator.reconcile(self._faults)
            except ApiError as error:
                if error.code not in (404, 409):  # changed meanwhile: its event will come
                    self.errors.append(traceback.format_exc())
            except Exception:
                self.errors.append(traceback.format_exc())
            self._changed.wait(None if is_settled else POLL_S)
            if self._faults.pods:
                self._is_closed.wait(CRASH_S)

    def _follow(self, kind: str) -> None:
        """Wake `_run` at each event of `kind`."""
        while not self._is_closed.is_set():
            listing = self._client.listing(kind, self._namespace)
            since = listing["metadata"]["resourceVersion"]
            watch = self._watches[kind] = self._client.watch(kind, self._namespace, since)
            self._changed.set()
            if self._is_closed.is_set():
                watch.cut()
            try:
                for _ in watch:
                    self._changed.set()
            except ApiError as error:
                if error.code != 410:
                    raise
