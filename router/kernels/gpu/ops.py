"""The router's device functions as one value: chosen once, handed to whoever computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from router.kernels.gpu import combine, dispatch, gate, pack
from router.kernels.gpu.dispatch import DispatchPlan


@dataclass(frozen=True, slots=True)
class RouterOps:
    """See the functions of these names in router/kernels/gpu."""

    gate_logits: Callable[[Tensor, Tensor], Tensor]
    select_experts: Callable[..., tuple[Tensor, Tensor, Tensor]]
    plan_dispatch: Callable[[Tensor, Tensor, Tensor, Tensor, int], DispatchPlan]
    pack_rows: Callable[[Tensor, Tensor], Tensor]
    pack_rows_fp8: Callable[..., tuple[Tensor, Tensor]]
    combine_rows: Callable[..., Tensor]


def router_ops(kernels: Literal["triton", "torch"]) -> RouterOps:
    """The kernels, or their plain-torch twins."""
    if kernels == "torch":
        return RouterOps(
            gate_logits=gate.gate_logits_torch,
            select_experts=gate.select_experts_torch,
            plan_dispatch=dispatch.plan_dispatch_torch,
            pack_rows=pack.pack_rows_torch,
            pack_rows_fp8=pack.pack_rows_fp8_torch,
            combine_rows=combine.combine_rows_torch,
        )
    return RouterOps(
        gate_logits=gate.gate_logits,
        select_experts=gate.select_experts,
        plan_dispatch=dispatch.plan_dispatch,
        pack_rows=pack.pack_rows,
        pack_rows_fp8=pack.pack_rows_fp8,
        combine_rows=combine.combine_rows,
    )
