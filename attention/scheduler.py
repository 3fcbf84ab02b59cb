"""Which tokens of which requests the next step computes. Pure: no tensors, no clock, no threads.

Continuous batching under one token budget. A step holds, in this order of claim:
1. one token of every decoding request,
2. the next chunk of running prefills, oldest first,
3. waiting requests, first come first served; nobody overtakes the head of the line.

Admission takes the blocks of all known tokens at once, so only decodes ask for more later. When
none is free, the youngest running request is preempted: its blocks go back and it waits, first in
line, to be computed again (often from the prefix cache). `running` stays ordered by arrival and
every waiting request is younger, so the oldest one can take all blocks; as one that alone exceeds
the cache is refused at `add`, each step moves the oldest request forward and every request ends.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass

from attention.config import AttentionConfig
from attention.kv_cache import BlockPool
from attention.request import Request, RequestState


class RequestRefused(ValueError):
    """The request can never run here; the text is for the client."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """`num_tokens` tokens of the request from its num_computed_tokens on."""

    request: Request
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens gives a new one."""
        return self.num_tokens == self.request.remaining_tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """A step: single-token items first."""

    items: tuple[ScheduledRequest, ...]
    num_tokens: int


@dataclass(slots=True)
class PromptCounters:
    """Of admissions. A prompt counts once: not again after a preemption, nor where a request goes
    on that has begun on another worker."""

    admitted_prompt_tokens: int = 0
    admitted_cached_tokens: int = 0
    """Of them, those found in the prefix cache."""
    recomputed_tokens: int = 0
    """Of requests taken in again: what the prefix cache did not have."""

    def count(self, request: Request, is_again: bool) -> None:
        if is_again:
            self.recomputed_tokens += request.remaining_tokens
        else:
            self.admitted_prompt_tokens += request.num_prompt_tokens
            self.admitted_cached_tokens += request.num_cached_tokens


class Scheduler:
    """Owns the request queues and the blocks."""

    def __init__(self, config: AttentionConfig, pool: BlockPool, max_model_len: int):
        self.max_num_seqs = config.max_num_seqs
        self.token_budget = config.max_num_batched_tokens
        self.pool = pool
        self.max_model_len = max_model_len
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.prompts = PromptCounters()

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestRefused if it cannot run even alone."""
        known = request.num_tokens
        if known > self.max_model_len:
            raise RequestRefused(
                f"{known} prompt tokens exceed the context of {self.max_model_len} tokens"
            )
        if known == self.max_model_len and request.submit.params.max_tokens != 0:
            raise RequestRefused(
                f"{known} prompt tokens leave no room for a new one in the context of "
                f"{self.max_model_len} tokens"
            )
        # the last token is never in the cache
        needed = self.pool.blocks_for(max(known, request.max_total_tokens - 1))
        if needed > self.pool.num_blocks:
            raise RequestRefused(
                f"up to {request.max_total_tokens} tokens need {needed} cache blocks, "
                f"there are {self.pool.num_blocks}"
            )
        request.state = RequestState.WAITING
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """The next step; preempts and admits as a side effect. Empty if there is nothing to do."""
        num_preempted = self.num_preemptions
        items, budget = self._schedule_running()
        if self.num_preemptions == num_preempted:  # blocks are short: admit nobody
            items += self._admit(budget)
        items.sort(key=lambda item: item.num_tokens > 1)  # stable
        return Schedule(tuple(items), sum(item.num_tokens for item in items))

    def _schedule_running(self) -> tuple[list[ScheduledRequest], int]:
        num_decodes = sum(request.remaining_tokens == 1 for request in self.running)
        budget = self.token_budget - num_decodes  # what is left for prefill chunks
        items: list[ScheduledRequest] = []
        for request in tuple(self.running):
            if request.state is not RequestState.RUNNING or not self._make_room(request):
                continue
            if request.remaining_tokens == 1:
                items.append(ScheduledRequest(request, 1))
            elif budget > 0:
                items.append(ScheduledRequest(request, min(request.remaining_tokens, budget)))
                budget -= items[-1].num_tokens
        return items, budget

    def _make_room(self, request: Request) -> bool:
        """Take blocks for all known tokens; False if it was the youngest itself and had to go."""
        missing = self.pool.blocks_for(request.num_tokens) - len(request.block_ids)
        while missing > self.pool.num_free:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is request:
                return False
        request.block_ids.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, request: Request) -> None:
        self._withdraw(request)
        request.num_computed_tokens = 0
        request.state = RequestState.WAITING
        self.waiting.appendleft(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _admit(self, budget: int) -> list[ScheduledRequest]:
        items: list[ScheduledRequest] = []
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if not self._take_blocks(request):
                break
            self.waiting.popleft()
            request.state = RequestState.RUNNING
            self.running.append(request)
            items.append(ScheduledRequest(request, min(request.remaining_tokens, budget)))
            budget -= items[-1].num_tokens
        return items

    def _take_blocks(self, request: Request) -> bool:
        """Shared prefix blocks and new ones for the rest; False if too few are free.

        One block for each running request stays spare, else the next decode would preempt what was
        just admitted.
        """
        shared = self._cached_prefix(request)
        missing = self.pool.blocks_for(request.num_tokens) - len(shared)
        if missing + len(self.running) > self.pool.num_free_without(shared):
            return False
        self.pool.hold(shared)
        request.block_ids = array("i", shared + self.pool.allocate(missing))
        request.num_computed_tokens = len(shared) * self.pool.block_size
        request.num_published_blocks = len(shared)
        self.num_cached_tokens += request.num_computed_tokens
        is_again = request.was_admitted or request.num_output_tokens > 0
        if not request.was_admitted:
            request.was_admitted = True
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.prompts.count(request, is_again)
        return True

    def _cached_prefix(self, request: Request) -> list[int]:
        """Blocks to share: full ones, and never all tokens, as the last one's logits are wanted."""
        if not self.pool.enable_prefix_caching or request.wants_prompt_logprobs:
            return []
        size = self.pool.block_size
        return self.pool.match(request.full_block_hashes(size, (request.num_tokens - 1) // size))

    def advance(self, item: ScheduledRequest) -> None:
        """The item's tokens are in the cache now: publish the blocks that became full."""
        request = item.request
        request.num_computed_tokens += item.num_tokens
        if not self.pool.enable_prefix_caching or request.is_tainted:
            return
        size = self.pool.block_size
        full = request.num_computed_tokens // size
        if full == request.num_published_blocks:
            return
        hashes = request.full_block_hashes(size, full)
        for index in range(request.num_published_blocks, full):
            self.pool.publish(request.block_ids[index], hashes[index])
        request.num_published_blocks = full

    def finish(self, request: Request) -> None:
        """Take the request out, wherever it is, and return its blocks. Harmless when repeated."""
        if request.state is RequestState.RUNNING:
            self._withdraw(request)
        elif request.state is RequestState.WAITING:
            self.waiting.remove(request)
        request.state = RequestState.FINISHED

    def _withdraw(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.release(request.block_ids)
        request.block_ids = array("i")
        request.num_published_blocks = 0
