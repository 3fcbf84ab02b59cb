"""Checks on a conversation; every one raises InvalidRequest with the field's path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.errors import InvalidRequest, quote
from cluster.frontend.checks import check_length, check_not_empty
from cluster.frontend.openai import Message
from cluster.limits import Limits

_TEMPLATE_SWITCHES = ("thinking", "enable_thinking")


def check_messages(messages: Sequence[Message], limits: Limits) -> None:
    """A conversation that makes sense: text only, tool results answer calls that were made."""
    check_not_empty("messages", messages)
    check_length("messages", messages, limits.max_messages)
    called: set[str] = set()
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        called.update(call.id for call in message.tool_calls or ())
        _check_content(message, field, limits)
        if message.name is not None:
            check_length(f"{field}.name", message.name, limits.max_name_chars)
        if message.role == "tool" and message.tool_call_id not in called:
            raise InvalidRequest(
                f"Invalid '{field}.tool_call_id': a tool message answers a call of an earlier"
                " assistant message by its id.",
                param=f"{field}.tool_call_id",
                code="invalid_value" if message.tool_call_id else "missing_required_parameter",
            )
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest(
                f"Invalid '{field}.tool_calls': only assistant messages have them.",
                param=f"{field}.tool_calls",
            )


def check_template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, bool]:
    """The switches a client may give the chat template: an allow-list of booleans."""
    for name, value in (kwargs or {}).items():
        field = "chat_template_kwargs"
        if name not in _TEMPLATE_SWITCHES:
            raise InvalidRequest(
                f"Invalid '{field}': {quote(name)} is not one of {', '.join(_TEMPLATE_SWITCHES)}.",
                param=field,
            )
        if not isinstance(value, bool):
            raise InvalidRequest(
                f"Invalid '{field}.{name}': it should be a boolean.",
                param=f"{field}.{name}",
                code="invalid_type",
            )
    return dict(kwargs or {})


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation as chat templates expect it: plain dicts, content one string.

    Text parts are joined by line breaks, as vLLM does.
    """
    turns = [message.model_dump(exclude_none=True) for message in messages]
    for turn in turns:
        if isinstance(turn.get("content"), list):
            turn["content"] = "\n".join(part["text"] for part in turn["content"])
    return turns


def _check_content(message: Message, field: str, limits: Limits) -> None:
    content = message.content
    if content is None:
        if message.role == "assistant" and message.tool_calls:
            return
        raise InvalidRequest(
            f"Invalid '{field}.content': it should be a string or an array of text parts.",
            param=f"{field}.content",
            code="invalid_type"
            if "content" in message.model_fields_set
            else "missing_required_parameter",
        )
    if isinstance(content, str):
        return
    check_not_empty(f"{field}.content", content)
    check_length(f"{field}.content", content, limits.max_content_parts)
    for j, part in enumerate(content):
        if part.type != "text":
            raise InvalidRequest(
                f"Invalid '{field}.content[{j}].type': {quote(part.type)} is not supported, this"
                " model reads text only.",
                param=f"{field}.content[{j}].type",
                code="unsupported_content_type",
            )
        if part.text is None:
            raise InvalidRequest(
                f"Missing required parameter: '{field}.content[{j}].text'.",
                param=f"{field}.content[{j}].text",
                code="missing_required_parameter",
            )
