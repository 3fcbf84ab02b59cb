"""The gRPC front: same answers as HTTP, statuses with details, cancellation, health."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.frontend.backend import Readiness
from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import CONTEXT, EOS, grpc_server, ids_of, make_service

HELLO = [*ids_of("Hello 漢字!"), EOS]


class Served:
    """A running server, its engine and a client."""

    def __init__(
        self, engine: FakeEngine, service: InferenceService, address: str, channel: grpc.Channel
    ) -> None:
        self.engine = engine
        self.service = service
        self.address = address
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Any]:
    """`serve(engine, limits)`: a Served that is taken down after the test."""
    with ExitStack() as stack:

        def start(
            engine: FakeEngine | None = None, limits: Limits | None = None, **options: Any
        ) -> Served:
            engine = engine or FakeEngine(HELLO)
            stack.callback(engine.close)
            service = make_service(tmp_path, engine, limits, system_fingerprint="fp_1", **options)
            address = stack.enter_context(grpc_server(service))
            channel = stack.enter_context(grpc.insecure_channel(address))
            return Served(engine, service, address, channel)

        yield start


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """google.rpc details of a failed call by message name."""
    status = status_pb2.Status()
    status.ParseFromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    assert (status.code, status.message) == (error.code().value[0], error.details())
    found = {}
    for packed in status.details:
        name = packed.TypeName().rpartition(".")[2]
        detail = getattr(error_details_pb2, name)()
        packed.Unpack(detail)
        found[name] = detail
    return found


def question(text: str = "Hi", **fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=text)], **fields)


def test_chat_streams_deltas_then_usage(serve: Any) -> None:
    call = serve(FakeEngine(HELLO, cached=2)).stub.Chat(question(), timeout=TIMEOUT_S)
    *deltas, last = list(call)
    assert "".join(event.delta.text for event in deltas) == "Hello 漢字!"
    assert [i for event in deltas for i in event.delta.token_ids] == HELLO
    assert [event.delta.finish_reason for event in deltas][-2:] == ["", "stop"]
    assert last.usage == pb.Usage(prompt_tokens=5, completion_tokens=14, cached_tokens=2)
    assert {(e.id, e.model, e.system_fingerprint) for e in [*deltas, last]} == {
        (last.id, "tiny", "fp_1")
    }
    assert call.code() is grpc.StatusCode.OK


def test_generate_takes_text_or_ids_and_all_parameters(serve: Any) -> None:
    served = serve()
    sampling = pb.SamplingParams(
        max_tokens=3,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        seed=-4,
        stop_token_ids=[9],
        allowed_token_ids=[8, 9],
        logit_bias={7: -2.5},
        logprobs=1,
        ignore_eos=True,
        min_tokens=2,
    )
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[20, 21]), sampling=sampling)
    events = list(served.stub.Generate(request, timeout=TIMEOUT_S))
    submitted = served.engine.submitted[0]
    assert submitted.prompt_ids == [20, 21]
    params = submitted.params.model_dump(exclude={"prompt_logprobs"})
    assert params == {
        "max_tokens": 3,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "logit_bias": {7: -2.5},
        "seed": -4,
        "logprobs": 1,
        "stop_token_ids": (9,),
        "allowed_token_ids": (8, 9),
        "ignore_eos": True,
    }
    first = events[0].delta.logprobs[0]
    assert (first.token.text, first.token.shown, first.token.logprob) == ("H", b"H", -0.89)
    assert [likely.text for likely in first.top] == ["H"]
    assert events[-2].delta.finish_reason == "length"


def test_stop_string_is_named(serve: Any) -> None:
    request = question(sampling=pb.SamplingParams(stop=["lo"]))
    *deltas, _ = list(serve().stub.Chat(request, timeout=TIMEOUT_S))
    assert "".join(event.delta.text for event in deltas) == "Hel"
    assert deltas[-1].delta.stop_string == "lo"


def test_bad_field_ends_the_stream_with_error_status_and_details(serve: Any) -> None:
    call = serve().stub.Chat(question(sampling=pb.SamplingParams(temperature=9)), timeout=TIMEOUT_S)
    event = next(call)
    assert (event.error.param, event.error.code) == ("temperature", "decimal_above_max_value")
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = details_of(caught.value)
    assert details["ErrorInfo"].reason == "DECIMAL_ABOVE_MAX_VALUE"
    assert details["ErrorInfo"].domain == "shoal"
    assert details["BadRequest"].field_violations[0].field == "sampling.temperature"


def test_overload_says_when_to_retry(serve: Any) -> None:
    served = serve(FakeEngine(HELLO, hold_after=1), Limits(max_open_sequences=1))
    first = served.stub.Chat(question(), timeout=TIMEOUT_S)
    next(first)
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.Chat(question(), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds >= 1
    first.cancel()


def test_unknown_model_is_not_found_with_its_resource(serve: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(serve().stub.Chat(question(model="tinny"), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "Did you mean 'tiny'?" in caught.value.details()
    assert details_of(caught.value)["ResourceInfo"].resource_type == "model"


def test_cancel_aborts_at_the_engine(serve: Any) -> None:
    served = serve(FakeEngine(HELLO, hold_after=2))
    call = served.stub.Chat(question(), timeout=TIMEOUT_S)
    next(call)
    call.cancel()
    assert served.engine.wait_for(
        lambda: served.engine.aborted == [served.engine.submitted[0].request_id]
    )


def test_deadline_of_the_client_aborts_at_the_engine(serve: Any) -> None:
    served = serve(FakeEngine(HELLO, hold_after=2))
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.Chat(question(), timeout=2.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert served.engine.wait_for(lambda: len(served.engine.aborted) == 1)


def test_deadline_in_the_message(serve: Any) -> None:
    served = serve(FakeEngine(HELLO, hold_after=0), clock=lambda: 0.0)  # so it comes in in time
    with pytest.raises(grpc.RpcError) as caught:
        list(served.stub.Chat(question(timeout=0.05), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details_of(caught.value)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
    assert served.engine.wait_for(lambda: len(served.engine.aborted) == 1)


def test_engine_error_after_tokens(serve: Any) -> None:
    call = serve(FakeEngine(HELLO, finish="error", error="worker lost")).stub.Chat(
        question(), timeout=TIMEOUT_S
    )
    events = []
    with pytest.raises(grpc.RpcError) as caught:
        for event in call:
            events.append(event)
    assert events[0].delta.text == "H"
    assert events[-1].error.code == "engine_error"
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "worker lost" in caught.value.details()


def test_experts_that_stay_away_are_unavailable(serve: Any) -> None:
    engine = FakeEngine(HELLO, finish="unavailable", error="layer 3 has no expert 7")
    with pytest.raises(grpc.RpcError) as caught:
        list(serve(engine).stub.Chat(question(), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value)["ErrorInfo"].reason == "EXPERTS_UNAVAILABLE"
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds == 5


def test_left_out_experts_stand_where_it_happened_and_in_the_end(serve: Any) -> None:
    served = serve(FakeEngine(HELLO, renormalised={2}))
    events = list(served.stub.Chat(question(), timeout=TIMEOUT_S))
    assert [i for i, event in enumerate(events) if event.renormalised] == [2, len(events) - 1]


def test_idempotency_key(serve: Any) -> None:
    served = serve()
    chat, metadata = served.stub.Chat, [("idempotency-key", "k")]
    for _ in range(2):
        list(chat(question(), timeout=TIMEOUT_S, metadata=metadata))
    first, again = served.engine.submitted
    assert first.params.seed == again.params.seed is not None
    with pytest.raises(grpc.RpcError) as caught:
        list(chat(question("Ho"), timeout=TIMEOUT_S, metadata=metadata))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert details_of(caught.value)["ErrorInfo"].reason == "IDEMPOTENCY_KEY_REUSED"
    with pytest.raises(grpc.RpcError) as caught:
        list(chat(question(), timeout=TIMEOUT_S, metadata=[("idempotency-key", "k" * 256)]))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(served.engine.submitted) == 2


def test_request_id_is_echoed_clean_or_made(serve: Any) -> None:
    served = serve()
    call = served.stub.Chat(question(), timeout=TIMEOUT_S, metadata=[("x-request-id", "abc-1 <b>")])
    list(call)
    assert dict(call.trailing_metadata())["x-request-id"] == "abc-1b"
    call = served.stub.Chat(question(), timeout=TIMEOUT_S)
    list(call)
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


def test_tokenize_and_detokenize(serve: Any) -> None:
    stub = serve().stub
    reply = stub.Tokenize(pb.TokenizeRequest(text="h<｜User｜>"), timeout=TIMEOUT_S)
    assert list(reply.token_ids) == ids_of("h<｜User｜>")
    assert reply.max_model_len == CONTEXT
    chat = pb.TokenizeRequest(messages=question().messages, add_generation_prompt=False)
    assert list(stub.Tokenize(chat, timeout=TIMEOUT_S).token_ids) == [0, 3, *ids_of("Hi")]
    text = stub.Detokenize(pb.DetokenizeRequest(token_ids=HELLO), timeout=TIMEOUT_S).text
    assert text == "Hello 漢字!<｜end▁of▁sentence｜>"


def test_unary_error(serve: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        serve().stub.Detokenize(pb.DetokenizeRequest(token_ids=[10**9]), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details_of(caught.value)["BadRequest"].field_violations[0].field == "tokens[0]"


def test_unforeseen_fault_is_internal_and_silent_about_itself(serve: Any) -> None:
    engine = FakeEngine(HELLO)
    engine.submit = None  # type: ignore[assignment, method-assign]
    with pytest.raises(grpc.RpcError) as caught:
        list(serve(engine).stub.Chat(question(), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "NoneType" not in caught.value.details()


def test_health_check_list_and_watch(serve: Any) -> None:
    served = serve()
    states = health_pb2.HealthCheckResponse

    def check(name: str) -> Any:
        request = health_pb2.HealthCheckRequest(service=name)
        return served.health.Check(request, timeout=TIMEOUT_S).status

    assert check("") == check("shoal.v1.Inference") == states.SERVING
    watch = served.health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == states.SERVING
    served.engine.readiness = Readiness(False, "loading weights", 1, 2)
    assert check("") == states.NOT_SERVING
    assert next(watch).status == states.NOT_SERVING
    watch.cancel()
    listed = served.health.List(health_pb2.HealthListRequest(), timeout=TIMEOUT_S).statuses
    assert {name: state.status for name, state in listed.items()} == {
        "": states.NOT_SERVING,
        "shoal.v1.Inference": states.NOT_SERVING,
    }
    with pytest.raises(grpc.RpcError) as caught:
        check("nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    unknown = health_pb2.HealthCheckRequest(service="nobody")
    watch = served.health.Watch(unknown, timeout=TIMEOUT_S)
    assert next(watch).status == states.SERVICE_UNKNOWN
    watch.cancel()


def test_a_watch_of_health_ends_by_itself(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ingress can stop although it is watched."""
    monkeypatch.setattr("cluster.frontend.grpc_server.HEALTH_WATCH_S", 0.01)
    monkeypatch.setattr("cluster.frontend.grpc_server.HEALTH_POLL_S", 0.01)
    watch = serve().health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert [told.status for told in watch] == [health_pb2.HealthCheckResponse.SERVING]
    assert watch.code() is grpc.StatusCode.OK


