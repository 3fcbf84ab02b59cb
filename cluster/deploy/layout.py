"""The best that a pool of GPUs can do, tiers apart or together on every GPU. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.deploy.step_time import Limit, Pool, Setting, step_bound

MICRO_BATCHES = (1, 2, 3)


@dataclass(frozen=True)
class Layout:
    """A pool at the batch that gives most tokens. `why` says in words what `limit` is."""

    pool: Pool
    slots_per_worker: int
    sequences: int
    """Running on each attention GPU; 0: it cannot work, and `why` says what is missing."""
    micro_batches: int
    step_s: float
    limit: Limit
    why: str

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Upper bound, over all GPUs of both tiers."""
        if not self.sequences:
            return 0.0
        return self.sequences * self.pool.attention_gpus / self.step_s / self.pool.num_gpus


def best_split(setting: Setting, num_gpus: int, multiple: int = 1) -> Layout:
    """The best division of the GPUs between the tiers, each tier a multiple of `multiple`.

    Raises ValueError if there are too few to divide.
    """
    sizes = range(multiple, num_gpus, multiple)
    if not sizes:
        raise ValueError(f"{num_gpus} GPUs cannot be divided into two tiers")
    layouts = [best_layout(setting, Pool(True, n, num_gpus - n)) for n in sizes]
    return max(layouts, key=lambda layout: layout.tokens_per_s_per_gpu)


def best_colocated(setting: Setting, num_gpus: int) -> Layout:
    """Both tiers on every GPU."""
    return best_layout(setting, Pool(False, num_gpus, num_gpus))


def best_layout(setting: Setting, pool: Pool) -> Layout:
    """The number of micro-batches and of sequences that give most."""
    slots = setting.sizes.slots_per_worker(pool.expert_gpus, redundancy=0)
    blank = Layout(pool, slots, 0, 0, 0.0, "memory", "")
    missing = _what_does_not_fit(setting, pool)
    if missing is not None:
        return replace(blank, why=missing)
    most = int(cache_room_bytes(setting, pool) // _context_bytes(setting))
    filled = [_fill(setting, blank, most, m) for m in MICRO_BATCHES if m <= most]
    return max(filled, key=lambda layout: layout.tokens_per_s_per_gpu)


def cache_room_bytes(setting: Setting, pool: Pool) -> float:
    """What is free for the cache on an attention GPU; negative if the weights alone do not fit."""
    sizes = setting.sizes
    free = setting.gpu.usable_bytes - sizes.attention_worker_bytes()
    return free if pool.is_split else free - _expert_bytes(setting, pool)


def _expert_bytes(setting: Setting, pool: Pool) -> int:
    sizes = setting.sizes
    return sizes.expert_worker_bytes(sizes.slots_per_worker(pool.expert_gpus, redundancy=0))


def _context_bytes(setting: Setting) -> int:
    return setting.context_tokens * setting.sizes.cache_bytes_per_token()


def _what_does_not_fit(setting: Setting, pool: Pool) -> str | None:
    usable, room = setting.gpu.usable_bytes, cache_room_bytes(setting, pool)
    if _expert_bytes(setting, pool) > usable:
        return f"the experts do not fit on {pool.expert_gpus} GPUs"
    if room < 0:
        return "the weights do not fit"
    if room < _context_bytes(setting):
        tokens = int(room // setting.sizes.cache_bytes_per_token())
        return f"the cache of a GPU has room for {tokens} tokens, less than one context"
    return None


def _fill(setting: Setting, blank: Layout, most: int, micro_batches: int) -> Layout:
    """With as many sequences as the cache and the time per token allow: a larger batch never gives
    fewer tokens."""
    sequences = _largest_in_time(setting, blank.pool, most, micro_batches)
    if sequences == 0:
        shortest = step_bound(setting, blank.pool, micro_batches, micro_batches)
        why = f"even {micro_batches} sequence(s) a GPU take {shortest.seconds * 1e3:.1f} ms a token"
        return replace(blank, limit="latency", why=why)
    seconds, limit, why = step_bound(setting, blank.pool, sequences, micro_batches)
    why = f"{why} takes longest"
    if limit is None:
        limit = "memory" if sequences == most else "latency"
        cause = "the cache holds" if sequences == most else "the time per token allows"
        why = f"{why}; {cause} {sequences} sequences a GPU"
    return replace(
        blank,
        sequences=sequences,
        micro_batches=micro_batches,
        step_s=seconds,
        limit=limit,
        why=why,
    )


def _largest_in_time(setting: Setting, pool: Pool, most: int, micro_batches: int) -> int:
    """Sequences on an attention GPU, at least one in each micro-batch; 0 if those are too slow."""

    def fits(sequences: int) -> bool:
        return step_bound(setting, pool, sequences, micro_batches).seconds <= setting.tpot_s

    if not fits(micro_batches):
        return 0
    low, high = micro_batches, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
