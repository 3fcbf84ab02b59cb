"""The ingress: the front end of a cluster and what its operators see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response

from attention.memory import context_length
from attention.messages import Stats
from cluster.backend import AttentionPool
from cluster.config import ShoalConfig
from cluster.frontend.api_keys import open_keys
from cluster.frontend.auth import Authorizer
from cluster.frontend.backend import EngineBackend
from cluster.frontend.expert_load import LoadWatch
from cluster.frontend.http_guard import json_response
from cluster.frontend.http_server import build_app
from cluster.frontend.observer import RequestObserver
from cluster.frontend.operations import Operations
from cluster.frontend.request import ModelInfo
from cluster.frontend.service import InferenceService
from cluster.generation_defaults import GenerationDefaults
from cluster.observability.cluster_metrics import ClusterMetrics, sum_of
from cluster.observability.exposition import CONTENT_TYPE
from cluster.observability.rates import Samples
from cluster.observability.request_log import RequestLog
from cluster.observability.request_metrics import RequestMetrics
from cluster.observability.samples import MemberSamples
from cluster.observability.shared import Shared
from cluster.observability.status import (
    count_events,
    count_requests,
    describe_tiers,
    describe_workers,
)
from cluster.observability.text_log import LoggedBackend
from cluster.site import Site
from cluster.tokenizer import Tokenizer
from experts.config import ModelConfig
from experts.directory.client import DirectoryClient
from experts.metrics import Sample


def model_info(config: ShoalConfig) -> ModelInfo:
    """What requests are checked against: the model's files and the engine's cache."""
    model = ModelConfig.load(config.model)
    context = context_length(config.engine, model, on_gpu=config.may_use_gpu("attention"))
    defaults = GenerationDefaults.load(config.model)
    return ModelInfo(
        config.model_name,
        model.vocab_size,
        context,
        temperature=defaults.temperature,
        top_p=defaults.top_p,
    )


class IngressMember:
    """The front end: text in, text out, over the attention workers of the snapshot."""

    def __init__(self, site: Site, worker_id: str) -> None:
        config = site.config
        self._config = config
        self._requests = RequestMetrics(config.model_name)
        self.samples = MemberSamples(self._samples)
        self._tracer = site.open_tracer("ingress", worker_id)
        self.pool = AttentionPool(site.secret)
        self.service = self._open_service()
        self._line = DirectoryClient(
            site.directory,
            site.secret,
            site.register("ingress", worker_id, ""),
            self.pool.on_snapshot,
            metrics_source=site.told(self._told),
        )
        self.loads = LoadWatch(config.model_name, self._line.ask_load, self.pool.snapshot)
        self.metrics = ClusterMetrics(worker_id, self.samples, self._line.ask_metrics)
        self._statuses = Shared(self._status, "status")
        enabled = config.enable_operations
        if enabled is None:
            enabled = self.service.authorizer.needs_keys
        operations = Operations(self._line.command, self.pool.snapshot)
        self._operations = operations if enabled else None
        self._line.start()

    def _open_service(self) -> InferenceService:
        config, view = self._config, self._config.observability
        tokenizer = Tokenizer(config.model)
        backend: EngineBackend = self.pool
        if view.log_prompts:
            backend = LoggedBackend(self.pool, tokenizer)
        observers: list[RequestObserver] = [RequestLog()]
        if view.metrics:
            observers.append(self._requests)
        return InferenceService(
            tokenizer,
            backend,
            model_info(config),
            config.limits,
            strict_params=config.strict_params,
            authorizer=Authorizer(open_keys(config.auth)),
            observers=observers,
            tracer=self._tracer,
        )

    def http_app(self, *, echo_request_id: bool = True) -> FastAPI:
        """The HTTP API, with the state of the cluster at /status and its numbers at /metrics."""
        app = build_app(self.service, self.loads, self._operations, echo_request_id=echo_request_id)

        @app.get("/status")
        async def status() -> Response:
            """Who serves, who holds how much, how busy everybody is."""
            status = asyncio.wrap_future(self._statuses.ask())
            return json_response(await asyncio.shield(status))

        if self._config.observability.metrics:

            @app.get("/metrics")
            async def metrics() -> Response:
                """Numbers of every worker, in Prometheus' text format."""
                # Not in the default executor, in which prompts become tokens.
                loop, thread = asyncio.get_running_loop(), self.metrics.thread
                text = await loop.run_in_executor(thread, self.metrics.text)
                return Response(text, media_type=CONTENT_TYPE)

        return app

    def _told(self) -> Sequence[Sample]:
        self.metrics.tick()  # the line to the directory asks once a second
        return self.samples()

    def _samples(self) -> Iterator[Sample]:
        yield from self._requests.samples()
        yield Sample("shoal_requests_replayed_total", (), self.service.ledger.num_replays)
        yield Sample("shoal_requests_parked", (), self.pool.num_parked)

    def _status(self) -> dict[str, Any]:
        snapshot, state, engines = self.pool.snapshot(), self.service.readiness(), self.pool.stats()
        samples = self.metrics.read()
        return {
            "model": self.service.model.name,
            "ready": state.ready,
            "stage": state.stage,
            "epoch": snapshot.epoch if snapshot else 0,
            "scale": snapshot.scale if snapshot else {},
            "tiers": describe_tiers(samples),
            **self._numbers(samples, engines),
            "chaos": self._config.enable_chaos and self._operations is not None,
            "operations": self._operations is not None,
            "workers": describe_workers(snapshot, samples),
            "engines": [stats.model_dump() for stats in engines],
        }

    def _numbers(self, samples: Samples, engines: Sequence[Stats]) -> dict[str, Any]:
        """Of the whole cluster: every ingress tells the same. None where nobody tells its own."""
        if not self._config.observability.metrics:
            return {"rates": None, "counters": None, "parked": None}
        ever = self.metrics.read_ever()
        return {
            "rates": {**self.metrics.rates.read(), **count_requests(ever, engines)},
            "counters": count_events(ever),
            "parked": int(sum_of(samples, "shoal_requests_parked")),
        }

    def wait_ready(self, timeout_s: float) -> None:
        """Return when requests are served. Raises TimeoutError that says how far things are."""
        self._line.wait_ready(timeout_s)
        self.pool.wait_connected(timeout_s)

    def close(self) -> None:
        self.loads.close()
        self._line.close()
        self._statuses.close()
        self.metrics.close()
        self.pool.close()
        if self._tracer is not None:
            self._tracer.close()
