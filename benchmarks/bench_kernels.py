"""The CPU kernels against torch: linear layers, experts, paged attention.

`python benchmarks/bench_kernels.py --threads 2 --part linear experts attention` prints medians; the
candidates take turns, and weights are taken in turn from more memory than the caches hold, as the
layers of a model are. `GB/s` counts the bytes of the weights once, whatever the batch.
On a machine that others use too, `--cpu-time` with one thread counts only the time on a core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import machine
import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import silu

from attention.kernels.mla_decode import mla_decode, mla_decode_torch
from experts.kernels import runtime
from experts.layer import ExpertWeights, SlotWeights, grouped_swiglu
from experts.linear import Weight, linear

BATCHES = (1, 4, 8, 16, 32, 64, 256, 512)
MATRICES = {"lite 2816 x 2048": (2816, 2048), "small 512 x 512": (512, 512)}
EXPERTS = {  # hidden, width, experts, chosen ones
    "small": (512, 64, 32, 4),
    "lite": (2048, 1408, 64, 6),
}
CACHE_BYTES = 80 << 20
"""Weights are rotated through this much memory: more than twice a 36 MiB last-level cache."""

BLOCK = 5

Candidate = Callable[[int], object]
"""Computes once; the argument says which of the rotated weights to use."""


def bench(candidates: Mapping[str, Candidate], seconds: float, clock: str) -> dict[str, float]:
    """Median seconds of a call of each candidate.

    The candidates take turns of BLOCK calls; the first call of a turn is not counted: torch's
    threads spin for a while after its last operator, on the cores that the next candidate wants.
    """
    now = time.thread_time if clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    turn, end = 0, time.perf_counter() + seconds * len(candidates)
    while turn == 0 or time.perf_counter() < end:
        for name, call in candidates.items():
            call(turn)
            for i in range(1, BLOCK):
                begin = now()
                call(turn + i)
                times[name].append(now() - begin)
        turn += BLOCK
    return {name: statistics.median(taken) for name, taken in times.items()}


def copies_of(first: Tensor) -> list[Tensor]:
    count = min(64, max(2, CACHE_BYTES // first.nbytes))
    return [first, *(first.clone() for _ in range(count - 1))]


def fp8(data: Tensor) -> Weight:
    scale = torch.full((-(-data.shape[0] // 128), -(-data.shape[1] // 128)), 0.01)
    return Weight((data * 100).to(torch.float8_e4m3fn), scale)


def linear_candidates(x: Tensor, full: list[Tensor], half: list[Tensor]) -> dict[str, Candidate]:
    low = x.bfloat16()
    ours = {
        "float32": [Weight(data) for data in full],
        "bf16": [Weight(data) for data in half],
        "fp8": [fp8(data) for data in full],
    }

    def run(weights: list[Weight], turn: int) -> Tensor:
        return linear(x, weights[turn % len(weights)])

    return {f"ours {kind}": partial(run, weights) for kind, weights in ours.items()} | {
        "torch float32": lambda turn: torch_linear(x, full[turn % len(full)]),
        "torch bf16": lambda turn: torch_linear(low, half[turn % len(half)]),
    }


def bench_linear(args: argparse.Namespace) -> None:
    for name, (out, length) in MATRICES.items():
        full = copies_of(torch.randn(out, length))
        half = copies_of(full[0].bfloat16())
        bytes_of = {"float32": full[0].nbytes, "bf16": half[0].nbytes, "fp8": out * length}
        for num_rows in args.batches:
            candidates = linear_candidates(torch.randn(num_rows, length), full, half)
            cells = [
                f"{key} {s * 1e3:8.3f} ms {bytes_of[key.split()[1]] / s / 1e9:5.1f} GB/s "
                f"{2 * num_rows * out * length / s / 1e9:4.0f} GFLOP/s"
                for key, s in bench(candidates, args.seconds, args.clock).items()
            ]
            print(f"linear {name} M={num_rows}: " + " | ".join(cells), flush=True)


def loop_over_experts(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor]], rows: Tensor, slots: Tensor, by: Tensor
) -> Tensor:
    """What an engine without a grouped kernel does: torch's linear per expert."""
    out = torch.zeros(x.shape)
    for slot in slots.unique().tolist():
        pairs = (slots == slot).nonzero().squeeze(1)
        gate, up, down = weights[slot]
        picked = x[rows[pairs]].to(gate.dtype)
        hidden = silu(torch_linear(picked, gate)) * torch_linear(picked, up)
        out.index_add_(0, rows[pairs].long(), torch_linear(hidden, down).float() * by[pairs, None])
    return out


Layer = list[tuple[Tensor, Tensor, Tensor]]


