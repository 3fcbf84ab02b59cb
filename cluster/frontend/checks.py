"""Checks on the values of a request body; every one raises InvalidRequest with the field's path.

Pure functions over the schemas of openai.py, called by request.py before anything costly happens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import InvalidRequest, PermissionDenied, quote
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
)
from cluster.limits import Limits


@dataclass(frozen=True)
class Bound:
    """Closed range of a number; `above_low`: the lower end itself is excluded."""

    field: str
    low: float
    high: float
    above_low: bool = False


_BOUNDS = (
    Bound("temperature", 0, 2),
    Bound("top_p", 0, 1, above_low=True),
    Bound("top_k", -1, 2**31 - 1),
    Bound("min_p", 0, 1),
    Bound("presence_penalty", -2, 2),
    Bound("frequency_penalty", -2, 2),
    Bound("repetition_penalty", 0, 10, above_low=True),
    Bound("seed", -(2**63), 2**63 - 1),
)
_NOT_OFFERED = {
    "tools": "Tool calls are not supported by this server.",
    "tool_choice": "Tool calls are not supported by this server.",
    "functions": "Tool calls are not supported by this server.",
    "function_call": "Tool calls are not supported by this server.",
    "structured_outputs": "Structured output is not supported by this server.",
    "prompt_embeds": "Embeddings as a prompt are not supported by this server.",
    "chat_template": "A chat template in a request is refused; the model's own is used.",
    "suffix": "Text after the completion is not supported by this server.",
}
_ADMIN_ONLY = ("kv_transfer_params", "priority")


def check_number(
    field: str, value: float, low: float, high: float, above_low: bool = False
) -> None:
    """`value` within [low, high], or (low, high] if `above_low`."""
    kind = "integer" if isinstance(value, int) else "decimal"
    if kind == "decimal" and not math.isfinite(value):
        raise InvalidRequest(f"Invalid '{field}': it should be a finite number.", param=field)
    if value < low or (above_low and value == low):
        than = "greater than" if above_low else "at least"
        raise InvalidRequest(
            f"Invalid '{field}': {quote(value)} is too small, it should be {than} {low}.",
            param=field,
            code=f"{kind}_below_min_value",
        )
    if value > high:
        raise InvalidRequest(
            f"Invalid '{field}': {quote(value)} is too large, it should be at most {high}.",
            param=field,
            code=f"{kind}_above_max_value",
        )


def check_length(field: str, value: Sequence[Any] | dict[str, Any], most: int) -> None:
    """At most `most` items (or characters)."""
    if len(value) > most:
        kind = "string" if isinstance(value, str) else "array"
        unit = "characters" if isinstance(value, str) else "items"
        raise InvalidRequest(
            f"Invalid '{field}': it has {len(value)} {unit}, at most {most} are allowed.",
            param=field,
            code=f"{kind}_above_max_length",
        )


def check_not_empty(field: str, value: Sequence[Any]) -> None:
    """At least one item."""
    if not value:
        raise InvalidRequest(
            f"Invalid '{field}': it should have at least one item.", param=field, code="empty_array"
        )


def check_token_ids(field: str, ids: Sequence[Any], vocab_size: int) -> None:
    """Every item is an id of the vocabulary; the first wrong one is named."""
    for i, token in enumerate(ids):
        if type(token) is not int:
            raise InvalidRequest(
                f"Invalid '{field}[{i}]': it should be an integer.",
                param=f"{field}[{i}]",
                code="invalid_type",
            )
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"Invalid '{field}[{i}]': {quote(token)} is not a token id, they run from 0 to"
                f" {vocab_size - 1}.",
                param=f"{field}[{i}]",
            )


def check_sampling(body: SamplingFields, vocab_size: int, context: int, limits: Limits) -> None:
    """Everything both endpoints share."""
    _check_offered(body)
    for bound in _BOUNDS:
        value = getattr(body, bound.field)
        if value is not None:
            check_number(bound.field, value, bound.low, bound.high, bound.above_low)
    if body.n is not None:
        check_number("n", body.n, 1, limits.max_choices)
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _unsupported("best_of", "Only best_of = n is supported by this server.")
    _check_max_tokens(body, context)
    _check_stop(body, limits)
    _check_token_lists(body, vocab_size, limits)
    _check_logit_bias(body, vocab_size, limits)
    _check_labels(body, limits)
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(
            "'stream_options' is allowed only with 'stream': true.", param="stream_options"
        )
    if body.timeout is not None:
        check_number("timeout", body.timeout, 0, limits.max_timeout_s)


def check_chat_logprobs(body: ChatCompletionRequest, limits: Limits) -> None:
    """`top_logprobs` needs `logprobs`."""
    if body.top_logprobs is not None:
        check_number("top_logprobs", body.top_logprobs, 0, limits.max_top_logprobs)
        if not body.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is allowed only with 'logprobs': true.", param="top_logprobs"
            )


def check_completion_logprobs(body: CompletionRequest, limits: Limits) -> None:
    """A count here, not a switch."""
    if body.logprobs is not None:
        check_number("logprobs", body.logprobs, 0, limits.max_top_logprobs)


def _check_offered(body: SamplingFields) -> None:
    for field, reason in _NOT_OFFERED.items():
        if getattr(body, field) is not None:
            raise _unsupported(field, reason)
    wanted = body.response_format
    if wanted is not None and wanted != {"type": "text"}:
        raise _unsupported("response_format", "Only {'type': 'text'} is supported by this server.")
    for field in _ADMIN_ONLY:
        if getattr(body, field) is not None:
            raise PermissionDenied(f"'{field}' is not open to clients.", param=field)


def _unsupported(field: str, reason: str) -> InvalidRequest:
    return InvalidRequest(reason, param=field, code="unsupported_parameter")


def _check_max_tokens(body: SamplingFields, context: int) -> None:
    field, value = max_tokens_field(body)
    if value is not None:
        echo_only = isinstance(body, CompletionRequest) and body.echo
        check_number(field, value, 0 if echo_only else 1, context)
    if body.min_tokens is not None:
        check_number("min_tokens", body.min_tokens, 0, context if value is None else value)


def max_tokens_field(body: SamplingFields) -> tuple[str, int | None]:
    """The name and value by which the client bounded the answer; the newer name wins."""
    if isinstance(body, ChatCompletionRequest) and body.max_completion_tokens is not None:
        return "max_completion_tokens", body.max_completion_tokens
    return "max_tokens", body.max_tokens


def _check_stop(body: SamplingFields, limits: Limits) -> None:
    if body.stop is None:
        return
    strings = [body.stop] if isinstance(body.stop, str) else body.stop
    check_length("stop", strings, limits.max_stop_strings)
    for i, text in enumerate(strings):
        field = "stop" if isinstance(body.stop, str) else f"stop[{i}]"
        if not text:
            raise InvalidRequest(f"Invalid '{field}': it should not be empty.", param=field)
        check_length(field, text, limits.max_stop_chars)


def _check_token_lists(body: SamplingFields, vocab_size: int, limits: Limits) -> None:
    if body.stop_token_ids is not None:
        check_length("stop_token_ids", body.stop_token_ids, limits.max_stop_token_ids)
        check_token_ids("stop_token_ids", body.stop_token_ids, vocab_size)
    if body.allowed_token_ids is not None:
        check_not_empty("allowed_token_ids", body.allowed_token_ids)
        check_length("allowed_token_ids", body.allowed_token_ids, limits.max_allowed_token_ids)
        check_token_ids("allowed_token_ids", body.allowed_token_ids, vocab_size)


def _check_logit_bias(body: SamplingFields, vocab_size: int, limits: Limits) -> None:
    if body.logit_bias is None:
        return
    check_length("logit_bias", body.logit_bias, limits.max_logit_bias)
    for key, value in body.logit_bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
            raise InvalidRequest(
                f"Invalid 'logit_bias': {quote(key)} is not a token id, they run from 0 to"
                f" {vocab_size - 1}.",
                param="logit_bias",
            )
        field = f"logit_bias.{key}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidRequest(
                f"Invalid '{field}': it should be a number.", param=field, code="invalid_type"
            )
        check_number(field, value, -limits.max_abs_logit_bias, limits.max_abs_logit_bias)


def _check_labels(body: SamplingFields, limits: Limits) -> None:
    check_length("user", body.user or "", limits.max_user_chars)
    check_length("cache_salt", body.cache_salt or "", limits.max_cache_salt_chars)
    if body.cache_salt == "":
        raise InvalidRequest("Invalid 'cache_salt': it should not be empty.", param="cache_salt")
    check_length("metadata", body.metadata or {}, limits.max_metadata_entries)
    for key, value in (body.metadata or {}).items():
        if not isinstance(value, str):
            raise InvalidRequest(
                f"Invalid 'metadata.{key}': it should be a string.",
                param=f"metadata.{key}",
                code="invalid_type",
            )
        check_length("metadata", key, limits.max_metadata_key_chars)
        check_length(f"metadata.{key}", value, limits.max_metadata_value_chars)
