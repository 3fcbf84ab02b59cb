"""Logits to token ids. A token depends on its row of logits, the request's parameters and its
position only.

Order of a row: allowed_token_ids, logit_bias, penalties, min_tokens mask, then temperature 0: the
largest logit (lowest id among equals), else weights exp((x - max) / temperature), min_p, top_k,
top_p, and one uniform number against the cumulative weights in order of id. The number is a
counter-based Philox value of (seed, position), so batches, preemption, replay on another worker and
retries cannot change a token.

Filters: min_p keeps weight >= min_p * the largest; top_k keeps exactly k, lowest ids first among
equals; top_p keeps the shortest run, by falling weight, whose share of what is left reaches top_p.
Penalties as in vLLM: repetition counts prompt and output, presence and frequency the output only.
Logprobs are of the unmodified distribution, as OpenAI and vLLM report them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from attention.messages import SamplingParams, TokenLogprob

FloatRow = NDArray[np.float64]
IdRow = NDArray[np.int64]
_DRAWS_CACHED = 64
NOT_FINITE = -1
"""Token id of a row whose largest logit is nan or infinite."""


@lru_cache(maxsize=4096)
def _uniforms(seed: int, chunk: int) -> tuple[float, ...]:
    """Numbers chunk*64 .. chunk*64+63 of a seed's stream (a Philox counter gives 4)."""
    generator = np.random.Philox(key=seed % 2**128, counter=chunk * (_DRAWS_CACHED // 4))
    words = generator.random_raw(_DRAWS_CACHED) >> np.uint64(11)
    return tuple((words * 2.0**-53).tolist())


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that decides the token at `position` of a request with this seed."""
    return _uniforms(seed, position // _DRAWS_CACHED)[position % _DRAWS_CACHED]


class TokenCounts:
    """Which ids a request has seen: what the three penalties need."""

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()):
        self.seen = set(prompt_ids)
        self.outputs: dict[int, int] = {}
        for token_id in output_ids:
            self.add(token_id)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )

    def add(self, token_id: int) -> None:
        self.seen.add(token_id)
        self.outputs[token_id] = self.outputs.get(token_id, 0) + 1

    def apply(self, x: FloatRow, params: SamplingParams) -> None:
        """Penalise the logits x [V] in place."""
        if params.repetition_penalty != 1.0:
            seen = np.fromiter(self.seen, np.int64, len(self.seen))
            values, factor = x[seen], params.repetition_penalty
            x[seen] = np.where(values > 0, values / factor, values * factor)
        if self.outputs:
            ids = np.fromiter(self.outputs.keys(), np.int64, len(self.outputs))
            counts = np.fromiter(self.outputs.values(), np.float64, len(self.outputs))
            x[ids] -= params.frequency_penalty * counts + params.presence_penalty


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What the choice of one token depends on besides its logits."""

    params: SamplingParams
    position: int
    """Tokens the request has put out before this one."""
    counts: TokenCounts | None = None
    end_ids: tuple[int, ...] = ()
    """Ids that end the request: not to be chosen while position < min_tokens."""

    @property
    def is_plain_greedy(self) -> bool:
        """The largest raw logit decides."""
        params = self.params
        return (
            params.temperature == 0.0
            and self.counts is None
            and not params.logit_bias
            and params.allowed_token_ids is None
            and self.position >= params.min_tokens
        )


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token; token_id is NOT_FINITE if the logits were unusable."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(logits: NDArray[np.float32], rows: Sequence[SampleRow]) -> list[Sampled]:
    """Choose a token for every row of logits [R, V]."""
    best = logits.argmax(axis=1)  # numpy: first of equals, and a nan wins
    finite = np.isfinite(logits[np.arange(len(rows)), best]).tolist()
    sampled = []
    for index, (row, token_id) in enumerate(zip(rows, best.tolist(), strict=True)):
        if not finite[index]:
            sampled.append(Sampled(NOT_FINITE))
            continue
        if not row.is_plain_greedy:
            token_id = choose(logits[index], row)
        top = row.params.logprobs
        logprob = None if top is None else token_logprob(logits[index], token_id, top)
        sampled.append(Sampled(token_id, logprob))
    return sampled


def choose(logits: NDArray[np.float32], row: SampleRow) -> int:
    """The token of one row of finite logits [V]."""
    x = adjusted(logits, row)
    if row.params.temperature == 0.0:
        return int(x.argmax())
    ids, weights = distribution(x, row.params)
    return draw(ids, weights, uniform(row.params.seed or 0, row.position))


def adjusted(logits: NDArray[np.float32], row: SampleRow) -> FloatRow:
    """Logits after masks, bias and penalties: float64 [V], -inf where forbidden."""
    params, x = row.params, logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        allowed = np.full_like(x, -np.inf)
        keep = np.array(params.allowed_token_ids, np.int64)
        allowed[keep] = x[keep]
        x = allowed
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    if row.counts is not None:
        row.counts.apply(x, params)
    if row.position < params.min_tokens and row.end_ids:
        going_on = x.copy()
        going_on[list(row.end_ids)] = -np.inf
        if (
            going_on.max() > -np.inf
        ):  # else only end ids are allowed, and ending is all that is left
            x = going_on
    return x


def largest(x: NDArray[np.floating], count: int) -> IdRow:
    """Ids of the `count` largest of x [V], largest first, lowest id first among equals."""
    if count >= len(x):
        return np.argsort(-x, kind="stable")
    bound = np.partition(x, len(x) - count)[len(x) - count]
    ids = np.flatnonzero(x >= bound)  # more than `count` if some equal the bound
    return ids[np.argsort(-x[ids], kind="stable")[:count]]


def distribution(x: FloatRow, params: SamplingParams) -> tuple[IdRow | None, FloatRow]:
    """Ids that may be chosen, ascending (None: all), and their weights (the largest is 1)."""
    weights = np.exp((x - x.max()) / params.temperature)
    ids = None
    if params.min_p > 0.0:
        ids = np.flatnonzero(weights >= params.min_p)
    if 0 < params.top_k < (len(weights) if ids is None else len(ids)):
        ids = _narrow(ids, np.sort(largest(_of(weights, ids), params.top_k)))
    if params.top_p < 1.0:
        ids = _narrow(ids, np.sort(_nucleus(_of(weights, ids), params.top_p)))
    return ids, _of(weights, ids)


def _of(weights: FloatRow, ids: IdRow | None) -> FloatRow:
    return weights if ids is None else weights[ids]


def _narrow(ids: IdRow | None, places: IdRow) -> IdRow:
    return places if ids is None else ids[places]


def _nucleus(weights: FloatRow, top_p: float) -> IdRow:
    """Places of the fewest largest weights that together reach top_p of the sum.

    Looks at few of the largest first: a nucleus is small as a rule, and sorting a vocabulary of
    129,280 takes 10 ms.
    """
    wanted = top_p * weights.sum()
    for count in (64, 1024, 16384, len(weights)):
        order = largest(weights, min(count, len(weights)))
        mass = np.cumsum(weights[order])
        if mass[-1] >= wanted:
            break
    return order[: int(np.searchsorted(mass, wanted)) + 1]


def draw(ids: IdRow | None, weights: FloatRow, u: float) -> int:
    """Inverse of the cumulative weights at u in [0, 1); a weight of 0 is never chosen."""
    mass = np.cumsum(weights)
    place = int(np.searchsorted(mass, u * mass[-1], side="right"))
    if place == len(mass):  # u * sum was rounded up to the sum
        place = int(np.searchsorted(mass, mass[-1]))
    return place if ids is None else int(ids[place])


def token_logprob(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprob:
    """Log probability of a token and of the most likely ones, from raw logits [V]."""
    x = logits.astype(np.float64)
    peak = x.max()
    x -= peak + np.log(np.exp(x - peak).sum())
    top = largest(x, num_top) if num_top else np.empty(0, np.int64)
    return TokenLogprob(
        token_id=token_id,
        logprob=float(x[token_id]),
        top=list(zip(top.tolist(), x[top].tolist(), strict=True)),
    )
