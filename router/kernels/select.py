"""Choosing the experts of each token from its router logits, on the CPU.

One pass a token over a few hundred numbers: as array operations it takes some twenty calls of
1-5 us each, here 2-4 us for one token in all. The torch twin is `gate.select_experts_torch`.
Rows never look at each other, so a row's result does not depend on its batch.
"""

from typing import Any

import numpy as np

from experts.kernels.jit import compiled

_NEG_INF = np.float32(-np.inf)


@compiled
def _score(logits: Any, softmax: bool, scores: Any) -> None:
    """logits [E] -> scores [E]: softmax over all experts, or a sigmoid of each."""
    num_experts = logits.shape[0]
    if not softmax:
        for e in range(num_experts):
            scores[e] = np.float32(1.0) / (np.float32(1.0) + np.exp(-logits[e]))
        return
    top = logits[0]
    for e in range(1, num_experts):
        top = max(top, logits[e])
    total = 0.0
    for e in range(num_experts):
        scores[e] = np.exp(logits[e] - top)
        total += scores[e]
    for e in range(num_experts):
        scores[e] = np.float32(scores[e] / total)


@compiled
def _drop_groups(choice: Any, num_groups: int, keep: int, by_top2: bool) -> None:
    """choice [E], in place: -inf for the experts of all but the `keep` best groups."""
    size = choice.shape[0] // num_groups
    group_scores = np.empty(num_groups, np.float32)
    for g in range(num_groups):
        first, second = _NEG_INF, _NEG_INF
        for e in range(g * size, (g + 1) * size):
            if choice[e] > first:
                first, second = choice[e], first
            elif choice[e] > second:
                second = choice[e]
        group_scores[g] = first + second if by_top2 and size > 1 else first
    for _ in range(keep):
        best = -1
        for g in range(num_groups):
            if not np.isnan(group_scores[g]) and (best < 0 or group_scores[g] > group_scores[best]):
                best = g
        group_scores[best] = np.nan  # kept
    for g in range(num_groups):
        if not np.isnan(group_scores[g]):
            for e in range(g * size, (g + 1) * size):
                choice[e] = _NEG_INF


@compiled
def _choose(choice: Any, chosen: Any, ids: Any) -> None:
    """choice [E] -> ids [k] of the k largest, ascending; the lowest index wins ties."""
    chosen[:] = False
    for _ in range(ids.shape[0]):
        best = -1
        for e in range(choice.shape[0]):
            if not chosen[e] and (best < 0 or choice[e] > choice[best]):
                best = e
        chosen[best] = True
    j = 0
    for e in range(choice.shape[0]):
        if chosen[e]:
            ids[j] = e
            j += 1


@compiled
def select_experts(
    logits: Any,
    bias: Any,
    num_groups: int,
    keep_groups: int,
    softmax: bool,
    by_top2: bool,
    normalise: bool,
    scale: Any,
    ids: Any,
    weights: Any,
) -> int:
    """logits [T, E] f32, bias [E] f32 or [0] -> ids [T, k] int64 ascending, weights [T, k] f32.

    Returns the first row with a logit that is not finite (nothing is written from there on), or
    -1. Formulas: DeepSeek-V2 report section 2.2.2, DeepSeek-V3 report section 2.1.2.
    """
    num_tokens, num_experts = logits.shape
    scores = np.empty(num_experts, np.float32)
    choice = np.empty(num_experts, np.float32)
    chosen = np.empty(num_experts, np.bool_)
    for t in range(num_tokens):
        for e in range(num_experts):
            if not np.isfinite(logits[t, e]):
                return t
        _score(logits[t], softmax, scores)
        choice[:] = scores
        for e in range(bias.shape[0]):
            choice[e] += bias[e]
        if keep_groups < num_groups:
            _drop_groups(choice, num_groups, keep_groups, by_top2)
        _choose(choice, chosen, ids[t])
        total = np.float32(0.0)
        for j in range(ids.shape[1]):
            weights[t, j] = scores[ids[t, j]]
            total += weights[t, j]
        denominator = total + np.float32(1e-20) if normalise else np.float32(1.0)
        for j in range(ids.shape[1]):
            weights[t, j] = weights[t, j] / denominator * scale
    return -1
