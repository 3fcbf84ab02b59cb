"""The one validated request that both fronts build and the service runs."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attention.messages import SamplingParams
from cluster.errors import InvalidRequest
from cluster.frontend.checks import check_length, check_not_empty, check_token_ids, max_tokens_field
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    SamplingFields,
    StreamOptions,
)
from cluster.limits import Limits

COMPLETION_MAX_TOKENS = 16
"""Of /v1/completions when none is given: the default of OpenAI's API."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What requests are checked against."""

    name: str
    vocab_size: int
    context_tokens: int
    """Prompt and answer together."""
    aliases: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    """Used where a request leaves them out: generation_config.json of the checkpoint."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that requests may use."""
        return (self.name, *self.aliases)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Ids of one prompt; `text` as the client wrote it, None if it sent ids or a conversation."""

    ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Everything that was asked for, checked and with all defaults filled in."""

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    params: tuple[SamplingParams, ...]
    """One a prompt: `max_tokens` depends on how much context the prompt leaves."""
    num_choices: int = 1
    """n: answers a prompt."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False
    is_chat: bool = False
    timing: bool = False
    """The answer says where its time went."""
    cache_salt: str = ""
    """Blocks of prompts are shared with requests of the same one."""
    deadline: float | None = None
    """Moment on the service's clock."""
    ignored: tuple[str, ...] = ()
    """Fields of the body that nobody reads."""
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_sequences(self) -> int:
        """Answers in all: prompts x n."""
        return len(self.prompts) * self.num_choices

    @property
    def min_tokens(self) -> int:
        """Stop strings are looked for behind this many tokens."""
        return self.params[0].min_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether answers carry log probabilities."""
        return self.params[0].logprobs is not None

    def sequence(self, index: int) -> tuple[Prompt, SamplingParams]:
        """Prompt and parameters of one answer: n sampled answers have n consecutive seeds."""
        prompt, choice = divmod(index, self.num_choices)
        params = self.params[prompt]
        if params.seed is not None and choice:
            params = params.model_copy(update={"seed": (params.seed + choice) % 2**63})
        return self.prompts[prompt], params


def prompt_inputs(
    body: CompletionRequest, model: ModelInfo, limits: Limits
) -> list[str] | list[list[int]]:
    """`prompt` as a list of texts or of id lists, whichever of its four forms it came in."""
    prompt = body.prompt
    if prompt is None:
        raise InvalidRequest(
            "Missing required parameter: 'prompt'.",
            param="prompt",
            code="missing_required_parameter",
        )
    if isinstance(prompt, str):
        return _texts([prompt], "prompt")
    if not isinstance(prompt, list):
        raise _prompt_type("prompt")
    check_not_empty("prompt", prompt)
    if isinstance(prompt[0], str):
        check_length("prompt", prompt, limits.max_prompts)
        return _texts(prompt, "prompt[{}]")
    if isinstance(prompt[0], list):
        check_length("prompt", prompt, limits.max_prompts)
        return [_ids(item, f"prompt[{i}]", model) for i, item in enumerate(prompt)]
    return [_ids(prompt, "prompt", model)]


def build_request(
    body: SamplingFields,
    prompts: Sequence[Prompt],
    model: ModelInfo,
    *,
    deadline: float | None = None,
    seed: int | None = None,
    key_name: str = "",
    ignored: tuple[str, ...] = (),
) -> GenerateRequest:
    """A checked body and its tokenised prompts as a request. `seed`: for a body that samples
    without one; None draws it. `key_name`: of the API key, "" without keys. Raises InvalidRequest
    if a prompt leaves no room in the context."""
    chat = isinstance(body, ChatCompletionRequest)
    options = body.stream_options or StreamOptions()
    params = _sampling_params(body, model, seed)
    return GenerateRequest(
        request_id=("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
        model=body.model or model.name,
        prompts=tuple(prompts),
        params=tuple(_fit(params, body, prompt, model) for prompt in prompts),
        num_choices=body.n or 1,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        include_stop=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        echo=isinstance(body, CompletionRequest) and body.echo,
        stream=bool(body.stream),
        include_usage=options.include_usage,
        continuous_usage=options.continuous_usage_stats,
        return_token_ids=body.return_token_ids,
        is_chat=chat,
        timing=body.timing,
        cache_salt=_cache_salt(key_name, body.cache_salt or ""),
        deadline=deadline,
        ignored=ignored,
    )


def context_error(model: ModelInfo, param: str, found: str) -> InvalidRequest:
    """The prompt does not fit. Proxies look for the phrase "maximum context length"."""
    return InvalidRequest(
        f"This model's maximum context length is {model.context_tokens} tokens. However, your"
        f" {param} resulted in {found}. Please reduce its length.",
        param=param,
        code="context_length_exceeded",
    )


def _cache_salt(key_name: str, given: str) -> str:
    """What a client learns of the cache (counts, times) it learns of its own API key's prompts."""
    return f"{key_name} {given}" if key_name or given else ""  # names have no spaces


