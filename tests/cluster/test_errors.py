"""The error table: complete, valid on both fronts; what leaves the server is small and plain."""

from __future__ import annotations

from http import HTTPStatus

import grpc
import pytest

from cluster import errors
from cluster.errors import TABLE, InvalidRequest, MethodNotAllowed, ShoalError

OPENAI_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
}


def subclasses(cls: type[ShoalError]) -> set[type[ShoalError]]:
    below = set(cls.__subclasses__())
    return below.union(*(subclasses(c) for c in below)) if below else below


def test_every_error_has_a_row() -> None:
    import cluster.frontend.grpc_server
    import cluster.frontend.http_server  # noqa: F401 - both fronts may define errors

    assert subclasses(ShoalError) == set(TABLE)


@pytest.mark.parametrize("cls", TABLE, ids=lambda c: c.__name__)
def test_row_is_known_to_http_grpc_and_openai(cls: type[ShoalError]) -> None:
    kind = TABLE[cls]
    assert 400 <= HTTPStatus(kind.http_status) < 600
    assert hasattr(grpc.StatusCode, kind.grpc_code)
    assert kind.openai_type in OPENAI_TYPES
    assert (kind.openai_type == "server_error") == (kind.http_status >= 500)
    assert cls.default_code.replace("_", "").isalpha()


def test_body_names_message_type_param_and_code() -> None:
    error = InvalidRequest("Too hot.", param="temperature", code="decimal_above_max_value")
    assert errors.error_body(error) == {
        "error": {
            "message": "Too hot.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": "decimal_above_max_value",
        }
    }


def test_message_is_one_short_line_without_addresses() -> None:
    error = InvalidRequest("a\nb\x00c \u2028 at 0x7f3a9c0d1e20 " + "漢" * 10_000, param="p" * 9000)
    body = str(errors.error_body(error))
    assert error.message.startswith("a b c   at 0x.. 漢")
    assert error.message.isprintable()
    assert len(body.encode()) <= 4096


def test_headers_say_when_to_retry_and_what_is_allowed() -> None:
    assert errors.error_headers(errors.ServerOverloaded("Full.", retry_after_s=3)) == {
        "Retry-After": "3"
    }
    assert errors.error_headers(MethodNotAllowed("No.", allow="POST")) == {"Allow": "POST"}
    assert errors.error_headers(InvalidRequest("No.")) == {}


def test_quote_cuts_and_keeps_one_line() -> None:
    assert errors.quote("a\nb") == "'a\\nb'"
    assert len(errors.quote("x" * 10_000)) == 60
