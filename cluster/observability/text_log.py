"""Prompts and answers in the log, for who asks for it: `observability.log_prompts`.

A back end around the real one, so both front ends have it and nothing of it runs otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from attention.messages import Stats, Submit, TokenOutput
from cluster.frontend.backend import EngineBackend, Readiness
from cluster.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

WARNING = "observability.log_prompts is on: the log has every prompt and every answer"


class LoggedBackend:
    """An EngineBackend that logs the text of what goes in and of what comes out."""

    def __init__(self, backend: EngineBackend, tokenizer: Tokenizer) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._answers: dict[str, list[int]] = {}
        logger.warning(WARNING)

    def submit(self, request: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        """Log the prompt, then start the sequence."""
        self._log("prompt", request.request_id, request.prompt_ids)
        self._answers[request.request_id] = []
        self._backend.submit(request, self._listener(on_output))

    def replay(self, request: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        """The answer goes on behind what was emitted."""
        self._answers[request.request_id] = list(request.emitted_ids)
        self._backend.replay(request, self._listener(on_output))

    def abort(self, request_id: str) -> None:
        """Log what there is of the answer."""
        self._end(request_id)
        self._backend.abort(request_id)

    def stats(self) -> Sequence[Stats]:
        return self._backend.stats()

    def ready(self) -> tuple[bool, str] | Readiness:
        return self._backend.ready()

    def _listener(self, on_output: Callable[[TokenOutput], None]) -> Callable[[TokenOutput], None]:
        def listen(output: TokenOutput) -> None:
            answer = self._answers.get(output.request_id)
            if answer is not None:
                answer.extend(output.token_ids)
            if output.finish_reason not in (None, "lost"):
                self._end(output.request_id)
            on_output(output)

        return listen

    def _end(self, sequence_id: str) -> None:
        answer = self._answers.pop(sequence_id, None)
        if answer is not None:
            self._log("answer", sequence_id, answer)

    def _log(self, message: str, sequence_id: str, ids: Sequence[int]) -> None:
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        logger.info(message, extra={"sequence": sequence_id, "text": text})
