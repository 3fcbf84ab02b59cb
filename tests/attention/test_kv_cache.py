"""Blocks are conserved, shared by prefix, evicted oldest first."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kv_cache import BlockPool, OutOfBlocks, block_hash, root_hash


def chain(*blocks: list[int], salt: str = "") -> list[bytes]:
    hashes = [root_hash(salt)]
    for block in blocks:
        hashes.append(block_hash(hashes[-1], block))
    return hashes[1:]


def published(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    """Blocks that were computed under these hashes and then released."""
    blocks = pool.allocate(len(hashes))
    for block, key in zip(blocks, hashes, strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    return blocks


def test_a_hash_covers_the_whole_prefix_and_the_salt() -> None:
    first = chain([1, 2], [3, 4])
    assert first == chain([1, 2], [3, 4])
    assert first[1] != chain([1, 9], [3, 4])[1]
    assert first[0] != chain([1, 2], salt="tenant")[0]
    assert len(set(first)) == 2


def test_released_prefix_is_matched_held_and_counted() -> None:
    pool = BlockPool(4, 2)
    hashes = chain([1, 2], [3, 4])
    blocks = published(pool, hashes)
    assert (pool.num_free, pool.num_cached) == (4, 2)
    assert pool.match([*hashes, *chain([7, 7])]) == blocks
    assert pool.num_free_without(blocks) == 2
    pool.hold(blocks)
    pool.hold(blocks)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    pool.release(blocks)
    assert pool.num_free == 2
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (4, 2)


def test_blank_blocks_go_first_then_the_end_of_the_oldest_prefix() -> None:
    pool = BlockPool(4, 2)
    old, new = chain([1, 1], [2, 2]), chain([3, 3])
    published(pool, old)
    published(pool, new)
    pool.allocate(1)  # the blank one
    assert len(pool.match(old)) == 2
    pool.allocate(1)
    assert len(pool.match(old)) == 1
    pool.allocate(1)
    assert pool.match(old) == []
    assert len(pool.match(new)) == 1


def test_the_first_block_of_a_hash_stays_the_shared_one() -> None:
    pool = BlockPool(4, 2)
    hashes = chain([1, 2])
    first, second = pool.allocate(1), pool.allocate(1)
    pool.publish(first[0], hashes[0])
    pool.publish(second[0], hashes[0])
    assert pool.match(hashes) == first
    pool.release(second)
    assert pool.num_cached == 0


def test_without_prefix_caching_nothing_is_matched() -> None:
    pool = BlockPool(2, 2, enable_prefix_caching=False)
    hashes = chain([1, 2])
    published(pool, hashes)
    assert pool.match(hashes) == []
    assert pool.num_cached == 0


def test_too_large_a_request_takes_nothing() -> None:
    pool = BlockPool(2, 2)
    with pytest.raises(OutOfBlocks, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)


@settings(deadline=None)  # machines are shared
@given(st.data())
def test_blocks_are_conserved(data: st.DataObject) -> None:
    pool = BlockPool(6, 2)
    held: list[list[int]] = []
    chains = [chain([i, i], [i, i + 1]) for i in range(3)]

    def allocate() -> None:
        if pool.num_free:
            held.append(pool.allocate(data.draw(st.integers(1, pool.num_free))))

    def share() -> None:
        blocks = pool.match(data.draw(st.sampled_from(chains)))
        pool.hold(blocks)
        held.append(blocks)

    def publish() -> None:
        for blocks in held:
            hashes = data.draw(st.sampled_from(chains))
            for block, key in zip(blocks, hashes, strict=False):
                pool.publish(block, key)

    def release() -> None:
        if held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))

    steps: list[Callable[[], None]] = [allocate, share, publish, release]
    for _ in range(12):
        data.draw(st.sampled_from(steps))()
        distinct = {block for blocks in held for block in blocks}
        assert pool.num_free == 6 - len(distinct)
    while held:
        pool.release(held.pop())
    assert pool.num_free == 6
    assert sorted(pool.allocate(6)) == list(range(6))
    assert pool.num_cached == 0
