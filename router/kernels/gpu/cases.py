"""What tools/compile_kernels.py compiles of the router: calls on meta tensors in real shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from router.gate import GateSpec
from router.kernels.gpu.combine import combine_rows
from router.kernels.gpu.dispatch import plan_dispatch
from router.kernels.gpu.gate import gate_logits, select_experts
from router.kernels.gpu.pack import pack_rows, pack_rows_fp8

V2_LITE = GateSpec(64, 6)
V2 = GateSpec(160, 6, "softmax", "max", 8, 3, routed_scaling_factor=16.0)
V3 = GateSpec(256, 8, "sigmoid", "top2_sum", 8, 4, True, 2.5)
KIMI = GateSpec(384, 8, "sigmoid", "top2_sum", 1, 1, True, 2.827)
ODD = GateSpec(30, 5, "sigmoid", "top2_sum", 6, 3)

Case = tuple[str, Callable[[], object]]


def cases(native_fp8: bool) -> Iterator[Case]:
    """native_fp8 changes nothing here: fp8 codes are made in integer arithmetic."""
    bf16, f32 = torch.bfloat16, torch.float32
    for model, spec in (("v2-lite", V2_LITE), ("v2", V2), ("v3", V3), ("kimi", KIMI), ("odd", ODD)):
        logits = _meta(f32, 64, spec.num_experts)
        bias = _meta(f32, spec.num_experts) if spec.scoring == "sigmoid" else None
        yield f"select_experts {model}", partial(select_experts, logits, bias, spec)
    shapes = (("v3", 4096, 7168, V3), ("kimi", 1, 7168, KIMI), ("odd", 3, 208, ODD))
    for name, rows, width, spec in shapes:
        weight = _meta(bf16, spec.num_experts, width)
        yield f"gate_logits {name}", partial(gate_logits, _meta(bf16, rows, width), weight)
        ids, weights = _meta(torch.int32, rows, spec.top_k), _meta(f32, rows, spec.top_k)
        holders, load = _meta(torch.int32, spec.num_experts, 3), _meta(torch.int32, 8)
        yield f"plan_dispatch {name}", partial(plan_dispatch, ids, weights, holders, load, 8)
    x, x_exact = _meta(bf16, 64, 7168), _meta(f32, 64, 7168)
    row_index, index = _meta(torch.int32, 512), _meta(torch.int32, 64, 32)
    yield "gate_logits float32", partial(gate_logits, x_exact, _meta(f32, 256, 7168))
    yield "pack_rows v3", partial(pack_rows, x, row_index)
    yield "pack_rows_fp8 v3", partial(pack_rows_fp8, x, row_index, ue8m0=True)
    yield "pack_rows_fp8 float32", partial(pack_rows_fp8, x_exact, row_index)
    yield "combine_rows v3", partial(combine_rows, x, index)
    yield "combine_rows float32", partial(combine_rows, x_exact, index, bf16)


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
