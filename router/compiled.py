"""Compiles or loads the kernels of a router before the first token would wait for them."""

from __future__ import annotations

import numpy as np
import torch

from experts.kernels.finite import all_finite
from experts.linear import Weight
from router.dispatch import Pairs, plan_pairs
from router.gate import GateSpec, GateWeights, choose


def compile_kernels() -> None:
    """Call each once, with a gate of two experts: shapes are no part of their types."""
    x = torch.zeros(1, 4)
    gate = GateWeights(Weight(torch.zeros(2, 4)), torch.zeros(2))
    ids, weights = choose(x, gate, GateSpec(num_experts=2, top_k=1))
    all_finite(x.numpy())
    holders = np.zeros((2, 1), np.int32)
    everyone, nobody = np.ones(1, np.bool_), np.zeros(1, np.int64)
    plan_pairs(Pairs(np.zeros(1, np.int64), ids[0], weights[0]), holders, everyone, nobody)
