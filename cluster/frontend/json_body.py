"""Bytes of a request to JSON, guarded: size, depth, encoding, duplicate keys, numbers."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from cluster.errors import (
    BodyTimeout,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedMediaType,
    one_line,
    quote,
)
from cluster.limits import Limits

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
"""A string, also one that never ends: so a scan visits each byte once."""
_NOT_BRACKETS = bytes(b for b in range(256) if b not in b"[]{}")
_BRACES_TO_BRACKETS = bytes.maketrans(b"{}", b"[]")
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_json(request: Request, limits: Limits) -> Any:
    """The body of a request. Raises InvalidRequest, RequestTooLarge, UnsupportedMediaType or
    BodyTimeout."""
    _check_headers(request, limits)
    try:
        async with asyncio.timeout(limits.max_body_s):
            body = await _read(request, limits)
    except TimeoutError:
        raise BodyTimeout(f"The body took longer than {limits.max_body_s:g} s.") from None
    except ClientDisconnect:
        raise InvalidRequest("The body ended early.", code="invalid_json") from None
    return parse_json(body, limits)


def parse_json(body: bytes, limits: Limits) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, no key twice, at most so deep. Raises
    InvalidRequest; its message says at which byte."""
    _check_depth(body, limits.max_json_depth)
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The body is not valid UTF-8 at byte {error.start}.", code="invalid_utf8"
        ) from None
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        raise InvalidRequest(
            f"The body is not valid JSON at byte {offset}: {error.msg}.", code="invalid_json"
        ) from None
    except ValueError:  # Python reads no integer of more than 4300 digits
        raise InvalidRequest(
            "The body holds a number of too many digits.", code="invalid_json"
        ) from None
    if _SURROGATE_ESCAPE.search(body):
        _check_unicode(data, "")
    return data


async def _read(request: Request, limits: Limits) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limits.max_body_bytes:
            raise _too_large(limits)
    return bytes(body)


def _check_headers(request: Request, limits: Limits) -> None:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise UnsupportedMediaType(
            f"Content-Type must be application/json, not {quote(kind) if kind else 'absent'}."
        )
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"Content-Encoding {quote(encoding)} is not accepted; send the body as it is.",
            code="unsupported_content_encoding",
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.max_body_bytes:
        raise _too_large(limits)


def _too_large(limits: Limits) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {limits.max_body_bytes} bytes.")


def _check_depth(body: bytes, max_depth: int) -> None:
    """Refuse deep nesting before parsing.

    Without strings and everything but brackets, a document of depth d vanishes after removing
    all "[]" d times; each time is one pass in C.
    """
    brackets = _STRING.sub(b"", body).translate(_BRACES_TO_BRACKETS, delete=_NOT_BRACKETS)
    for _ in range(max_depth):
        rest = brackets.replace(b"[]", b"")
        if len(rest) == len(brackets):
            break  # nothing left, or unbalanced: the parser will say where
        brackets = rest
    balanced_and_deep = b"[]" in brackets
    if balanced_and_deep or brackets.count(b"[") > max_depth:
        raise InvalidRequest(
            f"The body is nested more than {max_depth} levels deep.", code="too_deep"
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InvalidRequest(
            f"The key {quote(twice)} stands twice in one object.",
            param=twice,
            code="duplicate_key",
        )
    return found


def _no_constant(name: str) -> NoReturn:
    raise InvalidRequest(f"{name} is not a JSON number.", code="invalid_json")


def _check_unicode(value: Any, path: str) -> None:
    """No half of a surrogate pair: it has no UTF-8. Raises InvalidRequest with the path."""
    if isinstance(value, str) and _SURROGATE.search(value):
        raise InvalidRequest(
            f"Invalid '{path or 'body'}': it holds half a surrogate pair.",
            param=path or None,
            code="invalid_unicode",
        )
    if isinstance(value, list):
        for i, item in enumerate(value):
            _check_unicode(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_unicode(key, path)
            _check_unicode(item, f"{path}.{one_line(key, 64)}".removeprefix("."))
