"""What the server does for a client, whatever the protocol: check, admit, tokenise, generate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from attention.tracing import Tracer
from cluster.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable, quote
from cluster.field_names import nearest
from cluster.frontend.admission import Admission
from cluster.frontend.auth import Authorizer
from cluster.frontend.backend import EngineBackend, Readiness
from cluster.frontend.checks import (
    check_chat_logprobs,
    check_completion_logprobs,
    check_number,
    check_sampling,
    check_token_ids,
)
from cluster.frontend.conversation import check_messages
from cluster.frontend.generation import Generation
from cluster.frontend.idempotency import IdempotentCall, KeyStore
from cluster.frontend.ledger import RequestLedger
from cluster.frontend.observation import Observation
from cluster.frontend.observer import Origin, RequestObserver
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SamplingFields,
    Schema,
    TokenizeRequest,
    ignored_fields,
)
from cluster.frontend.prompts import PromptEncoder
from cluster.frontend.request import ModelInfo, Prompt, build_request, prompt_inputs
from cluster.limits import Limits
from cluster.tokenizer import Tokenizer

_RETRY_LOADING_S = 5
_DRAIN_POLL_S = 0.05
_THREAD_FROM_CHARS = 16_384
"""Longer texts are tokenised in a thread: the event loop has other streams to feed."""


class InferenceService:
    """One model behind one engine. Methods raise the errors of cluster/errors.py only.

    A plain class without Ray, HTTP or gRPC; all methods run on one event loop.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        backend: EngineBackend,
        model: ModelInfo,
        limits: Limits | None = None,
        *,
        strict_params: bool = False,
        system_fingerprint: str | None = None,
        authorizer: Authorizer | None = None,
        observers: Sequence[RequestObserver] = (),
        tracer: Tracer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.limits = limits or Limits()
        self.system_fingerprint = system_fingerprint
        self.authorizer = authorizer or Authorizer()
        """Both fronts ask it before anything else."""
        self._observers = tuple(observers)
        self._tracer = tracer
        self._backend = backend
        self._strict_params = strict_params
        self._clock = clock
        self.ledger = RequestLedger(clock)
        self.keys = KeyStore(self.limits, clock)
        self._encoder = PromptEncoder(tokenizer, model, self.limits)
        self.is_draining = False
        """`drain` was called."""
        self._admission = Admission(self.limits.max_open_sequences, clock)

    # ---- generating

    def observe(self, origin: Origin) -> Observation:
        """What a front does with a generating request, up to its start, it does within this."""
        return Observation(origin, self._observers, self._clock, self._tracer)

    def on_refused(self, request_id: str, code: str) -> None:
        """Tell the observers of a request that was refused before anybody knew what it was."""
        for observer in self._observers:
            observer.on_refused(request_id, code)

    async def chat(
        self,
        body: ChatCompletionRequest,
        timeout_s: float | None = None,
        call: IdempotentCall | None = None,
        observation: Observation | None = None,
    ) -> Generation:
        """Start answering a conversation. `timeout_s`: a limit from outside the body."""
        deadline = self._admit(body, timeout_s)
        check_messages(body.messages, self.limits)
        check_chat_logprobs(body, self.limits)
        num_chars = sum(len(str(m.content)) for m in body.messages)
        render = self._encoder.conversation(body, body.messages)

        def encode() -> list[Prompt]:
            return [Prompt(render())]

        return await self._run(body, 1, num_chars, encode, deadline, call, observation)

    async def complete(
        self,
        body: CompletionRequest,
        timeout_s: float | None = None,
        call: IdempotentCall | None = None,
        observation: Observation | None = None,
    ) -> Generation:
        """Start continuing one or more prompts."""
        deadline = self._admit(body, timeout_s)
        check_completion_logprobs(body, self.limits)
        inputs = prompt_inputs(body, self.model, self.limits)
        num_chars = sum(len(item) for item in inputs if isinstance(item, str))

        def encode() -> list[Prompt]:
            return [
                Prompt(self._encoder.text(item, body), item)
                if isinstance(item, str)
                else Prompt(item)
                for item in inputs
            ]

        return await self._run(body, len(inputs), num_chars, encode, deadline, call, observation)

    # ---- tokens

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Ids of a prompt or a conversation."""
        self._check_ignored(body)
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("Give either 'prompt' or 'messages'.", param="prompt")
        if body.messages is not None:
            check_messages(body.messages, self.limits)
            return await asyncio.to_thread(self._encoder.conversation(body, body.messages))
        return await asyncio.to_thread(self._encoder.text, body.prompt or "", body)

    def detokenize(self, body: DetokenizeRequest) -> str:
        """Text of ids."""
        self._check_ignored(body)
        self.check_model(body.model)
        check_token_ids("tokens", body.tokens, self.model.vocab_size)
        return self.tokenizer.decode(body.tokens, skip_special_tokens=body.skip_special_tokens)

    # ---- state

    def readiness(self) -> Readiness:
        """Whether requests are served, and how far the start is if not. For load balancers: Serve
        would replace an ingress that it finds unhealthy in the middle of its drain."""
        if self.is_draining:
            return Readiness(False, "draining")
        return Readiness(*self._backend.ready())

    @property
    def num_open_sequences(self) -> int:
        """Sequences that wait or run for this front end."""
        return self._admission.num_open

    async def drain(self) -> None:
        """Take nothing new and return when what is open has ended."""
        self.is_draining = True
        while self._admission.num_open:
            await asyncio.sleep(_DRAIN_POLL_S)

    def check_model(self, name: str | None) -> None:
        """No name means the one model. Raises NotFound with the names there are."""
        names = self.model.names
        if name is None or name in names:
            return
        meant = nearest(name[:200], names)
        hint = f" Did you mean {quote(meant)}?" if meant else ""
        raise NotFound(
            f"The model {quote(name)} does not exist. This server has"
            f" {', '.join(map(quote, names))}.{hint}",
            param="model",
            code="model_not_found",
        )

    # ---- inside

    def _admit(self, body: SamplingFields, timeout_s: float | None) -> float | None:
        """The checks that cost nothing. Returns the moment of the deadline, if there is one."""
        started = self._clock()
        if self.is_draining:
            raise Unavailable(
                "The server is shutting down.", code="draining", retry_after_s=_RETRY_LOADING_S
            )
        ready = self.readiness()
        if not ready.ready and ready.missing != "attention":  # for that one it can wait
            raise Unavailable(
                f"The model is not ready: {ready.stage}.", retry_after_s=_RETRY_LOADING_S
            )
        self._check_ignored(body)
        self.check_model(body.model)
        check_sampling(body, self.model.vocab_size, self.model.context_tokens, self.limits)
        if timeout_s is not None:
            check_number("timeout", timeout_s, 0, self.limits.max_timeout_s)
        given = [limit for limit in (body.timeout, timeout_s) if limit is not None]
        return started + min(given) if given else None

    async def _run(
        self,
        body: SamplingFields,
        num_prompts: int,
        num_chars: int,
        encode: Callable[[], list[Prompt]],
        deadline: float | None,
        call: IdempotentCall | None,
        observation: Observation | None,
    ) -> Generation:
        count = num_prompts * (body.n or 1)
        if count > self.limits.max_sequences:
            raise InvalidRequest(
                f"{num_prompts} prompts with n = {body.n or 1} are {count} sequences, at most"
                f" {self.limits.max_sequences} are allowed.",
                param="n",
            )
        self._admission.enter(count)
        try:
            if num_chars < _THREAD_FROM_CHARS:
                prompts = encode()
            else:
                prompts = await asyncio.to_thread(encode)
            request = build_request(
                body,
                prompts,
                self.model,
                deadline=deadline,
                seed=call.seed if call else None,
                key_name=observation.origin.key_name if observation else "",
                ignored=ignored_fields(body),
            )
            if call is not None:
                self.keys.claim(call)
            if deadline is not None and self._clock() >= deadline:
                raise DeadlineExceeded("The request's time limit passed before it was started.")
        except BaseException:
            self._admission.leave(count)
            raise
        generation = Generation(
            request,
            self.tokenizer,
            self._backend,
            self.ledger,
            self._admission,
            observation or self.observe(Origin(request.request_id, "http")),
            self._clock,
        )
        await generation.start()
        return generation

    def _check_ignored(self, body: Schema) -> None:
        unknown = ignored_fields(body)
        if unknown and self._strict_params:
            raise InvalidRequest(
                f"Unrecognized request argument: {quote(unknown[0])}.",
                param=unknown[0],
                code="unknown_parameter",
            )
