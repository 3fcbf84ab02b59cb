"""Who may do what, on HTTP and gRPC: every route with every kind of key, and ways around it.

Rows are those of the project's list of bad inputs.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from fastapi import FastAPI
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.routing import Route
from typer.testing import CliRunner

from cluster.cli import app as shoal_app
from cluster.config import API_KEY_VARIABLE, parse_config
from cluster.frontend.api_keys import KeyRing
from cluster.frontend.auth import HTTP_ACCESS, Authorizer
from cluster.frontend.expert_load import LoadWatch
from cluster.frontend.operations import Operations
from cluster.inline import InlineCluster
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from experts.messages import ClusterLoadReply, Command, Snapshot
from tests.cluster.test_grpc import details_of
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service

KEYS = {scope: f"the-key-for-{scope}" for scope in ("inference", "metrics", "admin")}
"""By scope."""
WRONG = "a-key-that-is-not-there"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
SNAPSHOT = Snapshot(version=1, epoch=1, ready=True, stage="ready")


def write_keys(path: Path) -> Path:
    path.write_text("".join(f"the-{scope} {scope} {key}\n" for scope, key in KEYS.items()))
    return path


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


class World:
    """Both fronts over services that need the same keys."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.commands: list[Command] = []
        self.path = write_keys(folder / "keys")
        authorizer = Authorizer(KeyRing(self.path))
        self.engine = FakeEngine([*ids_of("ok"), EOS])
        stack.callback(self.engine.close)
        service = make_service(folder / "model", self.engine, authorizer=authorizer)
        loads = LoadWatch("tiny", self._load, lambda: SNAPSHOT)
        operations = Operations(self._command, lambda: SNAPSHOT)
        status: dict[str, Any] = {"workers": []}
        self.url = stack.enter_context(http_server(service, loads, operations, status))
        address = stack.enter_context(grpc_server(service, loads))
        channel = stack.enter_context(grpc.insecure_channel(address))
        self.stub = inference_pb2_grpc.InferenceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def _load(self) -> ClusterLoadReply:
        return ClusterLoadReply(
            epoch=1,
            window_s=60.0,
            recent_s=5.0,
            layers=(),
            rows=(),
            recent_rows=(),
            workers=(),
        )

    def _command(self, command: Command) -> str:
        self.commands.append(command)
        return "done"

    def raw(
        self, target: str, key: str | None = None, host: str = "localhost"
    ) -> tuple[int, str | None]:
        """Status and error code of a GET exactly as written."""
        netloc = self.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(netloc, timeout=TIMEOUT_S)) as connection:
            connection.putrequest("GET", target, skip_host=True)
            connection.putheader("Host", host)
            for name, value in bearer(key).items():
                connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            body = json.loads(response.read())
        return response.status, body.get("error", {}).get("code")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path_factory.mktemp("world"), stack)


