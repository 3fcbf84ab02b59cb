"""What a warm process still compiles: a new variant of a kernel costs a request seconds.

Triton keeps the variants of each kernel that a process has used; loading one from its files counts
like compiling it, as on a fresh machine that is what happens. The interpreter has no variants.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from gpu_check.plan import Context
from gpu_check.rows import Check

PACKAGES = ("attention", "experts", "router")


def check_warm(
    context: Context, place: str, warm_up: Callable[[], object], serve: Callable[[], object]
) -> Check:
    """How many variants `serve` needs that `warm_up` did not, in a process that had none."""
    for kernel in _kernels():
        kernel.device_caches.clear()
    warm_up()
    before = variants()
    serve()
    new = {name: count - before.get(name, 0) for name, count in variants().items()}
    named = [f"{count} of {name}" for name, count in new.items() if count]
    blind = not before and not context.smoke
    return Check(
        "compiled after warm-up",
        place,
        str(context.compute.dtype).removeprefix("torch."),
        float(sum(new.values())),
        allowed=0.0,
        problem="no kernel was counted" if blind else ", ".join(named),
        note="not counted: the interpreter compiles nothing" if context.smoke else "",
    )


def variants() -> dict[str, int]:
    """Of each kernel of these packages that has any."""
    counts = {
        f"{kernel.fn.__module__}.{kernel.fn.__name__}": sum(
            len(cache) for cache, *_ in kernel.device_caches.values()
        )
        for kernel in _kernels()
    }
    return {name: count for name, count in counts.items() if count}


def _kernels() -> Iterator[Any]:
    from triton.runtime.jit import JITFunction

    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES:
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))