def random_layers(hidden: int, width: int, num_experts: int) -> list[Layer]:
    sides = ((width, hidden), (width, hidden), (hidden, width))
    count = -(-CACHE_BYTES // (2 * 3 * hidden * width * num_experts))

    def expert() -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (torch.randn(side).bfloat16() * 0.02 for side in sides)
        return gate, up, down

    return [[expert() for _ in range(num_experts)] for _ in range(min(8, count))]


def slots_of(layer: Layer) -> SlotWeights:
    slots = SlotWeights(len(layer))
    for slot, (gate, up, down) in enumerate(layer):
        slots.fill(slot, ExpertWeights(Weight(gate), Weight(up), Weight(down)))
    return slots


def random_routes(num_rows: int, num_experts: int, chosen: int) -> list[Tensor]:
    def route() -> Tensor:
        picked = [torch.randperm(num_experts)[:chosen].sort()[0] for _ in range(num_rows)]
        return torch.cat(picked).int()

    return [route() for _ in range(16)]


def expert_candidates(
    x: Tensor, layers: list[Layer], routes: list[Tensor], chosen: int
) -> dict[str, Candidate]:
    held = [slots_of(layer) for layer in layers]
    rows = torch.arange(len(x), dtype=torch.int32).repeat_interleave(chosen)
    by = torch.rand(len(rows))
    return {
        "ours": lambda turn: grouped_swiglu(
            x, held[turn % len(held)], rows, routes[turn % len(routes)], by
        ),
        "torch bf16 loop": lambda turn: loop_over_experts(
            x, layers[turn % len(layers)], rows, routes[turn % len(routes)], by
        ),
    }


def bench_experts(args: argparse.Namespace) -> None:
    for name, (hidden, width, num_experts, chosen) in EXPERTS.items():
        expert_bytes = 2 * 3 * hidden * width
        layers = random_layers(hidden, width, num_experts)
        for num_rows in args.batches:
            routes = random_routes(num_rows, num_experts, chosen)
            active = statistics.mean(len(route.unique()) for route in routes)
            candidates = expert_candidates(torch.randn(num_rows, hidden), layers, routes, chosen)
            cells = [
                f"{key} {s * 1e3:8.3f} ms {active * expert_bytes / s / 1e9:5.1f} GB/s "
                f"{num_rows * chosen * expert_bytes / s / 1e9:4.0f} GFLOP/s"
                for key, s in bench(candidates, args.seconds, args.clock).items()
            ]
            print(f"experts {name} T={num_rows}: " + " | ".join(cells), flush=True)


def attention_candidates(
    num_heads: int, latent: int, rope: int, num_tokens: int, context: int
) -> dict[str, Candidate]:
    num_seqs, blocks = min(num_tokens, 8), context // 16
    call = (
        torch.randn(num_tokens, num_heads, latent),
        torch.randn(num_tokens, num_heads, rope),
        torch.randn(num_seqs * blocks, 16, latent + rope),
        torch.arange(num_seqs * blocks, dtype=torch.int32).view(num_seqs, blocks),
        torch.arange(num_tokens, dtype=torch.int32) % num_seqs,
        torch.full((num_tokens,), context, dtype=torch.int32),
        0.1,
    )
    return {"ours": lambda _: mla_decode(*call), "torch": lambda _: mla_decode_torch(*call)}


def bench_attention(args: argparse.Namespace) -> None:
    shapes = itertools.product(((16, 512, 64), (8, 128, 32)), (1, 8, 64), (128, 1024, 4096))
    for (num_heads, latent, rope), num_tokens, context in shapes:
        candidates = attention_candidates(num_heads, latent, rope, num_tokens, context)
        flops = 2 * num_tokens * context * num_heads * (2 * latent + rope)
        cells = [
            f"{key} {s * 1e3:8.3f} ms {flops / s / 1e9:4.0f} GFLOP/s"
            for key, s in bench(candidates, args.seconds, args.clock).items()
        ]
        shape = f"H={num_heads} c={latent} T={num_tokens} S={context}"
        print(f"attention {shape}: " + " | ".join(cells), flush=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "linear": bench_linear,
    "experts": bench_experts,
    "attention": bench_attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.5, help="of each candidate")
    parser.add_argument(
        "--cpu-time", dest="clock", action="store_const", const="cpu", default="wall"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    found = machine.describe() | {"read_bytes_per_s": machine.read_bandwidth()}
    print(json.dumps(found | {"threads": args.threads, "clock": args.clock}))
    runtime.configure_threads(args.threads)
    begin, cpu = time.perf_counter(), time.process_time()
    reason = runtime.warm_up()
    print(
        f"{reason}; {time.perf_counter() - begin:.2f} s, {time.process_time() - cpu:.2f} s of cpu"
    )
    for part in args.part:
        PARTS[part](args)


if __name__ == "__main__":
    main()