@pytest.fixture(autouse=True)
def nothing_before(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    world.commands.clear()
    world.engine.submitted.clear()


# ---- every route


@pytest.fixture(scope="module")
def ingress_app(
    checkpoint_dir: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FastAPI]:
    """The application as deployed, with whatever routes it has."""
    path = write_keys(tmp_path_factory.mktemp("keys") / "keys")
    settings = {"model": str(checkpoint_dir("v3")), "auth": {"keys_file": str(path)}}
    with InlineCluster(parse_config(settings)) as cluster:
        yield cluster.ingress.http_app()


def status_of(app: FastAPI, method: str, path: str, key: str | None) -> int:
    """Status of the answer; its body is not waited for, it may have no end."""
    headers = [(name.lower().encode(), value.encode()) for name, value in bearer(key).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }

    async def run() -> int:
        status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def receive() -> dict[str, Any]:
            if status.done():
                await asyncio.Event().wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                status.set_result(message["status"])

        task = asyncio.create_task(app(scope, receive, send))
        await asyncio.wait({task, status}, timeout=TIMEOUT_S, return_when="FIRST_COMPLETED")
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return status.result()

    return asyncio.run(run())


def test_every_route_with_every_kind_of_key(ingress_app: FastAPI) -> None:
    seen = set()
    for route in ingress_app.routes:
        assert isinstance(route, Route), f"{route} is not HTTP: the guard does not look at it"
        assert route.path in HTTP_ACCESS, f"{route.path}: say in HTTP_ACCESS what it needs"
        access = HTTP_ACCESS[route.path]
        seen.add(route.path)
        path = route.path.replace("{name:path}", "some/model")
        for method in sorted(route.methods or ()):
            statuses = {
                name: status_of(ingress_app, method, path, key)
                for name, key in {"none": None, "wrong": WRONG, **KEYS}.items()
            }
            refused = {name: status for name, status in statuses.items() if status in (401, 403)}
            assert refused == REFUSED[access], (method, path)
    assert seen == set(HTTP_ACCESS)


REFUSED: dict[str, dict[str, int]] = {
    "open": {},
    "inference": {"none": 401, "wrong": 401, "metrics": 403},
    "metrics": {"none": 401, "wrong": 401, "inference": 403},
    "admin": {"none": 401, "wrong": 401, "inference": 403, "metrics": 403},
}


def test_only_health_and_the_pages_are_open() -> None:
    opened = {path for path, access in HTTP_ACCESS.items() if access == "open"}
    pages = {"/", "/experts", "/assets/{name:path}"}
    assert opened == {"/livez", "/readyz", "/health"} | pages


def test_a_route_that_nobody_declared_does_not_exist(ingress_app: FastAPI) -> None:
    @ingress_app.get("/undeclared")
    async def undeclared() -> str:
        return "secret"

    statuses = [status_of(ingress_app, "GET", "/undeclared", key) for key in (None, KEYS["admin"])]
    ingress_app.routes.pop()
    assert statuses == [401, 404]


def test_every_grpc_method_with_every_kind_of_key(world: World) -> None:
    requests = {
        "Generate": pb.GenerateRequest(text="Hi"),
        "Chat": pb.ChatRequest(messages=[pb.ChatMessage(role="user", content="Hi")]),
        "Tokenize": pb.TokenizeRequest(text="Hi"),
        "Detokenize": pb.DetokenizeRequest(token_ids=[20]),
        "WatchLoad": pb.WatchLoadRequest(),
    }
    methods = pb.DESCRIPTOR.services_by_name["Inference"].methods
    assert {method.name for method in methods} == requests.keys()
    for name, request in requests.items():
        codes = {}
        for who, key in {"none": None, "wrong": WRONG, **KEYS}.items():
            metadata = [("authorization", f"Bearer {key}")] if key else []
            codes[who] = grpc_code(getattr(world.stub, name), request, metadata)
        assert codes == {
            "none": "UNAUTHENTICATED",
            "wrong": "UNAUTHENTICATED",
            "inference": "OK",
            "metrics": "PERMISSION_DENIED",
            "admin": "OK",
        }, name


def grpc_code(method: Any, request: Any, metadata: list[tuple[str, str]]) -> str:
    """Name of the status; a stream is cancelled after its first message, unless that ends it."""
    try:
        call = method(request, metadata=metadata, timeout=TIMEOUT_S)
        if isinstance(call, grpc.Call):
            first = next(call)
            if first.HasField("error"):
                list(call)
            call.cancel()
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)


def test_grpc_health_is_open(world: World) -> None:
    reply = world.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_idempotency_keys_belong_to_the_api_key(world: World) -> None:
    """Whoever has another one gets neither the kept answer, nor its seed, nor a conflict."""

    def ask(key: str, content: str) -> httpx.Response:
        return httpx.post(
            world.url + "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": content}]},
            headers={**bearer(KEYS[key]), "Idempotency-Key": "order-1"},
            timeout=TIMEOUT_S,
        )

    answers = [ask("inference", "Hi"), ask("admin", "Hi"), ask("inference", "Hi")]
    assert [a.headers.get("idempotency-replayed") for a in answers] == [None, None, "true"]
    assert answers[1].json()["id"] != answers[0].json()["id"]
    first, second = world.engine.submitted
    assert first.params.seed != second.params.seed
    assert ask("admin", "Ho").status_code == 409

    def call(key: str, content: str) -> None:
        metadata = [("authorization", f"Bearer {KEYS[key]}"), ("idempotency-key", "order-2")]
        request = pb.ChatRequest(messages=[pb.ChatMessage(role="user", content=content)])
        list(world.stub.Chat(request, metadata=metadata, timeout=TIMEOUT_S))

    call("inference", "Hi")
    call("admin", "Ho")
    with pytest.raises(grpc.RpcError, match="ALREADY_EXISTS"):
        call("inference", "Ho")


# ---- rows 1 to 5

