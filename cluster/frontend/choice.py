"""One choice: engine outputs become text without half characters or beginnings of stop strings.

Tokens are held back until their text is safe: no character is open at their end, and no suffix of
what would be shown may grow into a stop string. Whole tokens are released, so the log probabilities
of a Delta always belong to its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from attention.messages import TokenLogprob, TokenOutput
from cluster.frontend.request import GenerateRequest, Prompt
from cluster.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class Likely(NamedTuple):
    """A token and how likely it was; `shown` are its bytes in the text, b"" if it is hidden."""

    text: str
    shown: bytes
    logprob: float | None


class TokenText(NamedTuple):
    """One token of the answer (or of an echoed prompt) with the most likely ones in its place."""

    token: Likely
    top: list[Likely]
    offset: int
    """Characters of the choice's text before this token."""


@dataclass(slots=True)
class Delta:
    """What a choice has to show for one engine output; the last one has a `finish_reason`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenText] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    renormalised: bool = False
    """Some expert was left out for a token since the choice's last Delta."""


@dataclass(slots=True)
class _Piece:
    """A token that is not shown yet. `is_open`: a character is unfinished behind it.
    `is_cut`: some of its text will not be shown."""

    token_id: int
    text: str
    is_open: bool = False
    logprob: TokenLogprob | None = None
    is_cut: bool = False


class ChoiceText:
    """The text side of one choice."""

    def __init__(self, index: int, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=request.skip_special_tokens)
        self._held: list[_Piece] = []
        self._num_chars = 0
        self.num_tokens = 0
        self.finished = False

    def echo(self, prompt: Prompt, logprobs: Sequence[TokenLogprob | None] | None) -> Delta:
        """The prompt as the beginning of the answer."""
        pieces = [_Piece(token, self._detokenizer.push(token)) for token in prompt.ids]
        pieces[-1].text += self._detokenizer.flush()
        for piece, logprob in zip(pieces, logprobs or (), strict=False):
            piece.logprob = logprob
        delta = self._show(pieces)
        if prompt.text is not None and prompt.text != delta.text:
            self._num_chars += len(prompt.text) - len(delta.text)
            delta.text = prompt.text  # a normaliser changed it; the client gets its own words back
        delta.token_ids = []
        return delta

    def push(self, output: TokenOutput) -> Delta:
        """What can be shown after this output, perhaps nothing yet."""
        logprobs: Sequence[TokenLogprob | None] = output.logprobs or [None] * len(output.token_ids)
        for token, logprob in zip(output.token_ids, logprobs, strict=True):
            self._take(token, logprob)
            stopped = self._stop_at_string()
            if stopped is not None:
                return stopped
        if output.finish_reason is None:
            return self._show(self._release())
        return self._finish(output)

    # ---- taking tokens

    def _take(self, token_id: int, logprob: TokenLogprob | None) -> None:
        text = self._detokenizer.push(token_id)
        is_open = self._detokenizer.has_open_character
        self._held.append(_Piece(token_id, text, is_open, logprob))
        self.num_tokens += 1

    def _held_text(self) -> str:
        return "".join(piece.text for piece in self._held)

    def _stop_at_string(self) -> Delta | None:
        """The last Delta if a stop string is complete, the one that ends first."""
        stops = self._request.stop
        if not stops or self.num_tokens <= self._request.min_tokens or not self._held[-1].text:
            return None
        text = self._held_text()
        found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop)) >= 0]
        if not found:
            return None
        end, start, stop = min(found)
        return self._cut(end if self._request.include_stop else start, stop)

    def _cut(self, num_chars: int, stop: str) -> Delta:
        """Show only `num_chars` of what is held; the ids stay complete."""
        ids = [piece.token_id for piece in self._held]
        shown: list[_Piece] = []
        for piece in self._held:
            if num_chars <= 0:
                break
            piece.is_cut = len(piece.text) > num_chars
            piece.text = piece.text[:num_chars]
            num_chars -= len(piece.text)
            shown.append(piece)
        delta = self._show(shown)
        delta.token_ids, delta.finish_reason, delta.stop_reason = ids, "stop", stop
        self.finished = True
        return delta

    def _finish(self, output: TokenOutput) -> Delta:
        """The engine's own end. The token that stopped it is no text, unless asked for."""
        rest = self._detokenizer.flush()
        if self._held:
            self._held[-1].text += rest
            if output.finish_reason == "stop" and not self._request.include_stop:
                self._held[-1].text, self._held[-1].is_cut = "", True
        delta = self._show(self._held)
        delta.finish_reason = "length" if output.finish_reason == "length" else "stop"
        delta.stop_reason = output.stop_reason
        self.finished = True
        return delta

    # ---- showing them

    def _release(self) -> list[_Piece]:
        """The tokens at the front of those held that are safe to show; the others stay held."""
        safe_chars = len(self._held_text()) - self._num_risky_chars()
        num_safe, num_chars = 0, 0
        for i, piece in enumerate(self._held):
            num_chars += len(piece.text)
            if num_chars > safe_chars:
                break
            if not piece.is_open:
                num_safe = i + 1
        released, self._held = self._held[:num_safe], self._held[num_safe:]
        return released

    def _num_risky_chars(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop string."""
        if not self._request.stop:
            return 0
        text = self._held_text()
        longest = min(len(text), max(map(len, self._request.stop)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._request.stop):
                return length
        return 0

    def _show(self, pieces: Sequence[_Piece]) -> Delta:
        delta = Delta(self._index, token_ids=[piece.token_id for piece in pieces])
        if self._request.wants_logprobs:
            delta.logprobs = []
        for piece in pieces:
            if delta.logprobs is not None:
                delta.logprobs.append(self._token_text(piece))
            delta.text += piece.text
            self._num_chars += len(piece.text)
        return delta

    def _token_text(self, piece: _Piece) -> TokenText:
        shown = self._shown_bytes(piece)
        logprob = None if piece.logprob is None else max(piece.logprob.logprob, LOWEST_LOGPROB)
        chosen = Likely(self._tokenizer.token_text(piece.token_id), shown, logprob)
        top = [] if piece.logprob is None else [self._likely(*pair) for pair in piece.logprob.top]
        return TokenText(chosen, top, self._num_chars)

    def _shown_bytes(self, piece: _Piece) -> bytes:
        """The bytes a token has in the text; of one that was cut, what is left."""
        if piece.is_cut:
            return piece.text.encode()
        if self._request.skip_special_tokens:
            return self._tokenizer.visible_bytes(piece.token_id)
        return self._tokenizer.token_bytes(piece.token_id)

    def _likely(self, token_id: int, logprob: float) -> Likely:
        tokenizer = self._tokenizer
        return Likely(
            tokenizer.token_text(token_id),
            tokenizer.token_bytes(token_id),
            max(logprob, LOWEST_LOGPROB),
        )
