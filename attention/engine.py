"""The step loop: schedule, run, update. One thread owns an engine; a clock is passed in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from attention.messages import FinishReason, Stats, Submit, TokenOutput
from attention.metrics import EngineCounters
from attention.request import Finish, Request
from attention.runner import ItemResult
from attention.sampler import NOT_FINITE
from attention.scheduler import RequestRefused, Schedule, ScheduledRequest, Scheduler
from attention.step_meter import HopSource, StepMeter
from attention.tracing import Tracer
from experts.metrics import Histogram
from router.errors import RouterError, Unavailable

logger = logging.getLogger(__name__)

NOTICE_S = 0.2
"""How long before a request's deadline it stops to wait for experts, so that its client hears why
before its own clock ends it."""
_CLOCKS_DIFFER_S = 0.05  # a deployed router measures the same wait by a clock of its own


class Runner(Protocol):
    """What the engine needs of a model."""

    def run(self, schedule: Schedule, wait_until_s: float | None = None) -> Sequence[ItemResult]:
        """Compute a step: one result an item, in order. May raise; the step then never was.
        wait_until_s: until when it may wait for experts, None = as the router is set."""


class Engine:
    """Requests go in by `add`, their tokens come out of `step`; each ends with a finish_reason."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        moe: HopSource,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ):
        """moe: the client of the runner's model. tracer: makes spans of requests whose trace is
        sampled."""
        self._runner = runner
        self._scheduler = scheduler
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._early: list[TokenOutput] = []  # of requests that ended outside a step
        self._num_deadlines = 0
        self._is_stalled = False  # the last step waited for experts in vain
        self._meter = StepMeter(moe, clock, tracer)
        self.counters = EngineCounters()

    @property
    def has_work(self) -> bool:
        return bool(self._early) or self._scheduler.has_work

    def add(self, submit: Submit) -> None:
        """Take a request in; one that cannot run ends with an error in the next step's outputs."""
        self.counters.requests_received += 1
        request = Request.create(submit, self._scheduler.max_model_len, self._clock())
        try:
            self._check(submit)
            if (finish := self._replayed_to_its_end(request)) is not None:
                self._early.append(self._ended(request, *finish))
                return
            self._scheduler.add(request)
        except RequestRefused as error:
            self.counters.requests_failed += 1
            self._early.append(_output(request, finish_reason="error", error=str(error)))
            return
        self._requests[submit.request_id] = request
        self._num_deadlines += request.deadline_s is not None
        self._meter.arrived(request)

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a request, so that its id is free; its last output, which says "abort" unless it had
        ended before. None for an unknown id."""
        request = self._requests.get(request_id)
        if request is not None:
            self._leave(request)
            self.counters.requests_aborted += 1
            return _output(request, finish_reason="abort")
        for index, output in enumerate(self._early):
            if output.request_id == request_id:
                return self._early.pop(index)
        return None

    def step(self) -> list[TokenOutput]:
        """Compute one batch; every output of the step, also of requests that ended before it."""
        start_s = self._clock()
        self._expire(start_s)
        outputs, self._early = self._early, []
        schedule = self._scheduler.schedule()
        if schedule.items:
            outputs += self._run(schedule, start_s)
            self.counters.steps += 1
        self.counters.busy_s += self._clock() - start_s
        return outputs

    def _run(self, schedule: Schedule, start_s: float) -> list[TokenOutput]:
        try:
            results = self._compute(schedule, start_s)
        except Unavailable as error:
            return self._stall(schedule, error)
        except Exception as error:  # of the experts or of ours: it must not end the other requests
            return self._fail_step(schedule, error)
        self._is_stalled = False
        return [
            output
            for item, result in zip(schedule.items, results, strict=True)
            if (output := self._update(item, result)) is not None
        ]

    def _compute(self, schedule: Schedule, start_s: float) -> Sequence[ItemResult]:
        self._meter.begin_step(schedule)
        try:
            return self._runner.run(schedule, self._wait_until_s(schedule))
        finally:
            self._meter.end_step(schedule, start_s)

    def _update(self, item: ScheduledRequest, result: ItemResult) -> TokenOutput | None:
        """Book an item's result; its output, if there is anything to tell."""
        request, samples = item.request, item.samples
        if samples and request.first_token_s is None:
            request.first_token_s = self._meter.now_s
        if item.num_tokens > 1 or request.num_computed_tokens < request.num_prompt_tokens:
            self.counters.prompt_tokens += item.num_tokens
        if result.renormalised:
            request.is_tainted = request.tell_renormalised = True
        self._scheduler.advance(item)
        for place, logprob in result.prompt_logprobs:
            if request.prompt_logprobs is not None:
                request.prompt_logprobs[place] = logprob
        if not samples:
            return None
        if result.sampled is None:  # max_tokens 0: the prompt was all
            return self._ended(request, "length", None, result)
        if result.sampled.token_id == NOT_FINITE:
            return self._failed(request, "the model's logits are not finite")
        request.append(result.sampled.token_id)
        self.counters.generated_tokens += 1
        finish = request.finish_reason(self._eos_token_ids)
        if finish is None:
            return _output(request, result)
        return self._ended(request, *finish, result)

    def _ended(
        self,
        request: Request,
        reason: FinishReason,
        stop_id: int | None,
        result: ItemResult | None = None,
    ) -> TokenOutput:
        self._leave(request)
        self.counters.requests_finished += 1
        return _output(request, result, finish_reason=reason, stop_reason=stop_id)

    def _failed(self, request: Request, text: str, reason: FinishReason = "error") -> TokenOutput:
        self._leave(request)
        self.counters.requests_failed += 1
        return _output(request, finish_reason=reason, error=text)

    def _fail_step(self, schedule: Schedule, error: Exception) -> list[TokenOutput]:
        """End the requests of a step that failed; the others never notice."""
        self.counters.step_errors += 1
        logger.exception("a step of %d requests failed", len(schedule.items))
        text = str(error) if isinstance(error, RouterError) else "the model failed"
        return [self._failed(item.request, text) for item in schedule.items]

    def _wait_until_s(self, schedule: Schedule) -> float | None:
        """When the first request of a step can wait no longer; None without deadlines."""
        if not self._num_deadlines:
            return None
        requests = (item.request for item in schedule.items)
        deadlines_s = [r.deadline_s for r in requests if r.deadline_s is not None]
        return min(deadlines_s) - NOTICE_S if deadlines_s else None

    def _stall(self, schedule: Schedule, error: Unavailable) -> list[TokenOutput]:
        """End the requests that cannot wait longer for experts; the others' step is done again.

        Nothing was advanced, so the next step is this one less those that ended. If it was no
        deadline that cut the wait short, the router's limit did, which holds for requests without.
        """
        self.counters.step_errors += 1
        self._is_stalled = True
        logger.warning("a step of %d requests waited in vain: %s", len(schedule.items), error)
        now_s, requests = self._clock(), [item.request for item in schedule.items]
        ending = [r for r in requests if _is_due(r, now_s + NOTICE_S + _CLOCKS_DIFFER_S)]
        if not ending:
            ending = [r for r in requests if r.deadline_s is None]
        return [self._failed(request, str(error), "unavailable") for request in ending]

    def _expire(self, now_s: float) -> None:
        if not self._num_deadlines:
            return
        reason: FinishReason = "unavailable" if self._is_stalled else "error"
        for request in list(self._requests.values()):
            if _is_due(request, now_s):
                text = "the request's deadline has passed"
                self._early.append(self._failed(request, text, reason))

    def _leave(self, request: Request) -> None:
        self._scheduler.finish(request)
        if self._requests.pop(request.request_id, None) is not None:
            self._num_deadlines -= request.deadline_s is not None
            self._meter.left(request)

    def _check(self, submit: Submit) -> None:
        """Raises RequestRefused for what the sampler or the embedding would stumble over."""
        if submit.request_id in self._requests:
            raise RequestRefused(f"request id {submit.request_id} is in use")
        params = submit.params
        if params.allowed_token_ids is not None and not params.allowed_token_ids:
            raise RequestRefused("allowed_token_ids is empty")
        for name, ids in (
            ("prompt_ids", submit.prompt_ids),
            ("emitted_ids", submit.emitted_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if ids and max(ids) >= self._vocab_size:
                raise RequestRefused(
                    f"{name}: {max(ids)} is not below the vocabulary size {self._vocab_size}"
                )

    def _replayed_to_its_end(self, request: Request) -> Finish | None:
        """Why a replayed request is over already: its last worker died before it could say so."""
        if not request.num_output_tokens:
            return None
        return request.finish_reason(self._eos_token_ids)

    @property
    def step_times(self) -> Histogram:
        """Seconds of steps so far; for any thread."""
        return self._meter.step_times

    def stats(self) -> Stats:
        """Load and counters at this moment. Only reads single values: any thread may call."""
        scheduler, pool, counters = self._scheduler, self._scheduler.pool, self.counters
        waiting = list(scheduler.waiting)
        return Stats(
            num_running=len(scheduler.running),
            num_waiting=len(waiting),
            num_waiting_tokens=sum(request.num_tokens for request in waiting),
            kv_blocks_total=pool.num_blocks,
            kv_blocks_free=pool.num_free,
            kv_blocks_cached=pool.num_cached,
            block_size=pool.block_size,
            max_model_len=scheduler.max_model_len,
            num_preemptions=scheduler.num_preemptions,
            cached_tokens=scheduler.num_cached_tokens,
            **{name: getattr(counters, name) for name in counters.__slots__},
            **asdict(scheduler.prompts),
        )


def _is_due(request: Request, now_s: float) -> bool:
    return request.deadline_s is not None and request.deadline_s <= now_s


def _output(
    request: Request,
    result: ItemResult | None = None,
    finish_reason: FinishReason | None = None,
    stop_reason: int | None = None,
    error: str | None = None,
) -> TokenOutput:
    """A message with what `result` brought, the first time with what concerns the prompt. Fields
    that keep their default are left out: checking one costs 0.1 us a token."""
    fields: dict[str, Any] = {
        "request_id": request.request_id,
        "step_us": round(request.step_s * 1e6),
        "hop_us": round(request.hop_s * 1e6),
        "expert_us": round(request.expert_s * 1e6),
    }
    if finish_reason is not None:
        fields |= {"finish_reason": finish_reason, "stop_reason": stop_reason, "error": error}
    if result is not None and result.sampled is not None:
        fields["token_ids"] = [result.sampled.token_id]
        if result.sampled.logprob is not None:
            fields["logprobs"] = [result.sampled.logprob]
    if not request.first_output_sent:
        fields["num_cached_tokens"] = request.num_cached_tokens
        if result is not None:
            fields["prompt_logprobs"], request.first_output_sent = request.prompt_logprobs, True
    if request.tell_renormalised:
        fields["renormalised"], request.tell_renormalised = True, False
    if not request.prefill_told and (prefill_s := request.prefill_s) is not None:
        fields["prefill_us"], request.prefill_told = round(prefill_s * 1e6), True
    if request.num_preemptions:
        fields["num_preemptions"] = request.num_preemptions
    return TokenOutput(**fields)