def test_a_draining_server_is_not_serving(serve: Any) -> None:
    served, states = serve(), health_pb2.HealthCheckResponse
    watch = served.health.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert next(watch).status == states.SERVING
    asyncio.run(served.service.drain())
    assert [told.status for told in watch] == [states.NOT_SERVING]
    assert watch.code() is grpc.StatusCode.OK
    checked = served.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert checked.status == states.NOT_SERVING


def test_not_ready_is_unavailable(serve: Any) -> None:
    engine = FakeEngine(HELLO)
    engine.readiness = Readiness(False, "loading weights")
    with pytest.raises(grpc.RpcError) as caught:
        list(serve(engine).stub.Chat(question(), timeout=TIMEOUT_S))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert details_of(caught.value)["ErrorInfo"].reason == "MODEL_LOADING"
    assert details_of(caught.value)["RetryInfo"].retry_delay.seconds == 5


def test_bytes_that_are_no_message_are_grpcs_own_error(serve: Any) -> None:
    """The library answers before any of our code runs: grpc.aio says UNKNOWN, without details."""
    with grpc.insecure_channel(serve().address) as channel:
        call = channel.unary_stream("/shoal.v1.Inference/Chat")(b"\xff\xff", timeout=TIMEOUT_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.UNKNOWN


def test_generated_files_are_those_of_the_proto() -> None:
    script = Path(__file__).parents[2] / "tools" / "generate_protos.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_unknown_method(serve: Any) -> None:
    with grpc.insecure_channel(serve().address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/shoal.v1.Inference/Nope")(b"", timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
