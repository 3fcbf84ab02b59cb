"""The systems under test, opened inside the process that measures them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

from serving.drive import OnTokens
from serving.drive import run as drive
from serving.over_http import HttpSystem
from serving.plan import Scenario
from serving.processes import free_port
from serving.session import Spec, System
from serving.sse import wait_until_ok
from serving.summary import RequestRecord

READY_TIMEOUT_S = 900.0
ROUTER_MODES = {"inline": "inline", "ray-inline-router": "inline", "ray-router": "deployment"}


def open_system(spec: Spec) -> System:
    """Start what the spec names and return once it answers requests."""
    if spec.system.startswith("transformers-"):
        from serving.batch import TransformersSystem

        return TransformersSystem(spec)
    if spec.level == "http":
        return _open_http(spec)
    return _open_inline(spec) if spec.system == "inline" else _open_ray(spec)


def _config(spec: Spec) -> Any:
    from cluster.config import merge, parse_config

    own = {
        "model": str(spec.checkpoint),
        "router": {"mode": ROUTER_MODES[spec.system]},
        "listen": {"http_port": free_port(), "grpc_port": free_port()},
    }
    return parse_config(merge(spec.settings, own))


class EngineSystem:
    """Token ids straight to the attention workers, the way an ingress sends them."""

    def __init__(self, pool: Any, close: Callable[[], None]) -> None:
        self._pool = pool
        self._numbers = itertools.count()
        self.close = close

    def run(self, scenario: Scenario, seed: int) -> list[RequestRecord]:
        """Do a whole scenario."""
        return drive(self, scenario, seed)

    def submit(self, prompt_ids: list[int], new_tokens: int, on_tokens: OnTokens) -> None:
        """Start a request and return at once."""
        from attention.messages import SamplingParams, Submit, TokenOutput

        def on_output(output: TokenOutput) -> None:
            on_tokens(len(output.token_ids), output.finish_reason is not None, output.error)

        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        request_id = f"bench-{next(self._numbers)}"
        submit = Submit(request_id=request_id, prompt_ids=prompt_ids, params=params)
        self._pool.submit(submit, on_output)


def _open_inline(spec: Spec) -> System:
    from cluster.inline import InlineCluster

    cluster = InlineCluster(_config(spec))
    cluster.wait_ready(READY_TIMEOUT_S)
    return EngineSystem(cluster.ingress.pool, cluster.close)


def _open_ray(spec: Spec) -> System:
    """A local Ray with the application, and an ingress member more: this process."""
    from cluster.config import SECRET_VARIABLE
    from cluster.ingress import IngressMember
    from cluster.launcher import APP_NAME, LocalCluster
    from cluster.site import Site

    config = _config(spec)
    local = LocalCluster(config, dashboard=False)
    try:
        local.start()
        from ray import serve

        placement = serve.get_deployment_handle("Placement", APP_NAME)
        site = Site(
            config=config,
            secret=bytes.fromhex(os.environ[SECRET_VARIABLE]),
            directory=lambda: placement.endpoint.remote().result(timeout_s=30),
            new_endpoint=lambda worker_id: "",  # an ingress does not listen
        )
        ingress = IngressMember(site, "ingress-bench")
        ingress.wait_ready(READY_TIMEOUT_S)
    except BaseException:
        local.stop()
        raise

    def close() -> None:
        ingress.close()
        local.drain()
        local.stop()

    return EngineSystem(ingress.pool, close)


def _open_http(spec: Spec) -> System:
    from cluster.inline_server import InlineServer
    from cluster.launcher import LocalCluster

    config = _config(spec)
    inline = spec.system == "inline"
    server = InlineServer(config) if inline else LocalCluster(config, dashboard=False)

    def close() -> None:
        server.drain()
        server.stop()

    url = f"http://{config.listen.host}:{config.listen.http_port}"
    try:
        server.start()
        wait_until_ok(url, "/readyz", READY_TIMEOUT_S)
    except BaseException:
        server.stop()
        raise
    return HttpSystem(url, close)
