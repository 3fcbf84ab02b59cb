"""A request while it is inside the worker: its tokens, its blocks, how far it is computed."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum

from attention.kv_cache import block_hash, root_hash
from attention.messages import FinishReason, Submit, TokenLogprob
from attention.sampler import TokenCounts
from attention.tracing import SequenceTrace

Finish = tuple[FinishReason, int | None]
"""The reason, and for "stop" the id if it is one of the request's own."""


class RequestState(Enum):
    """new -> waiting -> running -> finished; a preempted request goes back to waiting."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Mutable state of one request; only the engine thread touches it.

    Invariant: the cache holds the latents of token_ids[:num_computed_tokens], in block_ids, in
    order.
    """

    request_id: str
    submit: Submit
    token_ids: list[int]
    """Prompt, then replayed and new tokens."""
    num_prompt_tokens: int
    max_total_tokens: int
    """token_ids never grows beyond it: prompt + max_tokens, or the context."""
    deadline_s: float | None = None
    """On the engine's clock."""
    state: RequestState = RequestState.NEW
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose blocks were shared when it was first admitted."""
    block_ids: array[int] = field(default_factory=lambda: array("i"))
    """int32, so that the runner copies them into block tables without a loop."""
    block_hashes: list[bytes] = field(default_factory=list)
    num_published_blocks: int = 0
    counts: TokenCounts | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    first_output_sent: bool = False
    """The client has what only the first output tells; a replay with emitted_ids starts so."""
    was_admitted: bool = False
    is_tainted: bool = False
    """Some step went without experts: its blocks are never offered to others."""
    tell_renormalised: bool = False
    """The next output has to say so."""
    arrived_s: float = 0.0
    first_step_s: float | None = None
    first_token_s: float | None = None
    """On the engine's clock, as is arrived_s."""
    prefill_told: bool = False
    step_s: float = 0.0
    """That the steps it took part in took."""
    hop_s: float = 0.0
    """That they spent on the way to the routed experts and back."""
    expert_s: float = 0.0
    """Its share of what expert workers computed for them."""
    num_preemptions: int = 0
    trace: SequenceTrace | None = None
    """None: nobody wants its spans."""

    @classmethod
    def create(cls, submit: Submit, max_model_len: int, arrived_s: float = 0.0) -> Request:
        """The request in its first state; max_tokens None runs to the end of the context."""
        params, num_prompt = submit.params, len(submit.prompt_ids)
        limit = max_model_len
        if params.max_tokens is not None:
            limit = min(limit, num_prompt + params.max_tokens)
        request = cls(
            request_id=submit.request_id,
            submit=submit,
            token_ids=[*submit.prompt_ids, *submit.emitted_ids],
            num_prompt_tokens=num_prompt,
            max_total_tokens=limit,
            deadline_s=None if submit.deadline_s is None else arrived_s + submit.deadline_s,
            arrived_s=arrived_s,
            first_output_sent=bool(submit.emitted_ids),
        )
        if TokenCounts.needed(params):
            request.counts = TokenCounts(submit.prompt_ids, submit.emitted_ids)
        if params.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * num_prompt
        return request

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Replayed and new tokens: also the position of the next one in its random stream."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens not yet in the cache; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def prefill_s(self) -> float | None:
        """From its first step to its first token; None before."""
        if self.first_step_s is None or self.first_token_s is None:
            return None
        return self.first_token_s - self.first_step_s

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.prompt_logprobs is not None and not self.first_output_sent

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)

    def full_block_hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """Hashes of the first num_blocks blocks, all of them full; computed once each."""
        hashes = self.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * block_size
            parent = hashes[-1] if hashes else root_hash(self.submit.cache_salt)
            hashes.append(block_hash(parent, self.token_ids[start : start + block_size]))
        return hashes[:num_blocks]

    def finish_reason(self, eos_token_ids: frozenset[int]) -> Finish | None:
        """Why it ends after its last token; None: it goes on."""
        params = self.submit.params
        if 0 < self.num_output_tokens >= params.min_tokens:
            last = self.token_ids[-1]
            if last in eos_token_ids and not params.ignore_eos:
                return "stop", None
            if last in params.stop_token_ids:
                return "stop", last
        if self.num_tokens >= self.max_total_tokens:
            return "length", None
        return None
