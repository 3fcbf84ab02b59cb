"""Shape and types of request bodies, after OpenAI's public API and vLLM's extensions to it.

Types are strict ("4" is no number, 1 is no boolean) and numbers finite. Fields nobody declared are
kept in `model_extra` and reported, see `ignored_fields`. What values mean is checked in request.py.
The gRPC front fills the same classes, so a check exists once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema

Role = Literal["system", "developer", "user", "assistant", "tool"]
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class StopAtFirstFault:
    """pydantic.FailFast, but hashable, which unions need.

    One fault is reported anyway; collecting those of a million wrong items takes seconds.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return cast(CoreSchema, {**handler(source), "fail_fast": True})


Array = Annotated[list[ItemT], StopAtFirstFault()]


class Schema(BaseModel):
    """Strict, immutable; unknown fields are kept aside."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class Nested(BaseModel):
    """Strict too, but unknown fields are dropped: nothing undeclared reaches the chat template."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(Nested):
    """What a stream carries besides text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingFields(Schema):
    """Fields that both generating endpoints have."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    n: int | None = None
    stop: str | Array[str] | None = None
    stop_token_ids: Array[int] | None = None
    allowed_token_ids: Array[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    timing: bool = False
    """Say in the answer where its time went."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout: float | None = None
    """Seconds from arrival; then 504."""
    user: str | None = None
    metadata: dict[str, Any] | None = None
    cache_salt: str | None = None
    """Prefixes are shared with requests of the same salt only, and always of one API key only."""

    # Known, and refused with a reason instead of being ignored: see request.py.
    best_of: int | None = None
    suffix: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    prompt_embeds: Any = None
    chat_template: Any = None
    kv_transfer_params: Any = None
    priority: Any = None


class TextPart(Nested):
    """One part of a message's content; only text is served."""

    type: str
    text: str | None = None


class FunctionCall(Nested):
    """What an assistant turn called."""

    name: str
    arguments: str


class ToolCall(Nested):
    """One call of an assistant turn in the conversation so far."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Nested):
    """One turn of the conversation."""

    role: Role
    content: str | Array[TextPart] | None = None
    name: str | None = None
    tool_calls: Array[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatCompletionRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    messages: Array[Message]
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Any = Field(
        default=None,
        json_schema_extra={
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        },
    )
    """Checked by hand in request.py: a union of lists answers a fault with a page of text."""
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True
    allow_special_tokens: bool = False
    """Read names of special tokens in the text as those tokens."""


class TokenizeRequest(Schema):
    """Body of POST /tokenize: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Array[Message] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    allow_special_tokens: bool = False


class DetokenizeRequest(Schema):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Array[int]
    skip_special_tokens: bool = False


def ignored_fields(body: BaseModel) -> tuple[str, ...]:
    """Names of top-level fields that this server does not know, in the order they came."""
    return tuple(body.model_extra or ())