def _texts(prompts: list[Any], field_format: str) -> list[str]:
    for i, text in enumerate(prompts):
        field_name = field_format.format(i)
        if not isinstance(text, str):
            raise _prompt_type(field_name)
        if not text:
            raise InvalidRequest(f"Invalid '{field_name}': it is empty.", param=field_name)
    return prompts


def _ids(ids: Any, field_name: str, model: ModelInfo) -> list[int]:
    if not isinstance(ids, list):
        raise _prompt_type(field_name)
    check_not_empty(field_name, ids)
    if len(ids) > model.context_tokens:
        raise context_error(model, "prompt", f"{len(ids)} tokens")
    check_token_ids(field_name, ids, model.vocab_size)
    return ids


def _prompt_type(field_name: str) -> InvalidRequest:
    return InvalidRequest(
        f"Invalid '{field_name}': a prompt is a string, an array of strings, an array of token ids"
        " or an array of arrays of token ids.",
        param=field_name,
        code="invalid_type",
    )


def _sampling_params(
    body: SamplingFields, model: ModelInfo, default_seed: int | None
) -> SamplingParams:
    temperature = model.temperature if body.temperature is None else body.temperature
    seeds = (body.seed, default_seed, secrets.randbits(63))
    seed = next(seed for seed in seeds if seed is not None) if temperature > 0 else None
    return SamplingParams(
        min_tokens=body.min_tokens or 0,
        temperature=temperature,
        top_p=model.top_p if body.top_p is None else body.top_p,
        top_k=-1 if body.top_k is None else body.top_k,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias={int(token): float(bias) for token, bias in (body.logit_bias or {}).items()},
        seed=seed,
        logprobs=_num_logprobs(body),
        prompt_logprobs=_num_logprobs(body) if getattr(body, "echo", False) else None,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        ignore_eos=body.ignore_eos,
    )


def _num_logprobs(body: SamplingFields) -> int | None:
    """0: of the chosen token only."""
    if isinstance(body, ChatCompletionRequest):
        return (body.top_logprobs or 0) if body.logprobs else None
    return body.logprobs if isinstance(body, CompletionRequest) else None


def _fit(
    params: SamplingParams, body: SamplingFields, prompt: Prompt, model: ModelInfo
) -> SamplingParams:
    """`params` with as many tokens as were asked for and the context has left."""
    _, wanted = max_tokens_field(body)
    if wanted is None and isinstance(body, CompletionRequest):
        wanted = COMPLETION_MAX_TOKENS
    param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
    if not prompt.ids:
        raise InvalidRequest(f"Invalid '{param}': it has no tokens.", param=param)
    left = model.context_tokens - len(prompt.ids)
    if left < (0 if wanted == 0 else 1):
        raise context_error(model, param, f"{len(prompt.ids)} tokens")
    max_tokens = left if wanted is None else min(wanted, left)
    return params.model_copy(
        update={"max_tokens": max_tokens, "min_tokens": min(params.min_tokens, max_tokens)}
    )
