"""A kernel's time beside what it costs at least and beside the same work by torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpu_check.accounting import Work
from gpu_check.plan import Context
from gpu_check.rows import Benchmark

Run = Callable[[], object]


def measure(
    context: Context,
    kernel: str,
    shape: str,
    rate: str,
    work: Work,
    run: Run,
    peers: Mapping[str, Callable[[], Run]] | None = None,
    goal: str = "",
) -> Benchmark:
    """peers: by name, what makes their arguments and returns what is timed."""
    timing = context.timer.time(run)
    return Benchmark(
        kernel=kernel,
        shape=shape,
        rate=rate,
        num_bytes=work.num_bytes,
        flops=work.flops,
        seconds=timing.seconds,
        peers={name: _peer(context, make) for name, make in (peers or {}).items()},
        goal=goal,
        note="" if timing.how == "not measured" else timing.how,
    )


def _peer(context: Context, make: Callable[[], Run]) -> float | None:
    """None where this torch has it not, or not for these shapes on this device."""
    try:
        return context.timer.time(make()).seconds
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
