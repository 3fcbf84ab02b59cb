"""Structured logs: one line an event, as text (key=value) or as JSON.

A line has `time` (UTC), `level`, `logger`, `msg`, the id of the request it is about, and whatever
the event tells besides: the attributes that a call gives as `extra`.

What clients send stays on its line: every value is escaped like a JSON string. Nothing logs prompts
or answers; and since the words of an unforeseen exception might quote them, of one that is raised
for a request only kinds and lines of code are told, unless prompts may be logged.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import IO, Any, Literal

from cluster.frontend.request_context import request_id

LogFormat = Literal["text", "json"]
PACKAGES = ("experts", "router", "attention", "cluster")
MAX_CAUSES = 8
_to_json = json.JSONEncoder(default=str).encode
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""Printable ASCII that needs no quotes: neither space, quote, backslash nor equals sign."""


class RequestIdFilter(logging.Filter):
    """Gives every record of a task that works for a request the request's id; drops nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        found = request_id.get()
        if found:
            record.request_id = found
        return True


class LineFormatter(logging.Formatter):
    """A record as one line."""

    def __init__(self, log_format: LogFormat, log_prompts: bool = False) -> None:
        super().__init__()
        self._to_line = _json_line if log_format == "json" else _text_line
        self._log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, Any] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD and not name.startswith("_") and value not in (None, ""):
                event[name] = value
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            in_full = self._log_prompts or "request_id" not in event
            lines = traceback.format_exception(error) if in_full else _without_words(error)
            event["error"] = "".join(lines).rstrip()
        return self._to_line(event)


@contextmanager
def console_logs(
    log_format: LogFormat,
    level: int = logging.INFO,
    log_prompts: bool = False,
    stream: IO[str] | None = None,
) -> Iterator[None]:
    """Lines of this process at `level` and above on `stream` (standard error) for the block."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(log_format, log_prompts))
    handler.addFilter(RequestIdFilter())
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    logging.getLogger().addHandler(handler)
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)


def log_with_serve(log_format: LogFormat, log_prompts: bool = False) -> None:
    """In a replica of Ray Serve: our events into its log file, whatever level Serve itself logs at.

    Serve's own lines there take our form too. It is JSON if Serve is told to log as JSON, whatever
    `log_format` says.
    """
    serve = logging.getLogger("ray.serve")
    targets = [getattr(handler, "target", handler) for handler in serve.handlers]
    if any(type(target.formatter).__name__ == "JSONFormatter" for target in targets):
        log_format = "json"
    for handler, target in zip(serve.handlers, targets, strict=True):
        target.setFormatter(LineFormatter(log_format, log_prompts))
        handler.addFilter(RequestIdFilter())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = list(serve.handlers)
        logger.setLevel(logging.INFO)


def _utc(time_s: float) -> str:
    moment = datetime.fromtimestamp(time_s, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _json_line(event: dict[str, Any]) -> str:
    return _to_json(event).replace("\x7f", "\\u007f")


def _text_line(event: dict[str, Any]) -> str:
    return " ".join(f"{name}={_quoted(value)}" for name, value in event.items())


def _quoted(value: Any) -> str:
    """Bare if nothing in it could be taken for something else, otherwise a JSON string."""
    text = value if isinstance(value, str) else _to_json(value)
    return text if _PLAIN.fullmatch(text) else _to_json(text).replace("\x7f", "\\u007f")


def _without_words(error: BaseException, depth: int = MAX_CAUSES) -> Iterator[str]:
    """A traceback as Python's own, causes first, of every exception only its kind."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    parts = getattr(error, "exceptions", ())
    for inner in (cause, *parts) if depth else ():
        if inner is not None:
            yield from _without_words(inner, depth - 1)
    yield from traceback.format_tb(error.__traceback__)
    yield f"{type(error).__qualname__}\n"
