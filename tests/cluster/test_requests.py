"""The service: what reaches the engine, how answers end, and that nothing is left running."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.messages import SamplingParams, TokenOutput
from cluster.config import parse_config
from cluster.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    ServerOverloaded,
    Unavailable,
)
from cluster.frontend.admission import MAX_RETRY_AFTER_S, Admission
from cluster.frontend.backend import Readiness
from cluster.frontend.choice import ChoiceText, Delta
from cluster.frontend.generation import Generation
from cluster.frontend.ledger import LedgerEntry, RequestLedger
from cluster.frontend.openai import ChatCompletionRequest, CompletionRequest
from cluster.frontend.request import GenerateRequest, Prompt
from cluster.frontend.schema_errors import parse_body
from cluster.frontend.service import InferenceService
from cluster.generation_defaults import GenerationDefaults
from cluster.ingress import model_info
from cluster.limits import Limits
from cluster.model_store import check_model
from cluster.tokenizer import Tokenizer
from experts.errors import CheckpointError
from tests.fakes import TIMEOUT_S, FakeEngine, TokenClock
from tests.serving import CONTEXT, EOS, VOCAB_SIZE, ids_of, make_service, write_tokenizer

ResultT = TypeVar("ResultT")
HELLO = [*ids_of("Hello"), EOS]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., InferenceService]]:
    """`serve(engine, limits)`: a service over it; the engine is let go after the test."""
    engines: list[FakeEngine] = []

    def start(engine: FakeEngine, limits: Limits | None = None, **options: Any) -> InferenceService:
        engines.append(engine)
        return make_service(tmp_path, engine, limits, **options)

    yield start
    for engine in engines:
        engine.close()


def run(work: Awaitable[ResultT]) -> ResultT:
    async def within() -> ResultT:
        return await asyncio.wait_for(work, TIMEOUT_S)

    return asyncio.run(within())


def chat_body(content: str = "Hi", **fields: Any) -> ChatCompletionRequest:
    messages = [{"role": "user", "content": content}]
    return parse_body(ChatCompletionRequest, {"messages": messages, **fields})


def text_body(prompt: Any = "Hi", **fields: Any) -> CompletionRequest:
    return parse_body(CompletionRequest, {"prompt": prompt, **fields})


async def collect(start: Awaitable[Generation]) -> list[Delta]:
    with closing(await start) as generation:
        return [delta async for delta in generation]


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


# ---- what is submitted


def test_defaults(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    run(collect(serve(engine).chat(chat_body())))
    submit = engine.submitted[0]
    assert submit.prompt_ids == [0, 3, *ids_of("Hi"), 4]
    assert submit.params.model_dump(exclude_defaults=True) == {
        "max_tokens": CONTEXT - 5,
        "temperature": 0.6,  # of the model's generation_config.json
        "seed": submit.params.seed,
    }
    assert submit.params.seed is not None
    assert submit.deadline_s is None
    assert submit.emitted_ids == []


def test_a_greedy_model_samples_only_when_asked(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    service = serve(engine)
    service.model = replace(service.model, temperature=0.0)
    run(collect(service.chat(chat_body())))
    run(collect(service.chat(chat_body(temperature=0.7))))
    greedy, sampled = (submit.params for submit in engine.submitted)
    assert (greedy.temperature, greedy.seed) == (0.0, None)
    assert sampled.temperature == 0.7 and sampled.seed is not None


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 1.0),
        ({"temperature": 0.3}, 0.3),
        ({"do_sample": True, "temperature": 0.6}, 0.6),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.6}, 0.0),
        ({"temperature": None}, 1.0),
        ({"temperature": 2}, 2.0),
    ],
)
def test_temperature_that_a_checkpoint_recommends(
    settings: dict[str, Any],
    temperature: float,
    tmp_path: Path,
    checkpoint_dir: Callable[[str], Path],
) -> None:
    shutil.copy(checkpoint_dir("v3") / "config.json", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert model_info(parse_config({"model": tmp_path})).temperature == temperature


@pytest.mark.parametrize(
    ("settings", "top_p"), [({}, 1.0), ({"top_p": None}, 1.0), ({"top_p": 0.9}, 0.9)]
)
def test_top_p_that_a_checkpoint_recommends(
    settings: dict[str, Any], top_p: float, tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert GenerationDefaults.load(tmp_path).top_p == top_p


@pytest.mark.parametrize("field", ["temperature", "top_p"])
@pytest.mark.parametrize(
    "value", ['"0.6"', "true", "[1]", "{}", "NaN", "Infinity", "1" + "0" * 400]
)
def test_a_recommendation_that_is_no_number_is_refused(
    field: str, value: str, tmp_path: Path
) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(f'{{"do_sample": false, "{field}": {value}}}')
    with pytest.raises(CheckpointError) as refused:
        GenerationDefaults.load(tmp_path)
    assert refused.value.file == str(file) and f"a number as {field}" in str(refused.value)


def test_a_bad_recommendation_stops_the_start(
    tmp_path: Path, checkpoint_dir: Callable[[str], Path]
) -> None:
    folder = shutil.copytree(checkpoint_dir("v3"), tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": "warm"}')
    with pytest.raises(CheckpointError, match="expected a number as temperature, found 'warm'"):
        check_model(folder)


def test_recommendations_that_are_no_json_are_refused(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("temperature: 1")
    with pytest.raises(CheckpointError, match="generation_config.json: expected valid JSON"):
        GenerationDefaults.load(tmp_path)


def test_completions_stop_after_16_tokens_unless_told(
    serve: Callable[..., InferenceService],
) -> None:
    engine = FakeEngine(HELLO)
    service = serve(engine)
    run(collect(service.complete(text_body())))
    run(collect(service.complete(text_body(max_tokens=CONTEXT))))
    assert [submit.params.max_tokens for submit in engine.submitted] == [16, CONTEXT - 2]


def test_newer_name_of_max_tokens_wins(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    body = chat_body(max_tokens=9, max_completion_tokens=3)
    deltas = run(collect(serve(engine).chat(body)))
    assert engine.submitted[0].params.max_tokens == 3
    assert (text_of(deltas), deltas[-1].finish_reason) == ("Hel", "length")


def test_seeds(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    service = serve(engine)
    run(collect(service.complete(text_body(["a", "b"], n=2, seed=2**63 - 1))))
    run(collect(service.complete(text_body(temperature=0.0, seed=7))))
    run(collect(service.complete(text_body())))
    run(collect(service.complete(text_body())))
    seeds = [submit.params.seed for submit in engine.submitted]
    assert seeds[:4] == [2**63 - 1, 0, 2**63 - 1, 0]  # n choices differ, equal prompts do not
    assert seeds[4] is None  # greedy needs none
    assert seeds[5] != seeds[6]  # drawn


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [ids_of("ab")]),
        (["a", "b"], [ids_of("a"), ids_of("b")]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ],
)
def test_four_forms_of_a_prompt(
    serve: Callable[..., InferenceService], prompt: Any, expected: list[list[int]]
) -> None:
    engine = FakeEngine(HELLO)
    deltas = run(collect(serve(engine).complete(text_body(prompt))))
    assert [submit.prompt_ids for submit in engine.submitted] == expected
    assert [text_of(deltas, i) for i in range(len(expected))] == ["Hello"] * len(expected)


def test_n_answers_of_every_prompt_in_order(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, cached=1)
    service = serve(engine)

    async def go() -> Generation:
        generation = await service.complete(text_body(["a", "bc"], n=3))
        with closing(generation):
            deltas = [delta async for delta in generation]
        assert {delta.index for delta in deltas} == set(range(6))
        return generation

    generation = run(go())
    prompts = [submit.prompt_ids for submit in engine.submitted]
    assert prompts == [ids_of("a")] * 3 + [ids_of("bc")] * 3
    assert len({submit.request_id for submit in engine.submitted}) == 6
    usage = generation.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (3, 2, 36)


def test_long_texts_are_tokenised_off_the_event_loop(
    serve: Callable[..., InferenceService], monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    engine = FakeEngine(HELLO)
    service = serve(engine)
    threads: list[threading.Thread] = []
    monkeypatch.setattr(
        service.tokenizer,
        "encode",
        lambda text, **options: threads.append(threading.current_thread()) or [5],
    )
    monkeypatch.setattr(service.tokenizer, "max_chars", lambda tokens: 10**6)
    run(collect(service.complete(text_body("x" * 100))))
    run(collect(service.complete(text_body("x" * 100_000))))
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


# ---- echo


def test_echo_shows_the_prompt_with_its_log_probabilities(
    serve: Callable[..., InferenceService],
) -> None:
    body = text_body("漢b", echo=True, logprobs=1, max_tokens=2)
    deltas = run(collect(serve(FakeEngine(HELLO)).complete(body)))
    assert text_of(deltas) == "漢bHe"
    tokens = [token for delta in deltas for token in delta.logprobs or ()]
    prompt = ids_of("漢b")
    assert [t.token.logprob for t in tokens] == [
        None,
        *[-i / 100 for i in prompt[1:]],
        -ids_of("H")[0] / 100,
        -ids_of("e")[0] / 100,
    ]
    assert [t.offset for t in tokens] == [0, 0, 0, 1, 2, 3]
    assert b"".join(t.token.shown for t in tokens).decode() == "漢bHe"
    assert [i for delta in deltas for i in delta.token_ids] == HELLO[:2]


def test_echo_of_the_prompt_alone(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    deltas = run(collect(serve(engine).complete(text_body([5, 90], echo=True, max_tokens=0))))
    assert text_of(deltas) == "I"  # id 5 is <think>, which is hidden; 90 is the byte "I"
    assert deltas[-1].finish_reason == "length"
    assert engine.submitted[0].params.max_tokens == 0


# ---- stop strings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(write_tokenizer(tmp_path_factory.mktemp("tiny")), VOCAB_SIZE)


def choice(tokenizer: Tokenizer, min_tokens: int = 0, **fields: Any) -> ChoiceText:
    params = SamplingParams(min_tokens=min_tokens, logprobs=0)
    request = GenerateRequest("r", "m", (Prompt([1]),), (params,), **fields)
    return ChoiceText(0, request, tokenizer)


def push(text: ChoiceText, ids: list[int], finish: Any = None, **fields: Any) -> Delta:
    return text.push(TokenOutput(request_id="r-0", token_ids=ids, finish_reason=finish, **fields))


def test_stop_string_is_held_back_and_never_shown(tiny: Tokenizer) -> None:
    text = choice(tiny, stop=("END",))
    shown = [push(text, [i]).text for i in ids_of("aENbEN")]
    assert shown == ["a", "", "", "ENb", "", ""]
    last = push(text, ids_of("D"))
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "END")
    assert last.token_ids == ids_of("END")  # the ids stay complete
    assert last.logprobs == []


def test_held_back_text_is_shown_when_the_answer_ends_otherwise(tiny: Tokenizer) -> None:
    text = choice(tiny, stop=("END",))
    assert push(text, ids_of("xEN")).text == "x"
    last = push(text, [], "length")
    assert (last.text, last.finish_reason) == ("EN", "length")


def test_stop_string_may_be_shown_if_asked(tiny: Tokenizer) -> None:
    text = choice(tiny, stop=("END",), include_stop=True)
    delta = push(text, ids_of("aENDb"))
    assert (delta.text, delta.finish_reason) == ("aEND", "stop")


def test_the_stop_string_that_ends_first_wins(tiny: Tokenizer) -> None:
    text = choice(tiny, stop=("abc", "b"))
    delta = push(text, ids_of("xabcd"))
    assert (delta.text, delta.stop_reason) == ("xa", "b")


def test_stop_strings_are_looked_for_after_min_tokens(tiny: Tokenizer) -> None:
    text = choice(tiny, min_tokens=3, stop=("a",))
    shown = [push(text, [i]) for i in ids_of("aaab")]
    assert [delta.finish_reason for delta in shown] == [None] * 4
    assert push(text, ids_of("a")).finish_reason == "stop"


def test_no_half_character_is_shown(tiny: Tokenizer) -> None:
    text = choice(tiny)
    assert [push(text, [i]).text for i in ids_of("漢x")] == ["", "", "漢", "x"]
    delta = push(text, ids_of("漢")[:2], "length")
    assert delta.text == "\ufffd"


@pytest.mark.parametrize(("include", "shown"), [(False, "a"), (True, "ab")])
def test_token_that_stopped_the_engine(tiny: Tokenizer, include: bool, shown: str) -> None:
    text = choice(tiny, include_stop=include)
    delta = push(text, ids_of("ab"), "stop", stop_reason=ids_of("b")[0])
    assert (delta.text, delta.stop_reason) == (shown, ids_of("b")[0])
    assert delta.logprobs is not None and len(delta.logprobs) == 2


@given(
    text=st.text(alphabet="abc漢 ", max_size=30),
    stops=st.lists(st.text(alphabet="abc漢", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=20),
    include=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_chunks_do_not_change_the_answer(
    tiny: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    """However the engine's ids come, the text is the one up to the stop that ends first, and log
    probabilities spell exactly the text of their own chunk."""
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    end, start, stop = min(ends, default=(len(text), len(text), None))
    answer = choice(tiny, stop=tuple(stops), include_stop=include)
    ids, deltas, at = ids_of(text), [], 0
    while at < len(ids) and not answer.finished:
        step = ids[at : at + cuts[len(deltas) % len(cuts)]]
        at += len(step)
        deltas.append(push(answer, step))
    if not answer.finished:
        deltas.append(push(answer, [], "length"))
    assert "".join(delta.text for delta in deltas) == text[: end if include else start]
    assert deltas[-1].stop_reason == stop
    assert [i for delta in deltas for i in delta.token_ids] == ids[:at] or stop is not None
    for delta in deltas:
        assert b"".join(t.token.shown for t in delta.logprobs or ()).decode() == delta.text


def test_stop_string_aborts_the_engine(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, hold_after=4)
    service = serve(engine)
    deltas = run(collect(service.chat(chat_body(stop="ll"))))
    assert text_of(deltas) == "He"
    assert engine.aborted == [engine.submitted[0].request_id]
    assert service.num_open_sequences == 0


# ---- ends


def test_finished_requests_are_not_aborted(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO)
    service = serve(engine)
    run(collect(service.chat(chat_body(n=3))))
    assert engine.aborted == []
    assert service.num_open_sequences == 0


def test_closing_aborts_at_once_what_still_runs(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, hold_after=2)
    service = serve(engine)

    async def go() -> None:
        generation = await service.chat(chat_body(n=2))
        await anext(generation)
        generation.close()
        generation.close()  # closing twice is fine

    run(go())
    assert sorted(engine.aborted) == sorted(s.request_id for s in engine.submitted)
    assert service.num_open_sequences == 0


def test_cancelling_the_reader_aborts_at_once(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, hold_after=2)
    service = serve(engine)

    async def go() -> None:
        task = asyncio.create_task(collect(service.chat(chat_body())))
        await asyncio.to_thread(engine.wait_for, lambda: len(engine.submitted) == 1)
        task.cancel()
        await asyncio.sleep(0)  # one turn of the event loop
        assert len(engine.aborted) == 1
        await asyncio.wait({task})

    run(go())


@pytest.mark.parametrize(
    ("hold_after", "body_s", "outside_s"), [(0, 0.05, None), (2, None, 0.05), (2, 9.0, 0.05)]
)
def test_deadline_aborts_and_says_so(
    serve: Callable[..., InferenceService], hold_after: int, body_s: Any, outside_s: Any
) -> None:
    clock = TokenClock(hold_after or 1, leap_s=0.05)
    engine = FakeEngine(HELLO, hold_after=hold_after)
    service = serve(engine, clock=clock, observers=[clock])
    with pytest.raises(DeadlineExceeded):
        run(collect(service.chat(chat_body(timeout=body_s), outside_s)))
    assert len(engine.aborted) == 1
    assert service.num_open_sequences == 0
    assert engine.submitted[0].deadline_s == 0.05


def test_engine_errors_after_the_deadline_are_the_deadlines(
    serve: Callable[..., InferenceService],
) -> None:
    now = [0.0]
    engine = FakeEngine(HELLO, finish="error", error="deadline")
    service = serve(engine, clock=lambda: now[0])

    async def go() -> None:
        with closing(await service.chat(chat_body(timeout=9.0))) as generation:
            await asyncio.to_thread(engine.close)  # every output waits, the error is the last
            now[0] = 10.0
            async for _ in generation:
                pass

    with pytest.raises(DeadlineExceeded):
        run(go())


@pytest.mark.parametrize(("finish", "reason"), [("error", "worker lost"), ("abort", "aborted")])
def test_engine_failure_ends_the_whole_request(
    serve: Callable[..., InferenceService], finish: Any, reason: str
) -> None:
    engine = FakeEngine(HELLO, finish=finish, error="worker lost")
    service = serve(engine)
    with pytest.raises(EngineFailed, match=reason):
        run(collect(service.chat(chat_body())))
    assert service.num_open_sequences == 0


def test_no_worker_is_unavailable_and_leaves_nothing(
    serve: Callable[..., InferenceService],
) -> None:
    engine = FakeEngine(HELLO)
    engine.broken = ConnectionError("unix:/secret/path refused")
    service = serve(engine)
    with pytest.raises(Unavailable) as caught:
        run(service.chat(chat_body()))
    assert caught.value.code == "no_worker"
    assert caught.value.retry_after_s == 1
    assert "/secret" not in caught.value.message
    assert service.num_open_sequences == 0


def test_outputs_after_the_loop_is_gone_do_not_hurt_the_engine(
    serve: Callable[..., InferenceService],
) -> None:
    engine = FakeEngine(HELLO, hold_after=1)
    callbacks: list[Any] = []
    submit = engine.submit
    engine.submit = lambda s, on_output: (callbacks.append(on_output), submit(s, on_output))[1]  # type: ignore[method-assign]

    async def go() -> None:
        (await serve(engine).chat(chat_body())).close()

    run(go())
    callbacks[0](TokenOutput(request_id="late", token_ids=[5]))


# ---- admission


def test_full_server_refuses_before_tokenising(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, hold_after=1)
    service = serve(engine, Limits(max_open_sequences=3))

    async def go() -> None:
        with closing(await service.chat(chat_body(n=2))):
            service.tokenizer.apply_chat_template = None  # type: ignore[method-assign, assignment]
            with pytest.raises(ServerOverloaded) as caught:
                await service.chat(chat_body(n=2))
            assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1
        assert service.num_open_sequences == 0

    run(go())


@pytest.mark.parametrize("content", ["x" * CONTEXT, "x"])
def test_refused_requests_give_their_places_back(
    serve: Callable[..., InferenceService], content: str
) -> None:
    service = serve(FakeEngine(HELLO))
    timeout = 0.0 if content == "x" else None
    with pytest.raises((InvalidRequest, DeadlineExceeded)):
        run(service.chat(chat_body(content, timeout=timeout)))
    assert service.num_open_sequences == 0


def test_retry_after_follows_the_rate_of_endings() -> None:
    now = [0.0]
    admission = Admission(10, lambda: now[0])
    admission.enter(10)
    for _ in range(200):  # one sequence ends every 4 s
        now[0] += 4.0
        admission.leave(1)
        admission.enter(1)
    with pytest.raises(ServerOverloaded) as caught:
        admission.enter(2)
    assert 8 <= (caught.value.retry_after_s or 0) <= 12  # 2 places x 4 s, spread by half
    with pytest.raises(ServerOverloaded) as caught:
        admission.enter(10_000)
    assert caught.value.retry_after_s == MAX_RETRY_AFTER_S


def test_loading_model_is_unavailable_with_its_stage(
    serve: Callable[..., InferenceService],
) -> None:
    engine = FakeEngine(HELLO)
    engine.readiness = Readiness(False, "loading weights", 3, 8)
    with pytest.raises(Unavailable, match="loading weights") as caught:
        run(serve(engine).chat(chat_body()))
    assert (caught.value.code, caught.value.retry_after_s) == ("model_loading", 5)


def test_who_comes_while_all_attention_workers_are_gone_waits_for_the_next(
    serve: Callable[..., InferenceService],
) -> None:
    engine = FakeEngine(HELLO)
    engine.readiness = Readiness(False, "connecting", missing="attention")
    assert text_of(run(collect(serve(engine).chat(chat_body())))) == "Hello"


# ---- the ledger


def test_ledger_knows_enough_to_continue_anywhere(serve: Callable[..., InferenceService]) -> None:
    engine = FakeEngine(HELLO, hold_after=3)
    service = serve(engine)

    async def go() -> tuple[LedgerEntry, str]:
        with closing(await service.chat(chat_body(seed=5, timeout=60.0))) as generation:
            shown = ""
            while len(shown) < 3:
                shown += (await anext(generation)).text
            entry = service.ledger.get(engine.submitted[0].request_id)
            assert entry is not None
            assert len(service.ledger) == 1
            return entry, shown

    entry, shown = run(go())
    first = engine.submitted[0]
    again = entry.submission(now=time.monotonic())
    assert shown == "Hel"
    assert again.emitted_ids == HELLO[:3]
    assert len(entry.emitted_ids) == 3
    assert (again.prompt_ids, again.params) == (first.prompt_ids, first.params)
    assert again.params.seed == 5
    assert again.deadline_s is not None and 0 < again.deadline_s <= 60
    assert len(service.ledger) == 0


def test_ledger_ignores_what_it_does_not_know() -> None:
    ledger = RequestLedger(lambda: 0.0)
    ledger.record("nobody", [1])
    ledger.close("nobody")
    submit = ledger.open(LedgerEntry("a", [1], SamplingParams(), deadline=-5.0))
    assert submit.deadline_s == 1e-3  # past already: the engine ends it at once
