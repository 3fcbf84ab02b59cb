"""Token ids to text, one token at a time, without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable


def byte_alphabet() -> dict[str, int]:
    """The printable character by which byte-level vocabularies spell each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    spelled = {chr(b): b for b in printable}
    return spelled | {chr(256 + i): b for i, b in enumerate(rest)}


_ALPHABET = byte_alphabet()


def spelled_bytes(token: str) -> bytes:
    """The bytes a byte-level token stands for; a token outside the alphabet is its own UTF-8."""
    if all(c in _ALPHABET for c in token):
        return bytes(_ALPHABET[c] for c in token)
    return token.encode()


class IncrementalDetokenizer:
    """Turns the bytes of tokens into text as soon as characters are complete.

    Bytes that can never become a character turn into U+FFFD, like those of a whole-text decode.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is open."""
        return self._decoder.decode(self._token_bytes(token_id))

    @property
    def has_open_character(self) -> bool:
        """Whether bytes of an unfinished character are held."""
        return bool(self._decoder.getstate()[0])

    def flush(self) -> str:
        """The end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)
