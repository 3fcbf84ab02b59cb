"""Requests that a client may send twice: `Idempotency-Key` on HTTP, `idempotency-key` on gRPC.

On every ingress: a request that samples without a seed of its own takes its seed from the key, so
that a second attempt gets the same tokens also when the first ingress died.
On one ingress, for a while: the key with another body is refused, and a whole answer (no stream) is
given again as it was, with its id. A stream, or an answer that is not finished yet or too large to
keep, is computed again. All that is among requests of one API key: others may use the same words.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from cluster.errors import IdempotencyConflict, InvalidRequest
from cluster.frontend.openai import SamplingFields
from cluster.limits import Limits

HEADER = "Idempotency-Key"


@dataclass(frozen=True)
class IdempotentCall:
    """A key and the request it came with."""

    key_name: str
    """Of the API key, "" without keys."""
    key: str
    body: SamplingFields

    @property
    def owned_key(self) -> tuple[str, str]:
        """Equal for equal keys of one client."""
        return self.key_name, self.key

    @cached_property
    def digest(self) -> bytes:
        """Equal for equal requests."""
        text = f"{type(self.body).__name__} {self.body.model_dump_json()}"
        return hashlib.sha256(text.encode()).digest()

    @property
    def seed(self) -> int:
        """For the random stream: the same on every ingress, below 2**63."""
        text = f"shoal idempotency key {self.key_name} {self.key}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def idempotent_call(
    key_name: str, key: str | None, body: SamplingFields, limits: Limits
) -> IdempotentCall | None:
    """None without a key. Raises InvalidRequest."""
    if key is None:
        return None
    most = limits.max_idempotency_key_chars
    if not (0 < len(key) <= most and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Invalid '{HEADER}': it should be 1 to {most} printable ASCII characters.",
            param=HEADER,
        )
    return IdempotentCall(key_name, key, body)


@dataclass
class _Entry:
    digest: bytes
    expires: float
    answer: bytes | None = None


class KeyStore:
    """Keys of the last minutes, oldest first, with the answers that are small enough. Bounded by
    count and bytes: the oldest go first. Used from the event loop only."""

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._num_bytes = 0

    def find(self, call: IdempotentCall) -> bytes | None:
        """The answer of an equal request, if it is kept. Raises IdempotencyConflict."""
        self._expire()
        entry = self._entries.get(call.owned_key)
        if entry is None:
            return None
        if entry.digest != call.digest:
            raise IdempotencyConflict(
                f"This {HEADER} came with another request before: use a new key for a new request.",
                param=HEADER,
            )
        return entry.answer

    def claim(self, call: IdempotentCall) -> None:
        """From now on the key belongs to this request. Raises IdempotencyConflict."""
        self.find(call)
        if call.owned_key not in self._entries:
            expires = self._clock() + self._limits.idempotency_ttl_s
            self._entries[call.owned_key] = _Entry(call.digest, expires)
            self._expire()

    def keep(self, call: IdempotentCall, answer: bytes) -> None:
        """The finished answer, for who asks again."""
        entry = self._entries.get(call.owned_key)
        if entry is None or entry.digest != call.digest or entry.answer:
            return  # forgotten meanwhile, and perhaps claimed by another request
        if len(answer) > self._limits.max_kept_answer_bytes:
            return
        entry.answer = answer
        self._num_bytes += len(answer)
        self._expire()

    def _expire(self) -> None:
        now, limits = self._clock(), self._limits
        while self._entries and (
            next(iter(self._entries.values())).expires <= now
            or len(self._entries) > limits.max_idempotency_keys
            or self._num_bytes > limits.max_kept_answers_bytes
        ):
            _, entry = self._entries.popitem(last=False)
            self._num_bytes -= len(entry.answer or b"")
