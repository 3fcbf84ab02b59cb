"""Watch a deployment until it serves: reads the objects anew whenever the RayService changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

from cluster.config import ConfigError
from cluster.deploy.api import Cluster, Ref
from cluster.deploy.api_errors import Forbidden, Gone, Unreachable
from cluster.deploy.history import History
from cluster.deploy.manifest import Manifest
from cluster.deploy.pod_causes import has_failed
from cluster.deploy.verdict import Observed, Verdict, verdict

PERIOD_S = 5.0
"""Pods change without the RayService: they are read at least so often."""
OUTAGE_S = 60.0
"""An API server may be away so long, for instance while it is being upgraded."""
RETRY_S = 1.0
RAY_PODS = "ray.io/is-ray-node=yes"
ORIGIN_LABEL = "ray.io/originated-from-cr-name"
"""Label of a RayCluster with the name of its RayService."""


class Deployment:
    """Objects of one RayService."""

    def __init__(self, cluster: Cluster, namespace: str, name: str) -> None:
        self._cluster = cluster
        self.namespace = namespace
        self.ref = Ref("ray.io/v1", "RayService", name, namespace)

    def observe(self) -> Observed | None:
        """Everything that tells how the deployment does; None if it is absent."""
        service = self._cluster.get(self.ref)
        if service is None:
            return None
        hidden: list[str] = []
        clusters = self._read("ray.io/v1", "RayCluster", hidden, f"{ORIGIN_LABEL}={self.ref.name}")
        names = {each["metadata"]["name"] for each in clusters}
        pods, version = self._read_pods(hidden)
        return Observed(
            service,
            sorted(clusters, key=lambda each: str(each["metadata"].get("creationTimestamp"))),
            [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/cluster") in names],
            self._read("v1", "Event", hidden, fields="type=Warning"),
            tuple(hidden),
            version,
        )

    def failed_since(self, before: Observed, now: Observed) -> list[Manifest]:
        """Pods that have failed and are gone already, as the server remembers them."""
        gone = _uids(before) - _uids(now)
        failed: list[Manifest] = []
        if not gone:
            return failed
        version = before.pods_version
        events = self._cluster.events("v1", "Pod", self.namespace, version, RAY_PODS, RETRY_S)
        with closing(events):
            try:
                for what, pod in events:
                    failed += [pod] if has_failed(pod) else []
                    gone -= {pod["metadata"]["uid"]} if what == "DELETED" else set()
                    if not gone:
                        break
            except (Gone, Forbidden):  # too long ago, or not for us: they count as well
                pass
        return failed

    def await_change(self, seen: Observed, timeout_s: float) -> bool:
        """True as soon as the RayService is no longer as seen, False when the time is up."""
        version = seen.service["metadata"]["resourceVersion"]
        with closing(self._cluster.watch(self.ref, timeout_s)) as states:
            try:
                return any(each["metadata"]["resourceVersion"] != version for each in states)
            except Gone:  # the server has forgotten where this watch was: read everything anew
                return False

    def _read_pods(self, hidden: list[str]) -> tuple[list[Manifest], str]:
        try:
            return self._cluster.listing("v1", "Pod", self.namespace, RAY_PODS)
        except Forbidden:
            hidden.append("Pods")
            return [], ""

    def _read(
        self, api_version: str, kind: str, hidden: list[str], labels: str = "", fields: str = ""
    ) -> list[Manifest]:
        try:
            return self._cluster.select(api_version, kind, self.namespace, labels, fields)
        except Forbidden:
            hidden.append(f"{kind}s")
            return []


class Follower:
    """Verdicts on a deployment, one after the other. The clocks are for tests."""

    def __init__(
        self,
        deployment: Deployment,
        *,
        is_change: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`is_change`: the application's settings have just been changed."""
        self._deployment = deployment
        self._clock = clock
        self._sleep = sleep
        self._history = History(is_change)
        self._last: Observed | None = None

    def look(self) -> Verdict:
        """The verdict now. Raises ConfigError if there is no such deployment."""
        return verdict(self._observed())

    def verdicts(self, timeout_s: float = float("inf")) -> Iterator[Verdict]:
        """The verdict now and again after each change, until the time is up. An API server that
        is away for less than OUTAGE_S is waited for. Raises as `look`, Unreachable."""
        deadline = self._clock() + timeout_s
        last_contact = self._clock()
        while True:
            try:
                seen = self._observed()
                last_contact = self._clock()
                yield verdict(seen)
                if last_contact >= deadline:
                    return
                changed = self._deployment.await_change(
                    seen, min(PERIOD_S, deadline - last_contact)
                )
                if not changed and self._clock() - last_contact < RETRY_S:
                    self._sleep(RETRY_S)  # watches that end at once must not make a busy loop
            except Unreachable:
                if self._clock() - last_contact > OUTAGE_S:
                    raise
                self._sleep(RETRY_S)

    def wait_ready(self, timeout_s: float, show: Callable[[Verdict], None]) -> Verdict:
        """The first verdict that says ready or failed, or the last one when the time is up."""
        for judged in self.verdicts(timeout_s):
            show(judged)
            if judged.state != "waiting":
                break
        return judged

    def _observed(self) -> Observed:
        """What is there, with what is remembered."""
        seen = self._deployment.observe()
        if seen is None:
            ref = self._deployment.ref
            raise ConfigError(
                f"{ref} does not exist in namespace {ref.namespace}: `shoal k8s apply` makes it"
            )
        now_s = self._clock()
        ended = self._deployment.failed_since(self._last, seen) if self._last else []
        self._last = seen
        self._history.note_pods([*ended, *seen.pods], now_s)
        return replace(
            seen,
            failed=self._history.failed(),
            pulling_s=self._history.pulling_s(now_s),
            is_settled=self._history.is_settled(seen, now_s),
        )


def _uids(seen: Observed) -> set[str]:
    return {pod["metadata"]["uid"] for pod in seen.pods}
