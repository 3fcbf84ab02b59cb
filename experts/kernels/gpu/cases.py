"""Calls of every wrapper on meta tensors in shapes of released models, for compiling without a GPU
(tools/compile_kernels.py). d: width of a row, f: of an expert, E: experts of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from experts.kernels.gpu.combine import sum_pairs
from experts.kernels.gpu.grouped_gemm import DeviceWeights, block_rows_for, down, gate_up_silu
from experts.kernels.gpu.linear import linear, silu_mul
from experts.kernels.gpu.permute import sort_pairs
from experts.kernels.gpu.quantise import quantise_rows

NUM_SLOTS = 32


class Shape(NamedTuple):
    d: int
    f: int
    num_experts: int
    experts_per_token: int


SHAPES = {
    "v2-lite": Shape(2048, 1408, 64, 6),
    "v2": Shape(5120, 1536, 160, 6),
    "v3": Shape(7168, 2048, 256, 8),
    "odd": Shape(200, 72, 7, 3),
}
ROWS = (64, 4096)
WEIGHT_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "f32": torch.float32}


def cases(native_fp8: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call); native_fp8: the target multiplies fp8 by fp8."""
    for model, shape in SHAPES.items():
        for num_rows in ROWS:
            for kind in ("bf16", "fp8") if model != "odd" else WEIGHT_DTYPES:
                call = partial(_experts, shape, num_rows, kind, native_fp8)
                yield f"{model}-{num_rows}-{kind}", call
    yield "v3-4096-bf16-deterministic", partial(_experts, SHAPES["v3"], 4096, "bf16", False, True)
    yield (
        "v3-4096-fp8-deterministic",
        partial(_experts, SHAPES["v3"], 4096, "fp8", native_fp8, True),
    )
    # q_a_proj, kv_a_proj_with_mqa (576 rows: half a block of scales), o_proj of V3; an odd one
    for width, length in ((1536, 7168), (576, 7168), (7168, 16384), (72, 200)):
        for num_rows in (1, 64, 4096):
            name = f"linear-{width}-{length}-{num_rows}"
            yield name, partial(_linear, width, length, num_rows, native_fp8)


def _experts(
    shape: Shape, num_rows: int, kind: str, native_fp8: bool, deterministic: bool = False
) -> None:
    d, f, num_experts, per_token = shape
    num_pairs, dtype = num_rows * per_token, WEIGHT_DTYPES[kind]
    rows_dtype = torch.float32 if kind == "f32" else torch.bfloat16
    weights = _weights(d, f, dtype)
    row_ids, slot_of, starts = _ids(num_pairs), _ids(num_experts), _ids(num_rows + 1)
    block_rows = block_rows_for(num_pairs, num_experts, dtype, deterministic=deterministic)
    pairs = sort_pairs(_ids(num_pairs), num_experts, block_rows, _ids(1))
    quantised = native_fp8 and kind == "fp8"
    x = torch.empty(num_rows, d, dtype=rows_dtype, device="meta")
    x, scales = quantise_rows(x) if quantised else (x, None)
    h = gate_up_silu(x, scales, weights, slot_of, pairs, row_ids, out_dtype=rows_dtype)
    h, scales = quantise_rows(h) if quantised else (h, None)
    pair_rows = down(h, scales, weights, slot_of, pairs, _floats(num_pairs))
    sum_pairs(pair_rows, starts, rows_dtype)


def _linear(width: int, length: int, num_rows: int, native_fp8: bool) -> None:
    weight = torch.empty(width, length, dtype=torch.bfloat16, device="meta")
    x = torch.empty(num_rows, length, dtype=torch.bfloat16, device="meta")
    linear(x, weight, deterministic=True)
    scales = _floats(-(-width // 128), -(-length // 128))
    linear(x, weight.to(torch.float8_e4m3fn), scales, fp8_matmul=native_fp8)
    linear(x.float(), weight.to(torch.float8_e4m3fn), scales, out_dtype=torch.float32)
    silu_mul(x)


def _weights(d: int, f: int, dtype: torch.dtype) -> DeviceWeights:
    gate_up = torch.empty(NUM_SLOTS, 2, f, d, dtype=dtype, device="meta")
    down_weight = torch.empty(NUM_SLOTS, d, f, dtype=dtype, device="meta")
    if dtype != torch.float8_e4m3fn:
        return DeviceWeights(gate_up, down_weight)
    rows, columns = -(-f // 128), -(-d // 128)
    scales = _floats(NUM_SLOTS, 2, rows, columns), _floats(NUM_SLOTS, columns, rows)
    return DeviceWeights(gate_up, down_weight, *scales)


def _ids(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32, device="meta")


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")
