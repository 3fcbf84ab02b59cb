"""Section 1: what the device reaches at its best, measured in the same run. Random data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_check.plan import Context, Unit
from gpu_check.rows import COPY, Ceiling

COPY_BYTES = 4 << 30
HOST_BYTES = 1 << 30
MATRIX = 8192
NUM_LAUNCHES = 1000
SMOKE_SIZE = 64


def units(context: Context) -> Iterator[Unit]:
    """One for each ceiling."""
    yield Unit("copy bandwidth", lambda: [copy_bandwidth(context)])
    for dtype in (torch.bfloat16, torch.float32):
        yield Unit(f"{dtype} products", lambda dtype=dtype: [product_rate(context, dtype)])
    if context.has_fp8:
        yield Unit("fp8 products", lambda: [fp8_rate(context)])
    yield Unit("launches", lambda: launches(context))
    yield Unit("host memory", lambda: host_bandwidth(context))


def copy_bandwidth(context: Context) -> Ceiling:
    """Device to device, bytes read plus bytes written."""
    num_bytes = SMOKE_SIZE if context.smoke else COPY_BYTES
    source = torch.randint(
        0, 256, (num_bytes,), dtype=torch.uint8, device=context.device,
        generator=context.generator(0),
    )  # fmt: skip
    target = torch.empty_like(source)
    seconds = context.timer.time(lambda: target.copy_(source)).seconds
    how = f"{num_bytes >> 30} GiB to another place of the device, read plus written"
    return Ceiling(COPY, "GB/s", _per_second(2 * num_bytes, seconds), how)


def product_rate(context: Context, dtype: torch.dtype) -> Ceiling:
    """torch.mm of square matrices; float32 without tf32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    a, b = (_matrix(context, seed).to(dtype) for seed in (1, 2))
    seconds = context.timer.time(lambda: torch.mm(a, b)).seconds
    name = str(dtype).removeprefix("torch.")
    return Ceiling(name, "TFLOP/s", _per_second(_flops(a), seconds), f"torch.mm, {len(a)} cubed")


def fp8_rate(context: Context) -> Ceiling:
    """torch._scaled_mm with one scale a tensor: the better of its two ways to accumulate."""
    a = _matrix(context, 3).to(torch.float8_e4m3fn)
    b = _matrix(context, 4).to(torch.float8_e4m3fn).t()  # column-major, as it must be
    one = torch.ones((), device=context.device)

    def product(fast: bool) -> Callable[[], Tensor]:
        return lambda: torch._scaled_mm(
            a, b, one, one, out_dtype=torch.bfloat16, use_fast_accum=fast
        )

    times = {fast: context.timer.time(product(fast)).seconds for fast in (False, True)}
    rates = {fast: _per_second(_flops(a), seconds) for fast, seconds in times.items()}
    best = max(rates, key=lambda fast: rates[fast] or 0.0)
    how = f"torch._scaled_mm, {len(a)} cubed, use_fast_accum={best}"
    return Ceiling("fp8", "TFLOP/s", rates[best], how)


def launches(context: Context) -> Iterator[Ceiling]:
    """Of a kernel with nothing to do: from Python one after the other, and as a graph's node."""
    x = torch.zeros(1, device=context.device)

    def work() -> None:
        for _ in range(NUM_LAUNCHES):
            x.add_(1)

    timing = context.timer.time(work)
    yield Ceiling(
        "graph node", "us", timing.seconds and timing.seconds / NUM_LAUNCHES, "x.add_(1), replayed"
    )
    eager_s = None if context.smoke else _wall_s(work) / NUM_LAUNCHES
    yield Ceiling("launch", "us", eager_s, "x.add_(1) from Python, back to back")


def host_bandwidth(context: Context) -> Iterator[Ceiling]:
    """Between pinned host memory and the device."""
    num_bytes = SMOKE_SIZE if context.smoke else HOST_BYTES
    host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=not context.smoke)
    device = torch.empty(num_bytes, dtype=torch.uint8, device=context.device)
    pairs = {"host to device": (device, host), "device to host": (host, device)}
    for name, (target, source) in pairs.items():
        seconds = context.timer.time(
            lambda target=target, source=source: target.copy_(source, non_blocking=True)
        ).seconds
        yield Ceiling(name, "GB/s", _per_second(num_bytes, seconds), "pinned memory")


def _matrix(context: Context, seed: int) -> Tensor:
    size = SMOKE_SIZE if context.smoke else MATRIX
    return torch.randn(size, size, device=context.device, generator=context.generator(seed))


def _flops(square: Tensor) -> int:
    return 2 * len(square) ** 3


def _per_second(amount: int, seconds: float | None) -> float | None:
    return None if seconds is None else amount / seconds


def _wall_s(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin
