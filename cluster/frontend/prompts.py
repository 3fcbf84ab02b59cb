"""Texts and conversations to token ids, refused early when they cannot fit the context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.chat_template import RenderLimit
from cluster.errors import InvalidRequest
from cluster.frontend.conversation import check_template_kwargs, template_messages
from cluster.frontend.openai import (
    ChatCompletionRequest,
    CompletionRequest,
    Message,
    TokenizeRequest,
)
from cluster.frontend.request import ModelInfo, context_error
from cluster.limits import Limits
from cluster.tokenizer import Tokenizer


class PromptEncoder:
    """Stateless; any thread may encode."""

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._limits = limits

    def conversation(
        self, body: ChatCompletionRequest | TokenizeRequest, messages: Sequence[Message]
    ) -> Callable[[], list[int]]:
        """What renders and encodes the messages. Both raise InvalidRequest."""
        switches = check_template_kwargs(body.chat_template_kwargs)
        turns = template_messages(messages)

        def encode() -> list[int]:
            try:
                return self._tokenizer.apply_chat_template(
                    turns,
                    max_chars=self._max_chars,
                    max_s=self._limits.max_render_s,
                    add_generation_prompt=body.add_generation_prompt,
                    switches=switches,
                )
            except RenderLimit:
                raise self._too_long("messages") from None

        return encode

    def text(self, text: str, body: CompletionRequest | TokenizeRequest) -> list[int]:
        """Ids of a text. Raises InvalidRequest."""
        if len(text) > self._max_chars:
            raise self._too_long("prompt")
        return self._tokenizer.encode(
            text,
            add_special_tokens=body.add_special_tokens,
            allow_special_tokens=body.allow_special_tokens,
        )

    @property
    def _max_chars(self) -> int:
        """A longer text cannot fit the context: known before spending time on its tokens."""
        return self._tokenizer.max_chars(self._model.context_tokens)

    def _too_long(self, param: str) -> InvalidRequest:
        found = f"more than {self._model.context_tokens} tokens"
        return context_error(self._model, param, found)
