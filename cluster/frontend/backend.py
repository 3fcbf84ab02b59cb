"""The engine as the service sees it: submit, abort, ask how it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from attention.messages import Stats, Submit, TokenOutput


class Readiness(NamedTuple):
    """Whether requests can be served and, if not, how far the start is."""

    ready: bool
    stage: str
    done: int = 0
    total: int = 0
    missing: Literal["experts", "attention"] | None = None
    """What every open request waits for: experts nobody holds, or an attention worker."""


class EngineBackend(Protocol):
    """One or many attention workers behind one face. Every method may be called from any thread."""

    def submit(self, request: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        """Start a sequence. Returns at once: the event loop of the front end calls it.

        `on_output` is called from a thread of the back end, in order, until an output has a
        `finish_reason`; "lost" asks for a `replay`. Raises OSError when no worker can take it.
        """

    def replay(self, request: Submit, on_output: Callable[[TokenOutput], None]) -> None:
        """Continue a sequence that was "lost", with `emitted_ids` behind its prompt; otherwise like
        `submit`. Never raises: without a worker the sequence waits for one, until it is aborted."""

    def abort(self, request_id: str) -> None:
        """Give a sequence up; nothing more need be reported. Unknown ids are no error. Never
        blocks, never raises: it runs while a request is being torn down."""

    def stats(self) -> Sequence[Stats]:
        """Load of each worker."""

    def ready(self) -> tuple[bool, str] | Readiness:
        """Whether submit would find a worker."""
