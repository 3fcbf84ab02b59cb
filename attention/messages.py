"""What crosses the boundary between an ingress and an attention worker.

A message travels as the JSON body of a CONTROL frame; `parse_message` picks the class by `type`.
Token ids only: no text ever reaches this tier.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from attention.trace_context import MAX_STATE_CHARS

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
FinishReason = Literal["stop", "length", "abort", "error", "lost", "unavailable"]
"""lost: the worker is gone, the request can be replayed on another. unavailable: experts
that it needs stayed away past its deadline, or past the router's limit if it has none."""
MAX_REQUEST_ID_LENGTH = 256
TRACEPARENT = "^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?$"
MAX_LOGPROBS = 128
"""An upper bound of the wire; the front end's own limit is lower."""


class Message(BaseModel):
    """Frozen, and unknown keys are refused: a peer of another version fails loudly."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SamplingParams(Message):
    """How to choose the next token; the order of the steps is in sampler.py."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """New tokens at most, replayed ones too. None: to the end of the context; 0: prompt only."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """Until this many new tokens the end-of-sequence and stop ids cannot be chosen."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy: the largest logit, the lowest id among equals."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    """-1 and 0 turn it off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    logit_bias: dict[TokenId, float] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    """The ingress sets it whenever temperature > 0 (at random if the user gave none); None is 0."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """None: off; 0: of the chosen token; n: and of the n most likely ones."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """The same for the tokens of the prompt (`echo`); needs a prefill without prefix-cache hits."""
    stop_token_ids: tuple[TokenId, ...] = ()
    allowed_token_ids: tuple[TokenId, ...] | None = None
    ignore_eos: bool = False


class Submit(Message):
    """Start a request, or replay one that another worker had begun.

    `emitted_ids` are tokens the client already has: they are prefilled behind the prompt and
    sampling goes on at position `len(emitted_ids)` of the same seed.
    """

    type: Literal["submit"] = "submit"
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID_LENGTH)]
    prompt_ids: Annotated[list[TokenId], Field(min_length=1)]
    params: SamplingParams = SamplingParams()
    emitted_ids: list[TokenId] = Field(default_factory=list)
    deadline_s: Annotated[float, Field(gt=0)] | None = None
    """Seconds from arrival after which the request fails; None: no limit."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Prefix-cache blocks are shared only among requests of equal salt."""
    traceparent: Annotated[str, Field(pattern=TRACEPARENT)] = ""
    """W3C trace context of the span that the worker's spans belong to; "" for none."""
    tracestate: Annotated[str, Field(max_length=MAX_STATE_CHARS)] = ""
    """Its second header."""


class Abort(Message):
    """Give a request up. An unknown id is no error: it may have finished meanwhile."""

    type: Literal["abort"] = "abort"
    request_id: Annotated[str, Field(min_length=1, max_length=MAX_REQUEST_ID_LENGTH)]


class StatsRequest(Message):
    """Ask for one `Stats` message on the same connection."""

    type: Literal["stats"] = "stats"


class TokenLogprob(Message):
    """Natural log of the probability under the model: log_softmax of the unmodified logits."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = Field(default_factory=list)
    """(id, logprob) of the most likely tokens, best first, lowest id first among equals."""


class TokenOutput(Message):
    """What a step gave a request. The last one has a `finish_reason`; no request ends without."""

    request_id: str
    token_ids: list[int] = Field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    """One entry a token of `token_ids`, if asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The id of `stop_token_ids` that ended it (in `token_ids` too); None for the model's own."""
    error: str | None = None
    """For finish_reason "error" and "unavailable": one line to show to a client."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """In the first output, if asked for: one entry a prompt token, None for the first."""
    num_cached_tokens: int = 0
    """Prompt tokens whose cache blocks were shared instead of computed. Only in the first output,
    and not when a request that has emitted_ids is replayed: adding them up counts each once."""
    renormalised: bool = False
    """Some expert of some layer was left out in this output's step, the others' weights scaled."""
    prefill_us: Annotated[int, Field(ge=0)] | None = None
    """In the first output with a token: from its first step to that token."""
    step_us: Annotated[int, Field(ge=0)] = 0
    """So far: what the steps it took part in took."""
    hop_us: Annotated[int, Field(ge=0)] = 0
    """So far: what these steps spent on the way to routed experts and back."""
    expert_us: Annotated[int, Field(ge=0)] = 0
    """So far: its share, by tokens, of what expert workers computed for them."""
    num_preemptions: Annotated[int, Field(ge=0)] | None = None
    """So far; None: none."""


class StepOutputs(Message):
    """All outputs of one step for one ingress connection."""

    type: Literal["outputs"] = "outputs"
    outputs: list[TokenOutput]


class Stats(Message):
    """Load of a worker at one moment; counters grow from its start."""

    type: Literal["stats_reply"] = "stats_reply"
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Prompt tokens of the waiting requests."""
    kv_blocks_total: int
    kv_blocks_free: int
    """Blocks no request holds, cached ones included."""
    kv_blocks_cached: int
    """Of the free ones, those that still hold a prefix and are evicted when needed."""
    block_size: int
    max_model_len: int
    steps: int = 0
    step_errors: int = 0
    num_preemptions: int = 0
    requests_received: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    """Tokens prefilled: without prefix-cache hits, with recomputation after a preemption."""
    cached_tokens: int = 0
    """Tokens not prefilled, as their blocks were shared."""
    admitted_prompt_tokens: int = 0
    """Tokens of the prompts admitted, each prompt once; cached ones included."""
    admitted_cached_tokens: int = 0
    """Of these, those whose blocks were shared."""
    recomputed_tokens: int = 0
    """Tokens prefilled again, after a preemption or after another worker."""
    generated_tokens: int = 0
    busy_s: float = 0.0
    """Seconds spent in steps."""


AnyMessage = Annotated[
    Submit | Abort | StatsRequest | StepOutputs | Stats, Field(discriminator="type")
]
_ADAPTER: TypeAdapter[Submit | Abort | StatsRequest | StepOutputs | Stats] = TypeAdapter(
    AnyMessage,
    config=ConfigDict(hide_input_in_errors=True),  # errors are logged, token ids are not
)


def parse_message(body: bytes) -> Submit | Abort | StatsRequest | StepOutputs | Stats:
    """Read a CONTROL body; raises pydantic.ValidationError, which names the field."""
    return _ADAPTER.validate_json(body)


def encode_message(message: Message) -> bytes:
    """The JSON body of a CONTROL frame."""
    return message.model_dump_json(exclude_none=True).encode()
