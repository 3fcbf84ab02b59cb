"""The gate of a MoE layer: which experts a token visits and with which weights.

    logits = float32(x) float32(Wg)^T                      [T, E]
    scores = softmax(logits) or sigmoid(logits)
    choice = scores + e_score_correction_bias              the bias only chooses
    groups: score each block of E/n_group experts by its largest choice (group_limited_greedy) or
            the sum of its two largest (noaux_tc), keep the best topk_group, the others become -inf
    ids    = the k largest of choice                       ties: the lowest index wins
    weights = scores[ids], divided by their sum if norm_topk_prob, times routed_scaling_factor

Sources: DeepSeek-V2 report section 2.2.2, DeepSeek-V3 report section 2.1.2 and its inference code.
Everything is float32. A row's logits do not depend on its batch (fixed-order product), so merging
micro-batches never changes a choice.
"""

from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experts.config import ModelConfig
from experts.linear import Weight, linear
from router.errors import NonFiniteInput
from router.kernels.select import select_experts

GroupScore = Literal["none", "max", "top2_sum"]
_GROUP_SCORES: dict[str, GroupScore] = {
    "greedy": "none",
    "group_limited_greedy": "max",
    "noaux_tc": "top2_sum",
}
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a model chooses experts; the same for all its MoE layers. Raises ValueError."""

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    group_score: GroupScore = "none"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.num_experts % self.n_group:
            raise ValueError(f"{self.num_experts} experts do not divide by n_group {self.n_group}")
        if not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group {self.topk_group} is not in 1..{self.n_group}")
        if not 1 <= self.top_k <= self.num_candidates:
            raise ValueError(f"num_experts_per_tok {self.top_k} is not in 1..{self.num_candidates}")

    @classmethod
    def of(cls, config: ModelConfig) -> Self:
        """The gate of a checkpoint; `greedy` ignores the groups, as the released code does."""
        group_score = _GROUP_SCORES[config.topk_method]
        grouped = group_score != "none"
        return cls(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            scoring="sigmoid" if config.scoring_func == "sigmoid" else "softmax",
            group_score=group_score,
            n_group=config.n_group if grouped else 1,
            topk_group=config.topk_group if grouped else 1,
            norm_topk_prob=config.norm_topk_prob,
            routed_scaling_factor=config.routed_scaling_factor,
        )

    @property
    def num_candidates(self) -> int:
        """Experts in the groups that a token may use."""
        return self.num_experts // self.n_group * self.topk_group


@dataclass(frozen=True, slots=True, eq=False)
class GateWeights:
    """One layer's gate. weight [E, d] float32; bias [E] float32, None where the model has none."""

    weight: Weight
    bias: Tensor | None = None
    bias_array: Floats = field(init=False, repr=False)  # empty without a bias

    def __post_init__(self) -> None:
        bias = np.empty(0, np.float32) if self.bias is None else self.bias.numpy()
        object.__setattr__(self, "bias_array", bias)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceGate:
    """One layer's gate on a device. weight [E, d] bfloat16 if the file has it so, else float32 (the
    products are exact in float32 either way); bias [E] float32."""

    weight: Tensor
    bias: Tensor | None = None


def route(x: Tensor, gate: GateWeights, spec: GateSpec) -> tuple[Tensor, Tensor]:
    """Choose experts for x [T, d], float32 or a narrower dtype: float32 has all its values.

    Returns topk_ids [T, k] int64, ascending in each row, and topk_weights [T, k] float32.
    Raises NonFiniteInput when a row's logits are not all finite: no expert could answer it.
    """
    topk_ids, topk_weights = choose(x, gate, spec)
    return torch.from_numpy(topk_ids), torch.from_numpy(topk_weights)


def choose(x: Tensor, gate: GateWeights, spec: GateSpec) -> tuple[Ids, Floats]:
    """`route` with arrays as its result: what dispatch works on, 6 us less for one token."""
    logits = linear(x.float(), gate.weight, deterministic=True).numpy()  # [T, E]
    topk_ids = np.empty((len(logits), spec.top_k), np.int64)
    topk_weights = np.empty((len(logits), spec.top_k), np.float32)
    bad_row = select_experts(
        logits,
        gate.bias_array,
        spec.n_group,
        spec.topk_group,
        spec.scoring == "softmax",
        spec.group_score == "top2_sum",
        spec.norm_topk_prob,
        spec.routed_scaling_factor,
        topk_ids,
        topk_weights,
    )
    if bad_row >= 0:
        raise NonFiniteInput(bad_row)
    return topk_ids, topk_weights


def select_experts_torch(
    logits: Tensor, bias: Tensor | None, spec: GateSpec
) -> tuple[Tensor, Tensor]:
    """Plain-torch twin of the kernel: logits [T, E], bias [E] -> ids [T, k], weights [T, k]."""
    finite = logits.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise NonFiniteInput(int((~finite).nonzero()[0, 0]))
    scores = logits.softmax(dim=1) if spec.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias
    if spec.topk_group < spec.n_group:
        choice = _drop_groups(choice, spec)
    topk_ids = _top(choice, spec.top_k).sort(dim=1).values
    topk_weights = scores.gather(1, topk_ids)
    if spec.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=1, keepdim=True) + 1e-20)
    return topk_ids, topk_weights * spec.routed_scaling_factor


def _drop_groups(choice: Tensor, spec: GateSpec) -> Tensor:
    """choice [T, E] with -inf for the experts of the groups that a token lost."""
    grouped = choice.view(choice.shape[0], spec.n_group, -1)  # [T, G, E/G]
    best = 2 if spec.group_score == "top2_sum" else 1
    group_scores = grouped.topk(min(best, grouped.shape[2]), dim=2).values.sum(dim=2)  # [T, G]
    lost = torch.ones_like(group_scores, dtype=torch.bool)
    lost.scatter_(1, _top(group_scores, spec.topk_group), False)
    return grouped.masked_fill(lost.unsqueeze(2), -torch.inf).flatten(1)


def _top(values: Tensor, count: int) -> Tensor:
    """Indices [T, count] of the largest of values [T, N]; a stable sort: the lowest wins ties."""
    return values.sort(dim=1, descending=True, stable=True).indices[:, :count]