MISSING, INVALID = "missing_api_key", "invalid_api_key"
INFERENCE = KEYS["inference"]
ROWS_1_AND_2: list[tuple[list[str], str]] = [
    ([], MISSING),
    ([f"Bearer {WRONG}"], INVALID),
    ([f"Bearer {INFERENCE[:-1]}"], INVALID),
    ([f"Bearer {INFERENCE}x"], INVALID),
    ([f"Bearer {INFERENCE.upper()}"], INVALID),
    ([f"Bearer {INFERENCE} {INFERENCE}"], INVALID),
    ([f"Basic {INFERENCE}"], INVALID),
    ([f"Bearer:{INFERENCE}"], INVALID),
    ([INFERENCE], INVALID),
    (["Bearer"], INVALID),
    ([""], INVALID),
    ([f"Bearer {INFERENCE}", f"Bearer {WRONG}"], INVALID),
    ([f"Bearer {WRONG}", f"Bearer {INFERENCE}"], INVALID),
    (["Bearer " + "x" * 5000], INVALID),
]


@pytest.mark.parametrize(("values", "code"), ROWS_1_AND_2)
def test_rows_1_and_2_on_http(world: World, values: list[str], code: str) -> None:
    headers = [("Authorization", value) for value in values]
    response = httpx.post(
        world.url + "/v1/chat/completions", json=CHAT, headers=headers, timeout=TIMEOUT_S
    )
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert len(response.headers["x-request-id"]) == 32
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("authentication_error", code)
    assert "Bearer KEY" in error["message"] or "not valid" in error["message"]
    assert world.engine.submitted == []


