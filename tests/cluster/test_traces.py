"""Traces of two processes, an ingress and an attention worker, as a collector gets them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from attention.client import AttentionClient
from attention.messages import Stats, Submit
from attention.tracing import TracesUnavailable, open_tracer
from cluster.frontend.backend import Readiness
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine, OnOutput
from tests.router.pool import SECRET
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service

ROOT = Path(__file__).resolve().parents[2]
OVER_HTTP, OVER_GRPC, UNSAMPLED = "1" * 32, "2" * 32, "3" * 32
CLOCKS_DIFFER_NS = 50_000_000  # each process has read the clock once
STATE = "a=1,b=2"
PARENT = "b7ad6b7169203331"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 3, "ignore_eos": True}


class Collector:
    """Takes OTLP over HTTP: POST /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []  # (service, span)
        self._lock = threading.Lock()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self._lock:
            for group in request.resource_spans:
                attributes = told(group.resource)
                name = f"{attributes['service.name']} {attributes['service.instance.id']}"
                for scope in group.scope_spans:
                    self.spans += [(name, span) for span in scope.spans]

    def of(self, trace_id: str) -> dict[str, tuple[str, Any]]:
        """(service, span) by name; of several steps the last."""
        found = [(s, span) for s, span in self.spans if span.trace_id.hex() == trace_id]
        return {span.name: (service, span) for service, span in found}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def told(message: Any) -> dict[str, Any]:
    """Attributes of a resource or span."""
    return {
        item.key: getattr(item.value, item.value.WhichOneof("value")) for item in message.attributes
    }


class OneWorker:
    """An EngineBackend over one attention worker."""

    def __init__(self, endpoint: str) -> None:
        self._client = AttentionClient(endpoint, SECRET)

    def submit(self, request: Submit, on_output: OnOutput) -> None:
        self._client.submit(request, on_output)

    replay = submit

    def abort(self, request_id: str) -> None:
        self._client.abort(request_id)

    def stats(self) -> list[Stats]:
        return []

    def ready(self) -> Readiness:
        return Readiness(True, "ready")

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    made = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield made
    made.close()


@contextmanager
def worker(checkpoint: Path, folder: Path) -> Iterator[str]:
    """The endpoint of a worker in another process; at the end its spans have been sent."""
    folder.chmod(0o700)
    endpoint = f"unix:{folder}/worker"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.traced_worker", str(checkpoint), endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:  # which ends when its input does
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield endpoint
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0


def traceparent(trace_id: str, flags: str = "01") -> str:
    return f"00-{trace_id}-{PARENT}-{flags}"


def test_spans_from_the_front_to_the_layers(
    collector: Collector, checkpoint_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    with worker(checkpoint_dir("v2-lite"), tmp_path) as endpoint:
        tracer, backend = open_tracer("ingress", "ingress-1"), OneWorker(endpoint)
        service = make_service(tmp_path, backend, tracer=tracer)  # type: ignore[arg-type]
        with http_server(service) as url:
            for sent in (traceparent(OVER_HTTP), traceparent(UNSAMPLED, "00"), "00-malformed"):
                headers = [("traceparent", sent), ("tracestate", "a=1"), ("tracestate", "b=2")]
                answer = httpx.post(
                    f"{url}/v1/completions", json=BODY, headers=headers, timeout=TIMEOUT_S
                )
                assert answer.status_code == 200
        with grpc_server(service) as address, grpc.insecure_channel(address) as channel:
            sampling = pb.SamplingParams(max_tokens=3, ignore_eos=True)
            asked = pb.GenerateRequest(model="tiny", text="Hi", sampling=sampling)
            stub = inference_pb2_grpc.InferenceStub(channel)
            metadata = [("traceparent", traceparent(OVER_GRPC)), ("tracestate", STATE)]
            list(stub.Generate(asked, metadata=metadata, timeout=TIMEOUT_S))
        backend.close()
        tracer.close()
    for trace_id in (OVER_HTTP, OVER_GRPC):
        spans = collector.of(trace_id)
        check_tree(spans)
        assert {span.trace_state for _, span in spans.values()} == {STATE}
    assert collector.of(UNSAMPLED) == {}
    (fresh,) = {span.trace_id.hex() for _, span in collector.spans if not span.parent_span_id}
    check_tree(collector.of(fresh))
    assert {span.trace_state for _, span in collector.of(fresh).values()} == {""}
    assert len({span.trace_id for _, span in collector.spans}) == 3


def check_tree(spans: dict[str, tuple[str, Any]]) -> None:
    """Parents, services and times of one request's spans."""
    service, root = spans["text_completion tiny"]
    assert service == "shoal-ingress ingress-1"
    attributes = told(root)
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert attributes["shoal.expert_ms"] > 0
    service, sequence = spans["sequence"]
    assert service == "shoal-attention attention-1"
    assert sequence.parent_span_id == root.span_id
    assert told(sequence)["shoal.sequence_id"] == attributes["gen_ai.response.id"] + "-0"
    for name in ("queue", "prefill", "decode"):
        assert spans[name][1].parent_span_id == sequence.span_id
    step = spans["step"][1]
    assert step.parent_span_id == spans["decode"][1].span_id
    assert " compute " in told(step)["shoal.hop.002"]
    assert root.start_time_unix_nano < sequence.start_time_unix_nano + CLOCKS_DIFFER_NS
    assert sequence.end_time_unix_nano < root.end_time_unix_nano + CLOCKS_DIFFER_NS


def test_replays_stay_in_the_trace(tmp_path: Path) -> None:
    """Without a tracer of its own the ingress passes on the client's context."""
    engine = FakeEngine(
        [*ids_of("Hello"), EOS], lose=lambda submit, attempt: 2 if attempt == 1 else None
    )
    with http_server(make_service(tmp_path, engine)) as url:
        headers = {"traceparent": traceparent(OVER_HTTP), "tracestate": STATE}
        httpx.post(f"{url}/v1/completions", json=BODY, headers=headers, timeout=TIMEOUT_S)
        httpx.post(f"{url}/v1/completions", json=BODY, timeout=TIMEOUT_S)
    engine.close()
    submitted = (*engine.submitted, *engine.replayed)
    sent = [(submit.traceparent, submit.tracestate) for submit in submitted]
    assert sent == [(traceparent(OVER_HTTP), STATE), ("", "")] * 2


def test_without_opentelemetry_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(TracesUnavailable, match=r"pip install 'shoal-serve\[otel\]'"):
        open_tracer("ingress", "ingress-1")


def test_the_variables_name_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    tracer = open_tracer("ingress", "ingress-1")
    attributes = tracer._provider.resource.attributes
    tracer.close()
    assert (attributes["service.name"], attributes["service.instance.id"]) == ("mine", "ingress-1")


def test_a_disabled_sdk_costs_no_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    tracer, engine = open_tracer("ingress", "ingress-1"), FakeEngine([*ids_of("Hello"), EOS])
    with http_server(make_service(tmp_path, engine, tracer=tracer)) as url:
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=TIMEOUT_S)
        assert answer.status_code == 200
    engine.close()
    tracer.close()
    assert engine.submitted[0].traceparent == ""
