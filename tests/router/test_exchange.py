"""The router over healthy expert workers: right, and bit-equal where it promises to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experts.channel.codec import HEADER_BYTES
from experts.checkpoint import Checkpoint
from router.errors import NonFiniteInput
from tests.reference import Reference
from tests.router.pool import NewPool, every_expert, expected, some_rows, spread

LAYER = 2


@pytest.mark.parametrize("num_workers", [1, 2, 4])
@pytest.mark.parametrize("scheme", ["inproc", "unix"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_equals_one_expert_at_a_time(
    scheme: str,
    num_workers: int,
    deterministic: bool,
    new_pool: NewPool,
    checkpoint_dir: Callable[[str], Path],
    socket_folder: Path,
) -> None:
    folder = checkpoint_dir("v2-lite")
    checkpoint = Checkpoint.open(folder)
    held = spread(checkpoint, num_workers, replicas=min(2, num_workers))
    pool = new_pool(checkpoint, held, socket_folder if scheme == "unix" else None)
    router = pool.router(deterministic=deterministic)
    reference = Reference(folder)
    for layer in checkpoint.config.moe_layers:
        x = some_rows(9, checkpoint, seed=layer)
        torch.testing.assert_close(
            router.forward(layer, x), expected(reference, layer, x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("preset", ["v2", "v3", "kimi-k2", "v3fp8", "v3fp8-ragged"])
def test_every_kind_of_gate_and_weight(
    preset: str, new_pool: NewPool, checkpoint_dir: Callable[[str], Path]
) -> None:
    folder = checkpoint_dir(preset)
    checkpoint = Checkpoint.open(folder)
    router = new_pool(checkpoint, spread(checkpoint, 3)).router()
    layer = checkpoint.config.moe_layers[-1]
    x = some_rows(20, checkpoint)
    y, reference = router.forward(layer, x), expected(Reference(folder), layer, x)
    assert float((y - reference).norm() / reference.norm()) < 1e-5


def test_deterministic_bits_are_the_same_under_every_placement(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    x = some_rows(33, checkpoint)
    placements = [
        spread(checkpoint, 1),
        spread(checkpoint, 2),
        spread(checkpoint, 4, replicas=3),
        {"a": set(every_expert(checkpoint)[::3]), "b": set(every_expert(checkpoint))},
    ]
    results = []
    for held in placements:
        router = new_pool(checkpoint, held).router(deterministic=True)
        results.append(router.forward(LAYER, x))
        alone = [router.forward(LAYER, row) for row in x.split(1)]
        results.append(torch.cat(alone))
        results.append(new_pool(checkpoint, held).router(
            deterministic=True, max_batch_rows=5).forward(LAYER, x))  # fmt: skip
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_two_micro_batches_at_a_time(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 2)).router()
    a, b = some_rows(3, checkpoint, 1), some_rows(40, checkpoint, 2)
    pending_a, pending_b = router.begin(1, a), router.begin(2, b)
    y_b, y_a = router.finish(pending_b), router.finish(pending_a)
    assert torch.equal(y_a, router.forward(1, a))
    assert torch.equal(y_b, router.forward(2, b))


def test_large_micro_batches_in_flight_do_not_block_each_other(
    new_pool: NewPool, checkpoint: Checkpoint, socket_folder: Path
) -> None:
    """Far more bytes than the socket buffers hold, both ways, on one connection."""
    router = new_pool(checkpoint, spread(checkpoint, 1), socket_folder).router()
    x = some_rows(3000, checkpoint)
    first, second = router.begin(1, x), router.begin(2, x)
    assert router.finish(first).shape == router.finish(second).shape == x.shape


def test_no_tokens(new_pool: NewPool, checkpoint: Checkpoint) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 2)).router()
    assert router.forward(LAYER, some_rows(0, checkpoint)).shape == (0, 128)


def test_a_row_that_is_not_finite_costs_no_worker(
    new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 2)).router()
    x = some_rows(4, checkpoint)
    bad = x.clone()
    bad[2, 7] = float("nan")
    with pytest.raises(NonFiniteInput, match="row 2"):
        router.forward(LAYER, bad)
    router.forward(LAYER, x)
    assert sum(c.resent_pairs for c in router.counters) == 0


@pytest.mark.parametrize(("layer", "width"), [(0, 128), (LAYER, 64), (99, 128)])
def test_foreign_layers_and_widths_are_refused(
    layer: int, width: int, new_pool: NewPool, checkpoint: Checkpoint
) -> None:
    router = new_pool(checkpoint, spread(checkpoint, 1)).router()
    with pytest.raises(ValueError, match="expected a MoE layer"):
        router.forward(layer, torch.zeros(1, width))


@pytest.mark.parametrize("deterministic", [False, True])
def test_bytes_on_the_wire(
    deterministic: bool,
    new_pool: NewPool,
    checkpoint_dir: Callable[[str], Path],
    socket_folder: Path,
) -> None:
    """One copy of a row to each worker that the token visits, 12 bytes a pair, one header a frame;
    back one row a visit, or one a pair if deterministic. Whole groups on workers: at most 3 visits,
    V2's limit, where 6 experts on 8 workers would have needed up to 6."""
    checkpoint = Checkpoint.open(checkpoint_dir("v2"))
    config = checkpoint.config
    held: dict[str, set[tuple[int, int]]] = {f"w{group}": set() for group in range(8)}
    for layer, expert in every_expert(checkpoint):
        held[f"w{expert // config.experts_per_group}"].add((layer, expert))
    pool = new_pool(checkpoint, held, socket_folder)
    router = pool.router(deterministic=deterministic)
    num_tokens, row_bytes = 50, 4 * config.hidden_size
    router.forward(LAYER, some_rows(num_tokens, checkpoint))
    counters = router.counters[0]
    assert (counters.tokens, counters.pairs) == (num_tokens, 6 * num_tokens)
    assert counters.visits <= 3 * num_tokens
    workers = list(pool.workers.values())
    pool.close()  # joins the servers' threads: they count what they sent after sending
    frames = sum(worker.counters.batches for worker in workers)
    received = sum(worker.channel_counters.bytes_in for worker in workers)
    sent = sum(worker.channel_counters.bytes_out for worker in workers)
    back = counters.pairs if deterministic else counters.visits
    assert received == frames * HEADER_BYTES + 12 * counters.pairs + counters.visits * row_bytes
    assert sent == frames * HEADER_BYTES + back * row_bytes
