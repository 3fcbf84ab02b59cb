"""Between shoal.v1 messages and the schemas that the HTTP front fills too.

An incoming message becomes the JSON object an HTTP client would have sent, so that shape, types
and values are checked by the same code and reported by the same names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.message import Message

from cluster.frontend.choice import Delta, Likely, TokenText
from cluster.frontend.expert_load import ExpertLoad
from cluster.frontend.generation import Generation
from cluster.frontend.observation import Usage
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from cluster.frontend.responses import timing_parts
from cluster.frontend.schema_errors import parse_body
from cluster.protos import inference_pb2 as pb


def completion_body(request: pb.GenerateRequest) -> CompletionRequest:
    """Raises InvalidRequest."""
    data = _scalars(request, "sampling", "text", "token_ids") | _scalars(request.sampling)
    which = request.WhichOneof("prompt")
    if which is not None:
        data["prompt"] = request.text if which == "text" else list(request.token_ids.ids)
    return parse_body(CompletionRequest, data)


def chat_body(request: pb.ChatRequest) -> ChatCompletionRequest:
    """Raises InvalidRequest."""
    data = _scalars(request, "sampling", "messages") | _scalars(request.sampling)
    if "logprobs" in data:
        data["top_logprobs"], data["logprobs"] = data["logprobs"], True
    data["messages"] = _turns(request.messages)
    return parse_body(ChatCompletionRequest, data)


def tokenize_body(request: pb.TokenizeRequest) -> TokenizeRequest:
    """Raises InvalidRequest."""
    data = _scalars(request, "text", "messages")
    if request.HasField("text"):
        data["prompt"] = request.text
    if request.messages:
        data["messages"] = _turns(request.messages)
    return parse_body(TokenizeRequest, data)


def detokenize_body(request: pb.DetokenizeRequest) -> DetokenizeRequest:
    """Raises InvalidRequest."""
    data = _scalars(request, "token_ids") | {"tokens": list(request.token_ids)}
    return parse_body(DetokenizeRequest, data)


def delta_message(delta: Delta) -> pb.Delta:
    """What one answer has new."""
    message = pb.Delta(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprob(token) for token in delta.logprobs or ()],
        finish_reason=delta.finish_reason or "",
    )
    if isinstance(delta.stop_reason, str):
        message.stop_string = delta.stop_reason
    elif delta.stop_reason is not None:
        message.stop_token_id = delta.stop_reason
    return message


def usage_message(usage: Usage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def timing_message(generation: Generation) -> pb.Timing | None:
    """Where its time went, if it was asked for."""
    return pb.Timing(**timing_parts(generation)) if generation.request.timing else None


def load_message(load: ExpertLoad) -> pb.ExpertLoad:
    """Rows, holders and balance of every layer."""
    return pb.ExpertLoad(
        model=load.model,
        epoch=load.epoch,
        window_s=load.reply.window_s,
        recent_s=load.reply.recent_s,
        workers=[
            pb.WorkerLoad(
                worker_id=worker.worker_id,
                rows=sum(worker.rows),
                recent_rows=sum(worker.recent_rows),
            )
            for worker in load.reply.workers
        ],
        layers=[
            pb.LayerLoad(
                layer=layer,
                balancedness=load.balance[i].workers,
                expert_balancedness=load.balance[i].experts,
                experts=[
                    pb.ExpertRows(
                        expert=expert,
                        rows=rows,
                        recent_rows=recent_rows,
                        replicas=len(holders),
                        holders=holders,
                    )
                    for expert, rows, recent_rows, holders in load.experts(i)
                ],
            )
            for i, layer in enumerate(load.reply.layers)
        ],
    )


def _scalars(message: Message, *without: str) -> dict[str, Any]:
    """The fields that are set, maps as dicts and repeated ones as lists."""
    data: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.name in without:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            data[field.name] = {str(key): item for key, item in value.items()}
        else:
            data[field.name] = list(value) if field.is_repeated else value
    return data


def _turns(messages: Sequence[pb.ChatMessage]) -> list[dict[str, Any]]:
    turns = []
    for message in messages:
        turn = _scalars(message, "tool_calls")
        if message.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        turns.append({"role": message.role, **turn})
    return turns


def _logprob(token: TokenText) -> pb.TokenLogprob:
    return pb.TokenLogprob(token=_likely(token.token), top=[_likely(t) for t in token.top])


def _likely(token: Likely) -> pb.LikelyToken:
    return pb.LikelyToken(text=token.text, shown=token.shown, logprob=token.logprob)
