"""What observers hear of requests, over both fronts: refused once, or started and recorded once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pytest import MonkeyPatch

from attention.messages import Submit, TokenOutput
from cluster.frontend.choice import ChoiceText
from cluster.frontend.observer import RequestRecord
from cluster.frontend.openai import CompletionRequest
from cluster.frontend.replay import SequenceRuns
from cluster.frontend.responses import timing_parts
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.limits import Limits
from cluster.protos import inference_pb2 as pb
from cluster.protos import inference_pb2_grpc
from tests.fakes import TIMEOUT_S, FakeEngine, TokenClock
from tests.serving import EOS, grpc_server, http_server, ids_of, make_service

HELLO = [*ids_of("Hello"), EOS]
BODY: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 16}


class Heard:
    """A RequestObserver that keeps everything."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.refused: list[tuple[str, str]] = []
        self.kept: list[str] = []
        self.tokens: list[tuple[int, float | None]] = []
        self.records: list[RequestRecord] = []
        self._changed = threading.Condition()

    def on_started(self, request_id: str) -> None:
        self.started.append(request_id)

    def on_refused(self, request_id: str, code: str) -> None:
        with self._changed:
            self.refused.append((request_id, code))
            self._changed.notify_all()

    def on_kept(self, request_id: str) -> None:
        self.kept.append(request_id)

    def on_tokens(self, num_tokens: int, gap_s: float | None) -> None:
        self.tokens.append((num_tokens, gap_s))

    def on_finished(self, record: RequestRecord) -> None:
        with self._changed:
            self.records.append(record)
            self._changed.notify_all()

    def record(self) -> RequestRecord:
        """The one there is."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.records, TIMEOUT_S)
        (record,) = self.records
        assert self.started == [record.request_id]
        assert self.refused == []
        return record

    def refusal(self) -> tuple[str, str]:
        """The one there is."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.refused, TIMEOUT_S)
        (refusal,) = self.refused
        assert self.started == [] and self.records == []
        return refusal


