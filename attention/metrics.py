"""What an attention worker counts."""

from __future__ import annotations

from dataclasses import dataclass

STEP_BOUNDS_S = (*(m * 10.0**e for e in range(-4, 1) for m in (1.0, 2.5, 5.0)), 10.0)


@dataclass(slots=True)
class EngineCounters:
    """Grow from the worker's start; written by the engine thread, read by any. See `Stats`."""

    steps: int = 0
    step_errors: int = 0
    requests_received: int = 0
    requests_finished: int = 0
    requests_aborted: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    busy_s: float = 0.0
