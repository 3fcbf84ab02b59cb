"""The functions of this folder under one roof: the kernels, or their plain-torch twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from experts.device import KernelKind
from experts.kernels.gpu import combine, grouped_gemm, linear, permute, quantise
from experts.kernels.gpu.permute import SortedPairs


@dataclass(frozen=True, slots=True)
class ExpertOps:
    """Each field is documented where the function of that name is."""

    quantise_rows: Callable[..., tuple[Tensor, Tensor]]
    sort_pairs: Callable[..., SortedPairs]
    gate_up_silu: Callable[..., Tensor]
    down: Callable[..., Tensor]
    sum_pairs: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    silu_mul: Callable[..., Tensor]


TWINS = ExpertOps(
    quantise.quantise_rows_torch,
    permute.sort_pairs_torch,
    grouped_gemm.gate_up_silu_torch,
    grouped_gemm.down_torch,
    combine.sum_pairs_torch,
    linear.linear_torch,
    linear.silu_mul_torch,
)
KERNELS = ExpertOps(
    quantise.quantise_rows,
    permute.sort_pairs,
    grouped_gemm.gate_up_silu,
    grouped_gemm.down,
    combine.sum_pairs,
    linear.linear,
    linear.silu_mul,
)


def expert_ops(kernels: KernelKind) -> ExpertOps:
    """What a ComputeDevice that is not the host asks for."""
    if kernels == "host":
        raise ValueError("the host computes with experts.layer")
    return KERNELS if kernels == "triton" else TWINS