class Front:
    """A service over a fake engine on one of the fronts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.heard = Heard()
        self._folder = folder
        self._stack = ExitStack()

    def serve(
        self, engine: FakeEngine, limits: Limits | None = None, clock: TokenClock | None = None
    ) -> InferenceService:
        options = {"observers": [self.heard]}
        if clock is not None:
            options = {"observers": [self.heard, clock], "clock": clock}
        service = make_service(self._folder, engine, limits, **options)
        self._stack.callback(engine.close)
        if self.name == "http":
            url = self._stack.enter_context(http_server(service))
            self._http = self._stack.enter_context(httpx.Client(base_url=url, timeout=TIMEOUT_S))
        else:
            address = self._stack.enter_context(grpc_server(service))
            channel = self._stack.enter_context(grpc.insecure_channel(address))
            self._grpc = inference_pb2_grpc.InferenceStub(channel)
        return service

    def ask(self, request_id: str = "r1", **fields: Any) -> None:
        """A completion to its end, whatever that is."""
        body = {**BODY, **fields}
        if self.name == "http":
            self._http.post("/v1/completions", json=body, headers={"x-request-id": request_id})
            return
        with suppress(grpc.RpcError):
            list(self._call(body, request_id))

    def _call(self, body: dict[str, Any], request_id: str = "r1") -> Any:
        names = ("max_tokens", "n", "temperature", "stop")
        sampling = pb.SamplingParams(**{name: body[name] for name in names if name in body})
        request = pb.GenerateRequest(model=body["model"], text=body["prompt"], sampling=sampling)
        if "timeout" in body:
            request.timeout = body["timeout"]
        return self._grpc.Generate(
            request, metadata=[("x-request-id", request_id)], timeout=TIMEOUT_S
        )

    def leave_after_a_token(self) -> None:
        """A client that goes away in the middle of a stream."""
        if self.name == "http":
            with self._http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as got:
                next(got.iter_lines())
        else:
            call = self._call(BODY)
            next(call)
            call.cancel()

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=["http", "grpc"])
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Front]:
    made = Front(request.param, tmp_path)
    yield made
    made.close()


def test_a_good_request_is_recorded_once(front: Front) -> None:
    front.serve(FakeEngine(HELLO, cached=2))
    front.ask("mine", n=2)
    record = front.heard.record()
    assert (record.request_id, record.protocol, record.kind) == ("mine", front.name, "completion")
    assert (record.model, record.num_sequences) == ("tiny", 2)
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (2, 2, 12)
    assert (record.outcome, record.code) == ("ok", "")
    assert record.finish_reasons == ("stop", "stop")
    assert record.answer_id.startswith("cmpl-")
    assert record.ttft_s is not None and 0 < record.ttft_s <= record.e2e_s
    assert (record.num_replays, record.key_name, record.trace_id) == (0, "", "")
    assert sum(num for num, _ in front.heard.tokens) == 12
    assert [gap_s for _, gap_s in front.heard.tokens].count(None) == 2, "the first of each sequence"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"temperature": 7.0}, "decimal_above_max_value"),
        ({"model": "other"}, "model_not_found"),
        ({"prompt": "x" * 400}, "context_length_exceeded"),
        ({"n": 3}, "server_overloaded"),
        ({"timeout": 1e-9}, "deadline_exceeded"),
    ],
)
def test_a_refused_request_is_told_once(front: Front, fields: dict[str, Any], code: str) -> None:
    front.serve(FakeEngine(HELLO), Limits(max_open_sequences=2))
    front.ask("mine", **fields)
    assert front.heard.refusal() == ("mine", code)


def test_a_server_that_drains_refuses(front: Front) -> None:
    asyncio.run(front.serve(FakeEngine(HELLO)).drain())
    front.ask("mine")
    assert front.heard.refusal() == ("mine", "draining")


def test_a_body_that_is_no_json_is_refused_once(tmp_path: Path) -> None:
    front = Front("http", tmp_path)
    front.serve(FakeEngine(HELLO))
    headers = {"x-request-id": "mine", "content-type": "application/json"}
    front._http.post("/v1/completions", content=b"{", headers=headers)
    front.close()
    assert front.heard.refusal() == ("mine", "invalid_json")


def test_an_engine_that_fails(front: Front) -> None:
    front.serve(FakeEngine(HELLO, finish="error", error="broken"))
    front.ask()
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "engine_error")
    assert record.finish_reasons == ()


def test_no_worker_takes_it(front: Front) -> None:
    engine = FakeEngine(HELLO)
    engine.broken = OSError("nobody")
    front.serve(engine)
    front.ask()
    record = front.heard.record()
    assert (record.outcome, record.code, record.ttft_s) == ("error", "no_worker", None)


def test_a_fault_of_ours_is_not_the_clients(front: Front, monkeypatch: MonkeyPatch) -> None:
    engine = FakeEngine(HELLO, hold_after=2)
    front.serve(engine)
    monkeypatch.setattr(ChoiceText, "push", broken)
    front.ask()
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "internal_error")
    assert record.finish_reasons == ()
    assert engine.aborted == [f"{record.answer_id}-0"]


@pytest.mark.parametrize("writer", ["streaming.chunk_choice", "grpc_server.delta_message"])
def test_what_writes_an_answer_has_a_fault(
    writer: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    front = Front("grpc" if writer.startswith("grpc") else "http", tmp_path)
    front.serve(FakeEngine(HELLO, hold_after=2))
    monkeypatch.setattr(f"cluster.frontend.{writer}", broken)
    front.ask(stream=True)
    front.close()
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "internal_error")


@pytest.mark.parametrize(
    ("writer", "stream"),
    [
        ("responses.usage_json", False),
        ("http_generation.timing_header", False),
        ("streaming.timing_json", True),
        ("grpc_server.timing_message", True),
    ],
)
def test_a_fault_behind_the_last_token_is_told_as_one(
    writer: str, stream: bool, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    front = Front("grpc" if writer.startswith("grpc") else "http", tmp_path)
    front.serve(FakeEngine(HELLO))
    monkeypatch.setattr(f"cluster.frontend.{writer}", broken)
    front.ask(stream=stream, **({"timing": True} if writer.startswith("streaming") else {}))
    front.close()
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "internal_error")
    assert (record.completion_tokens, record.finish_reasons) == (len(HELLO), ("stop",))


def test_a_fault_of_ours_before_anything_ran(front: Front, monkeypatch: MonkeyPatch) -> None:
    front.serve(FakeEngine(HELLO))
    monkeypatch.setattr(SequenceRuns, "start", broken)
    front.ask()
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "internal_error")


def broken(*_: Any, **__: Any) -> Any:
    raise ValueError("a bug")


@pytest.mark.parametrize("late_s", [0.001, 10.0])
def test_the_share_of_hops_is_of_the_steps(tmp_path: Path, late_s: float) -> None:
    """Two steps of 1 s, 0.75 s of hops in each; outputs that come in a lump change nothing."""
    now_s = [0.0]

    async def play() -> dict[str, float]:
        engine = Scripted()
        service = make_service(tmp_path, engine, clock=lambda: now_s[0])  # type: ignore[arg-type]
        body = parse_body(CompletionRequest, {**BODY, "max_tokens": 2})
        with await service.complete(body) as generation:
            now_s[0] = 10.0
            first = {"token_ids": [20], "prefill_us": 1_000_000}
            engine.say(**first, step_us=1_000_000, hop_us=750_000)
            await asyncio.sleep(0)
            now_s[0] += late_s
            last = {"token_ids": [21], "finish_reason": "length"}
            engine.say(**last, step_us=2_000_000, hop_us=1_500_000)
            assert [delta async for delta in generation]
            return timing_parts(generation)

    parts = asyncio.run(play())
    assert parts["hop_share"] == 0.75
    assert parts["decode_ms"] == pytest.approx(1e3 * late_s)


def test_the_deadline_passes(front: Front) -> None:
    front.serve(FakeEngine(HELLO, hold_after=2), clock=TokenClock(2, leap_s=0.2))
    front.ask(timeout=0.2)
    record = front.heard.record()
    assert (record.outcome, record.code) == ("error", "deadline_exceeded")
    assert record.completion_tokens == 2


def test_the_client_goes_away_before_anything_came(tmp_path: Path) -> None:
    """Of a whole answer, and of a stream that has not begun."""
    for name, stream in (("whole", False), ("stream", True)):
        front, engine = Front("http", tmp_path / name), FakeEngine(HELLO, hold_after=0)
        front.serve(engine)
        with pytest.raises(httpx.ReadTimeout):
            patience = httpx.Timeout(TIMEOUT_S, read=0.2)
            front._http.post("/v1/completions", json={**BODY, "stream": stream}, timeout=patience)
        record = front.heard.record()
        front.close()
        assert (record.outcome, record.code, record.ttft_s) == ("cancelled", "", None)
        assert engine.aborted == [f"{record.answer_id}-0"]


def test_the_client_goes_away(front: Front) -> None:
    front.serve(FakeEngine(HELLO, hold_after=2))
    front.leave_after_a_token()
    record = front.heard.record()
    assert (record.outcome, record.code, record.finish_reasons) == ("cancelled", "", ())


def test_an_answer_that_is_kept_is_not_counted_again(tmp_path: Path) -> None:
    front = Front("http", tmp_path)
    front.serve(FakeEngine(HELLO))
    for name in ("first", "again"):
        headers = {"idempotency-key": "k", "x-request-id": name}
        front._http.post("/v1/completions", json=BODY, headers=headers)
    front.close()
    assert (front.heard.record().request_id, front.heard.record().outcome) == ("first", "ok")
    assert front.heard.kept == ["again"]


def test_a_stop_string_ends_a_request_well(front: Front) -> None:
    front.serve(FakeEngine(HELLO))
    front.ask(stop=["ll"])
    record = front.heard.record()
    assert (record.outcome, record.finish_reasons) == ("ok", ("stop",))


def test_times_of_replays_add_up(tmp_path: Path) -> None:
    """A clock by hand: submitted at 0, lost at 30 without a token, two tokens at 40 and 50, lost at
    60, one more at 90."""
    now_s = [0.0]
    heard = Heard()
    engine = Scripted()
    service = make_service(tmp_path, engine, observers=[heard], clock=lambda: now_s[0])  # type: ignore[arg-type]

    async def play() -> None:
        body = parse_body(CompletionRequest, {**BODY, "max_tokens": 3})
        generation = await service.complete(body)
        script = [
            (30.0, {"finish_reason": "lost"}),
            (40.0, {"token_ids": [20], "prefill_us": 4_000_000, "hop_us": 1_000_000}),
            (50.0, {"token_ids": [21], "step_us": 6, "hop_us": 2_000_000, "expert_us": 7_000}),
            (60.0, {"finish_reason": "lost"}),
            (
                90.0,
                {
                    "token_ids": [22],
                    "finish_reason": "length",
                    "prefill_us": 5_000_000,
                    "step_us": 8_000_000,
                    "hop_us": 3_000_000,
                    "expert_us": 5_000,
                    "num_preemptions": 2,
                },
            ),
        ]
        for at_s, output in script:
            now_s[0] = at_s
            engine.say(**output)
            for _ in range(3):
                await asyncio.sleep(0)
        with generation:
            assert [delta.text async for delta in generation]

    asyncio.run(play())
    record = heard.record()
    timing = record.timing
    assert record.num_replays == 2
    assert timing.queue_s == pytest.approx(30.0 + 6.0 + 25.0)
    assert timing.prefill_s == pytest.approx(4.0 + 5.0)
    assert timing.decode_s == pytest.approx(20.0)
    assert timing.queue_s + timing.prefill_s + timing.decode_s == pytest.approx(record.e2e_s)
    assert timing.step_s == pytest.approx(8.000006)
    assert (timing.hop_s, timing.expert_ms, timing.num_preemptions) == (5.0, 12.0, 2)
    assert record.ttft_s == 40.0
    assert heard.tokens == [(1, None), (1, 10.0), (1, 40.0)]


def test_the_time_of_a_token_is_each_sequences(tmp_path: Path) -> None:
    """By the clock two tokens at once, four more in 4 s, two more in 6 s."""
    now_s = [0.0]
    heard = Heard()
    engine = Scripted()
    service = make_service(tmp_path, engine, observers=[heard], clock=lambda: now_s[0])  # type: ignore[arg-type]

    async def play() -> None:
        generation = await service.complete(parse_body(CompletionRequest, {**BODY, "n": 3}))
        for at_s, run, ids in [
            (1.0, 0, [20]),
            (1.0, 1, [20]),
            (1.0, 2, [20, EOS]),
            (5.0, 0, [20, 20, 20, EOS]),
            (7.0, 1, [20, EOS]),
        ]:
            now_s[0] = at_s
            end = {"finish_reason": "stop"} if EOS in ids else {}
            engine.say(run, token_ids=ids, **end)
            for _ in range(3):
                await asyncio.sleep(0)
        with generation:
            assert [delta async for delta in generation]

    asyncio.run(play())
    assert heard.record().token_s == (0.0, 1.0, 3.0)


class Scripted(FakeEngine):
    """Says what it is told, from the caller's thread, to a run: the newest, unless said."""

    def __init__(self) -> None:
        super().__init__([])
        self._runs: list[tuple[str, Any]] = []

    def _start(self, request: Submit, on_output: Any) -> None:
        self._runs.append((request.request_id, on_output))

    def say(self, run: int = -1, **fields: Any) -> None:
        request_id, say = self._runs[run]
        say(TokenOutput(request_id=request_id, **fields))
