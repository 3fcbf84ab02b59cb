"""Logs: one line an event whatever clients send, one a request, bounded, without any text."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.messages import SamplingParams, Submit, TokenOutput
from cluster.frontend import request_context
from cluster.frontend.observer import RequestRecord, Timing
from cluster.observability.follow_logs import LogFollower
from cluster.observability.logs import LineFormatter, LogFormat, console_logs, log_with_serve
from cluster.observability.request_log import CHEAP_LINES_PER_S, RequestLog
from cluster.observability.text_log import LoggedBackend
from cluster.tokenizer import Tokenizer
from tests.fakes import TIMEOUT_S, FakeEngine
from tests.serving import EOS, VOCAB_SIZE, ids_of, write_tokenizer

logger = logging.getLogger("cluster.test_logs")
TEXT_FIELD = re.compile(r'([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|[!#-<>-\[\]-~]+)(?: |$)')
RECORD = RequestRecord(
    request_id="r-1",
    answer_id="chatcmpl-1",
    protocol="http",
    kind="chat",
    model="tiny",
    stream=True,
    num_sequences=2,
    prompt_tokens=7,
    cached_tokens=4,
    completion_tokens=3,
    finish_reasons=("stop", "length", "stop"),
    outcome="ok",
    code="",
    e2e_s=1.23456,
    ttft_s=0.25,
    token_s=(0.98,),
    timing=Timing(queue_s=0.01, prefill_s=0.24, decode_s=0.98, hop_s=0.5, expert_ms=3.21),
    num_replays=1,
    key_name="alice",
    trace_id="",
)


def parse_text(line: str) -> dict[str, str]:
    """The fields of a line, which must be all there is in it."""
    fields, end = {}, 0
    for match in TEXT_FIELD.finditer(line):
        assert match.start() == end, line
        name, value = match.groups()
        fields[name] = json.loads(value) if value.startswith('"') else value
        end = match.end()
    assert end == len(line), line
    return fields


def line_of(log_format: LogFormat, message: str, **extra: Any) -> str:
    record = logging.LogRecord("cluster.a", logging.INFO, "", 1, "%s", (message,), None)
    vars(record).update(extra)
    return LineFormatter(log_format).format(record)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the console shows, in text and down to DEBUG."""
    stream = io.StringIO()
    with console_logs("text", logging.DEBUG, stream=stream):
        yield stream


def events(log: io.StringIO) -> list[dict[str, str]]:
    return [parse_text(line) for line in log.getvalue().splitlines()]


def test_a_line_as_text_and_as_json() -> None:
    extra = {"id": "a b", "tokens": 3, "share": 0.5, "stream": True, "code": "", "left_out": None}
    text = line_of("text", "done", **extra)
    assert re.sub(r"^time=\S+Z ", "", text) == (
        'level=info logger=cluster.a msg=done id="a b" tokens=3 share=0.5 stream=true'
    )
    event = json.loads(line_of("json", "done", **extra))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", event.pop("time"))
    assert event == {
        **{"level": "info", "logger": "cluster.a", "msg": "done", "id": "a b", "tokens": 3},
        **{"share": 0.5, "stream": True},
    }


@given(st.text(), st.text(min_size=1))
def test_no_text_forges_a_line_or_a_field(message: str, value: str) -> None:
    for log_format, parse in (("text", parse_text), ("json", json.loads)):
        line = line_of(log_format, message, given=value)  # type: ignore[arg-type]
        assert line.isascii() and line.isprintable()  # no line breaks, no escape sequences
        event = parse(line)
        assert (event["msg"], event["given"]) == (message, value)
        assert list(event) == ["time", "level", "logger", "msg", "given"]


def test_lines_of_a_request_have_its_id_and_others_none(log: io.StringIO) -> None:
    def work() -> None:
        request_context.begin_request("a\nlevel=error b", 128)
        logger.info("inside")

    thread = threading.Thread(target=work)  # a context of its own, as a task has
    thread.start()
    thread.join()
    logger.info("outside")
    inside, outside = events(log)
    assert inside["request_id"] == "alevelerrorb"
    assert "request_id" not in outside


def test_an_error_is_one_line_and_its_words_are_not_told_in_requests(log: io.StringIO) -> None:
    def fail(words: str = "SECRET\nlevel=error") -> None:
        try:
            try:
                raise KeyError(words)
            except KeyError as error:
                raise ExceptionGroup(words, [ValueError(words)]) from error
        except ExceptionGroup:
            logger.exception("it failed")

    fail()
    thread = threading.Thread(target=lambda: (request_context.begin_request("r", 9), fail()))
    thread.start()
    thread.join()
    outside, event = events(log)
    assert "ValueError: SECRET" in outside["error"]
    assert "SECRET" not in str(event)
    kinds = [line for line in event["error"].splitlines() if not line.startswith(" ")]
    assert kinds == ["KeyError", "ValueError", "ExceptionGroup"]
    assert "in fail" in event["error"]