@pytest.mark.parametrize(("values", "code"), ROWS_1_AND_2)
def test_rows_1_and_2_on_grpc(world: World, values: list[str], code: str) -> None:
    metadata = [("authorization", value) for value in values]
    with pytest.raises(grpc.RpcError) as caught:
        world.stub.Tokenize(pb.TokenizeRequest(text="Hi"), metadata=metadata, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details_of(caught.value)["ErrorInfo"].reason == code.upper()
    events = []
    with pytest.raises(grpc.RpcError) as caught:
        for event in world.stub.Generate(pb.GenerateRequest(text="Hi"), metadata=metadata):
            events.append(event)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [event.error.code for event in events] == [code]
    assert world.engine.submitted == []


def test_row_3_a_key_without_the_scope(world: World) -> None:
    body = {"tier": "experts", "workers": 4}
    response = httpx.post(
        world.url + "/v1/scale", json=body, headers=bearer(INFERENCE), timeout=TIMEOUT_S
    )
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (403, "insufficient_scope")
    assert error["message"] == (
        "The API key the-inference is for inference; 'POST /v1/scale' needs one for admin."
    )
    assert world.commands == []
    metadata = [("authorization", f"Bearer {KEYS['metrics']}")]
    with pytest.raises(grpc.RpcError) as caught:
        world.stub.Tokenize(pb.TokenizeRequest(text="Hi"), metadata=metadata, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details_of(caught.value)["ErrorInfo"].reason == "INSUFFICIENT_SCOPE"


@pytest.mark.parametrize("path", ["/tokenize", "/metrics", "/invocations", "/scale_elastic_ep"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD", "PROPFIND"])
def test_row_4_no_path_is_forgotten(world: World, path: str, method: str) -> None:
    assert httpx.request(method, world.url + path, timeout=TIMEOUT_S).status_code == 401


# target, host, with an inference key
ROW_5: list[tuple[str, str, int]] = [
    ("//v1/models", "localhost", 404),
    ("/V1/models", "localhost", 404),
    ("/v1/models/", "localhost", 404),
    ("/v1/../livez", "localhost", 404),
    ("/%2e%2e/v1/models", "localhost", 404),
    ("/livez/", "localhost", 404),
    ("//livez", "localhost", 404),
    ("/%2flivez", "localhost", 404),
    ("/livez%2f", "localhost", 404),
    ("/livez%2f..%2fstatus", "localhost", 404),
    ("/livez/../status", "localhost", 404),
    ("/livez%00", "localhost", 404),
    ("/livez;/status", "localhost", 404),
    ("/LIVEZ", "localhost", 404),
    ("/assets", "localhost", 404),
    ("//assets/common.js", "localhost", 404),
    ("/experts/", "localhost", 404),
    ("/v1/models/..%2fscale", "localhost", 404),
    ("/v1%2fscale", "localhost", 403),
    ("/v1/scale?/livez", "localhost", 403),
    ("/v1/scale", "localhost/livez?", 403),
    ("/v1/scale", "localhost/livez#", 403),
    ("/invocations", "localhost/livez?", 404),
    ("/status?x=/livez", "localhost", 200),
    ("/status", "localhost/livez?", 200),
    ("/status", "localhost/livez#", 200),
]


@pytest.mark.parametrize(("target", "host", "status"), ROW_5)
def test_row_5_no_spelling_gets_around_the_key(
    world: World, target: str, host: str, status: int
) -> None:
    assert world.raw(target, None, host) == (401, MISSING)
    assert world.raw(target, WRONG, host) == (401, INVALID)
    assert world.raw(target, INFERENCE, host)[0] == status


def test_below_a_prefix_the_same_holds(world: World) -> None:
    def check(path: str, root: str) -> None:
        scope = {"method": "GET", "path": path, "root_path": root, "headers": []}
        Authorizer(KeyRing(world.path)).check_http(scope)

    check("/api/livez", "/api")
    for path, root in ("/livez/status", "/livez"), ("/apilivez", "/api"), ("/livezlivez", "/livez"):
        with pytest.raises(Exception, match="An API key is needed"):
            check(path, root)


# ---- clients


def test_the_openai_sdk_understands_a_refusal(world: World) -> None:
    def ask(key: str) -> str:
        with openai.OpenAI(base_url=world.url + "/v1", api_key=key, max_retries=0) as client:
            return client.models.list().data[0].id

    with pytest.raises(openai.AuthenticationError) as refused:
        ask(WRONG)
    assert (refused.value.code, refused.value.type) == (INVALID, "authentication_error")
    assert "The API key is not valid here." in refused.value.message
    with pytest.raises(openai.PermissionDeniedError) as denied:
        ask(KEYS["metrics"])
    assert denied.value.code == "insufficient_scope"
    assert ask(INFERENCE) == "tiny"


def test_commands_come_under_any_name_when_they_need_a_key(world: World) -> None:
    headers = bearer(KEYS["admin"]) | {"Host": "shoal.example.com"}
    response = httpx.post(
        world.url + "/v1/experts/rebalance", json={}, headers=headers, timeout=TIMEOUT_S
    )
    assert response.status_code == 200


def test_the_command_line_sends_its_key(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = ["scale", "experts", "4", "--url", world.url]
    refused = CliRunner().invoke(shoal_app, scale)
    assert refused.exit_code == 2
    assert refused.stderr == (
        "shoal: An API key is needed: send 'Authorization: Bearer KEY'."
        " Set SHOAL_API_KEY or give --api-key.\n"
    )
    assert CliRunner().invoke(shoal_app, [*scale, "--api-key", KEYS["admin"]]).exit_code == 0
    monkeypatch.setenv(API_KEY_VARIABLE, KEYS["admin"])
    assert CliRunner().invoke(shoal_app, scale).exit_code == 0
    assert len(world.commands) == 2


@pytest.mark.parametrize("command", [["status"], ["experts", "show"], ["chaos", "kill", "router"]])
def test_every_command_says_how_to_give_a_key(world: World, command: list[str]) -> None:
    result = CliRunner().invoke(shoal_app, [*command, "--url", world.url])
    assert result.exit_code in (2, 3)
    assert "SHOAL_API_KEY" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("key", ["two\r\nX-Other: lines", "schlüssel"])
def test_a_key_that_cannot_be_sent_is_one_line(world: World, key: str) -> None:
    result = CliRunner().invoke(shoal_app, ["status", "--url", world.url, "--api-key", key])
    assert result.exit_code == 2 and "the API key has characters" in result.stderr
    assert key not in result.stderr


# ---- what is kept quiet


def test_keys_are_not_logged(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for key in (WRONG, *KEYS.values()):
            with httpx.Client(headers=bearer(key), timeout=TIMEOUT_S) as client:
                client.get(world.url + "/v1/models")
                client.post(world.url + "/v1/experts/rebalance", json={})
    assert caplog.records
    assert not any(key in caplog.text for key in (WRONG, *KEYS.values()))


def test_without_keys_everything_is_open_as_ever(tmp_path: Path) -> None:
    with (
        http_server(make_service(tmp_path, FakeEngine([EOS]))) as url,
        httpx.Client(base_url=url, timeout=TIMEOUT_S) as client,
    ):
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers=bearer(WRONG)).status_code == 200
        assert client.get("/nowhere").status_code == 404
