"""Deltas to the objects of OpenAI's API: whole answers and chunks of streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.frontend.choice import Delta, Likely, TokenText
from cluster.frontend.generation import Generation
from cluster.frontend.observation import Usage
from cluster.frontend.request import GenerateRequest

Json = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Object names of an endpoint. The two differ in little more; everything else is shared."""

    whole: str
    chunk: str


CHAT = Shape("chat.completion", "chat.completion.chunk")
COMPLETION = Shape("text_completion", "text_completion")


def envelope(request: GenerateRequest, object_name: str, fingerprint: str | None) -> Json:
    """What every object of a request has in common."""
    return {
        "id": request.request_id,
        "object": object_name,
        "created": request.created,
        "model": request.model,
        "system_fingerprint": fingerprint,
    }


def usage_json(usage: Usage) -> Json:
    """Token counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def timing_parts(generation: Generation) -> dict[str, float]:
    """Where the time of a finished request went, milliseconds. hop_share: of the time that its
    steps took, both on the clock of the worker."""
    timing, total_s = generation.timing, generation.observation.e2e_s
    return {
        "queue_ms": 1e3 * timing.queue_s,
        "prefill_ms": 1e3 * timing.prefill_s,
        "decode_ms": 1e3 * timing.decode_s,
        "hop_ms": 1e3 * timing.hop_s,
        "hop_share": timing.hop_s / timing.step_s if timing.step_s else 0.0,
        "expert_ms": timing.expert_ms,
        "total_ms": 1e3 * total_s,
    }


def timing_json(generation: Generation) -> Json:
    """The field that says it; absent unless it was asked for."""
    if not generation.request.timing:
        return {}
    return {"timing": {name: round(part, 4) for name, part in timing_parts(generation).items()}}


def timing_header(generation: Generation) -> str:
    """The same as one line, in the syntax of the header Server-Timing."""
    parts = timing_parts(generation)
    names = ("queue", "prefill", "decode", "hop", "expert", "total")
    return ", ".join(f"{name};dur={parts[f'{name}_ms']:.3f}" for name in names)


async def whole_answer(generation: Generation, shape: Shape, fingerprint: str | None) -> Json:
    """Run a request to its end and put its choices together."""
    request = generation.request
    deltas: list[list[Delta]] = [[] for _ in range(request.num_sequences)]
    async for delta in generation:
        deltas[delta.index].append(delta)
    choices = [_whole_choice(_joined(parts), request, shape) for parts in deltas]
    return {
        **envelope(request, shape.whole, fingerprint),
        "choices": choices,
        "usage": usage_json(generation.usage),
        **renormalised_json(generation.renormalised),
        **timing_json(generation),
    }


def renormalised_json(happened: bool) -> Json:
    """The field that says that experts were left out; absent unless it happened."""
    return {"renormalised": True} if happened else {}


def chunk_choice(delta: Delta, request: GenerateRequest, shape: Shape) -> Json:
    """One piece of a choice of a stream; `finish_reason` is left to the last chunk."""
    choice: Json = {"index": delta.index, "finish_reason": None}
    if shape is CHAT:
        choice["delta"] = {"content": delta.text}
    else:
        choice["text"] = delta.text
    choice["logprobs"] = _logprobs(delta.logprobs, shape)
    if request.return_token_ids:
        choice["token_ids"] = delta.token_ids
    return choice


def role_choice(index: int) -> Json:
    """The first piece of a chat choice."""
    delta = {"role": "assistant", "content": ""}
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def finish_choice(delta: Delta, shape: Shape) -> Json:
    """The last piece of a choice."""
    nothing: Json = {"delta": {}} if shape is CHAT else {"text": ""}
    return {
        "index": delta.index,
        **nothing,
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }


def _joined(parts: Sequence[Delta]) -> Delta:
    """All Deltas of a choice as one."""
    logprobs = None
    if parts[0].logprobs is not None:
        logprobs = [token for part in parts for token in part.logprobs or ()]
    return Delta(
        index=parts[0].index,
        text="".join(part.text for part in parts),
        token_ids=[token for part in parts for token in part.token_ids],
        logprobs=logprobs,
        finish_reason=parts[-1].finish_reason,
        stop_reason=parts[-1].stop_reason,
    )


def _whole_choice(answer: Delta, request: GenerateRequest, shape: Shape) -> Json:
    choice: Json = {"index": answer.index}
    if shape is CHAT:
        choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
    else:
        choice["text"] = answer.text
    choice["logprobs"] = _logprobs(answer.logprobs, shape)
    choice["finish_reason"] = answer.finish_reason
    choice["stop_reason"] = answer.stop_reason
    if request.return_token_ids:
        prompt, _ = request.sequence(answer.index)
        choice["token_ids"] = answer.token_ids
        choice["prompt_token_ids"] = list(prompt.ids)
    return choice


def _logprobs(tokens: Sequence[TokenText] | None, shape: Shape) -> Json | None:
    if tokens is None:
        return None
    if shape is CHAT:
        return {"content": [_chat_token(token) for token in tokens], "refusal": None}
    return {
        "tokens": [token.token.text for token in tokens],
        "token_logprobs": [token.token.logprob for token in tokens],
        "top_logprobs": [_by_text(token) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _chat_token(token: TokenText) -> Json:
    return {**_likely(token.token), "top_logprobs": [_likely(other) for other in token.top]}


def _likely(token: Likely) -> Json:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.shown)}


def _by_text(token: TokenText) -> dict[str, float | None] | None:
    """The most likely tokens and the chosen one; of two that look alike the likelier stays."""
    if token.token.logprob is None:
        return None
    found: dict[str, float | None] = {}
    for other in (*token.top, token.token):
        found.setdefault(other.text, other.logprob)
    return found