def test_a_request_is_one_line(log: io.StringIO) -> None:
    RequestLog().on_finished(RECORD)
    (event,) = events(log)
    del event["time"]
    assert event == {
        **{"level": "info", "logger": "cluster.observability.request_log", "msg": "request"},
        **{"request_id": "r-1", "id": "chatcmpl-1", "protocol": "http", "kind": "chat"},
        **{"model": "tiny", "outcome": "ok", "finish": "length,stop", "stream": "true"},
        **{"sequences": "2", "prompt_tokens": "7", "cached_tokens": "4", "completion_tokens": "3"},
        **{"e2e_ms": "1234.6", "ttft_ms": "250.0", "queue_ms": "10.0", "prefill_ms": "240.0"},
        **{"decode_ms": "980.0", "hop_ms": "500.0", "expert_ms": "3.2", "preemptions": "0"},
        **{"replays": "1", "key": "alice"},
    }


def test_a_flood_of_refusals_is_twenty_lines_a_second(log: io.StringIO) -> None:
    now = [100.0]
    requests = RequestLog(clock=lambda: now[0])
    empty = replace(RECORD, completion_tokens=0, outcome="cancelled")
    for _ in range(500):
        requests.on_refused("r", "missing_api_key")
        requests.on_finished(empty)
        requests.on_kept("r")
    requests.on_finished(RECORD)  # work was done for it: never left out
    now[0] = 101.0
    requests.on_refused("r", "missing_api_key")
    *first, answered, last = events(log)
    assert len(first) == CHEAP_LINES_PER_S == 20
    assert answered["outcome"] == "ok"
    assert (last["msg"], last["code"], last["left_out"]) == ("refused", "missing_api_key", "1480")


def test_prompts_and_answers_only_when_asked_for(log: io.StringIO, tmp_path: Path) -> None:
    engine = FakeEngine([*ids_of("Yes."), EOS])
    tokenizer = Tokenizer(write_tokenizer(tmp_path), VOCAB_SIZE)
    backend, ended = LoggedBackend(engine, tokenizer), threading.Event()

    def on_output(output: TokenOutput) -> None:
        if output.finish_reason:
            ended.set()

    params = SamplingParams(max_tokens=9)
    submit = Submit(request_id="cmpl-1-0", prompt_ids=ids_of("Is\nit?"), params=params)
    backend.submit(submit, on_output)
    assert ended.wait(TIMEOUT_S)
    backend.abort("cmpl-1-0")  # comes after the end too, and says nothing then
    engine.close()
    warning, prompt, answer = events(log)
    assert warning["level"] == "warning" and "every prompt" in warning["msg"]
    assert (prompt["msg"], prompt["sequence"], prompt["text"]) == ("prompt", "cmpl-1-0", "Is\nit?")
    assert answer["msg"] == "answer" and answer["text"].startswith("Yes.")


@pytest.mark.parametrize(
    ("encoding", "log_format", "is_json"),
    [("TEXT", "text", False), ("TEXT", "json", True), ("JSON", "text", True)],
)
def test_in_a_replica_lines_go_into_serves_file(
    tmp_path: Path, encoding: str, log_format: LogFormat, is_json: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray 2.60 warns at import
        from ray.serve._private.logging_utils import configure_component_logger
        from ray.serve.schema import LoggingConfig
    serve = logging.getLogger("ray.serve")
    loggers = [serve, *map(logging.getLogger, ("experts", "router", "attention", "cluster"))]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    try:
        settings = LoggingConfig(encoding=encoding, log_level="WARNING", logs_dir=str(tmp_path))
        configure_component_logger(
            component_name="Ingress",
            component_id="abc",
            logging_config=settings,
            max_bytes=10**6,
            backup_count=1,
        )
        log_with_serve(log_format)
        logger.info("hello\nworld", extra={"id": "cmpl-1"})
        serve.warning("of Serve")
        serve.info("quiet")
        (path,) = tmp_path.iterdir()
        parse = json.loads if is_json else parse_text
        ours, theirs = map(parse, path.read_text().splitlines())
    finally:
        for handler in serve.handlers:
            getattr(handler, "target", handler).close()
            handler.close()
        for each, handlers, level, propagate in before:
            each.handlers, each.propagate = handlers, propagate
            each.setLevel(level)
    assert (ours["msg"], ours["id"], ours["level"]) == ("hello\nworld", "cmpl-1", "info")
    assert (theirs["msg"], theirs["logger"]) == ("of Serve", "ray.serve")
    assert ("component_id" in ours) == (encoding == "JSON")  # what Serve adds is kept


def test_files_of_all_replicas_are_followed_by_whole_lines(tmp_path: Path) -> None:
    shown = io.StringIO()
    follower = LogFollower(tmp_path / "serve", shown)  # which does not exist yet
    (tmp_path / "serve").mkdir()
    first, second = (tmp_path / "serve" / f"replica_shoal_{name}.log" for name in "ab")
    (tmp_path / "serve" / "proxy.log").write_text("not ours\n")
    first.write_text("one\ntw")
    with first.open("a") as file:
        file.write("o\n")
    second.write_text("three\nunfinished")
    follower.stop()
    assert shown.getvalue() == "one\ntwo\nthree\n"


def test_no_line_is_lost_when_a_file_is_rotated(tmp_path: Path) -> None:
    shown, log = io.StringIO(), tmp_path / "replica_shoal_a.log"
    log.write_text("one is long enough\n")
    follower = LogFollower(tmp_path, shown)
    deadline_s = time.monotonic() + TIMEOUT_S
    while not shown.getvalue():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    with log.open("a") as file:
        file.write("two\n")
    log.rename(tmp_path / "replica_shoal_a.log.1")
    log.write_text("three\n")
    follower.stop()
    assert shown.getvalue() == "one is long enough\ntwo\nthree\n"
