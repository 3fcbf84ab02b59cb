"""The books of a landing ring, the sender's and the receiver's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.channel.arena import ALIGN, Arena, Claims, aligned
from experts.channel.frame import FrameError


def test_the_lowest_gap_that_fits_is_taken() -> None:
    arena = Arena(10 * ALIGN)
    assert [arena.allocate(2 * ALIGN) for _ in range(5)] == [0, 512, 1024, 1536, 2048]
    assert arena.allocate(1) is None
    arena.free(512)
    arena.free(1536)
    assert arena.allocate(3 * ALIGN) is None  # 4 units are free, in two gaps of 2
    assert arena.allocate(1) == 512
    assert arena.allocate(2 * ALIGN) == 1536
    assert arena.allocate(ALIGN) == 768


def test_neighbours_grow_together() -> None:
    arena = Arena(3 * ALIGN)
    for _ in range(3):
        arena.allocate(ALIGN)
    for offset in (0, 512, 256):
        arena.free(offset)
    assert arena.free_bytes == 3 * ALIGN
    assert arena.allocate(3 * ALIGN) == 0


def test_sizes_are_rounded_up_and_the_end_down() -> None:
    assert [aligned(n) for n in (1, 255, 256, 257)] == [256, 256, 256, 512]
    arena = Arena(2 * ALIGN + 100)
    assert arena.allocate(2 * ALIGN + 1) is None
    assert arena.allocate(2 * ALIGN) == 0
    assert Arena(ALIGN - 1).allocate(1) is None


@pytest.mark.parametrize("offset", [0, 1, 256, 2**70, -256])
def test_only_what_is_in_use_can_be_freed(offset: int) -> None:
    arena = Arena(4 * ALIGN)
    arena.free(arena.allocate(1) or 0)
    with pytest.raises(FrameError, match="released"):
        arena.free(offset)
    assert arena.free_bytes == 4 * ALIGN


@pytest.mark.parametrize(
    ("offset", "length", "field"),
    [
        (1, 10, "offset"),  # between two alignments
        (8 * ALIGN, 1, "offset"),  # behind the ring
        (2**63, 1, "offset"),
        (0, 0, "length"),
        (7 * ALIGN, ALIGN + 1, "length"),  # over the end
        (0, 2**64 - 1, "length"),
        (2 * ALIGN, 10, "offset"),  # taken
        (ALIGN, ALIGN + 1, "offset"),  # begins free, ends in a taken one
        (3 * ALIGN, 1, "offset"),  # inside a taken one
        (0, 8 * ALIGN, "offset"),  # around it
    ],
)
def test_false_claims(offset: int, length: int, field: str) -> None:
    claims = Claims(8 * ALIGN)
    claims.claim(2 * ALIGN, 2 * ALIGN)
    with pytest.raises(FrameError) as caught:
        claims.claim(offset, length)
    assert caught.value.field == field
    assert len(claims) == 1
    claims.claim(ALIGN, ALIGN)  # right before it
    claims.claim(4 * ALIGN, 4 * ALIGN)  # and to the end
    for begin in (ALIGN, 2 * ALIGN, 4 * ALIGN):
        claims.release(begin)
    claims.claim(0, 8 * ALIGN)


steps = st.lists(st.integers(-40, 5000).filter(bool), max_size=80)


@settings(deadline=None)
@given(st.integers(0, 60), steps)
def test_both_books_agree(num_units: int, moves: list[int]) -> None:
    """n > 0: take n bytes; n < 0: give back the -n-th of those in use. The receiver accepts all
    that the sender decides, regions stay apart and inside, and no byte is lost."""
    arena, claims = Arena(num_units * ALIGN), Claims(num_units * ALIGN)
    in_use: dict[int, int] = {}
    for move in moves:
        if move > 0:
            offset = arena.allocate(move)
            if offset is None:
                assert largest_gap(in_use, num_units) < -(-move // ALIGN)
                continue
            claims.claim(offset, move)
            in_use[offset] = aligned(move)
        elif in_use:
            offset = sorted(in_use)[-move % len(in_use)]
            del in_use[offset]
            claims.release(offset)
            arena.free(offset)
        units = [u for at, size in in_use.items() for u in range(at // ALIGN, (at + size) // ALIGN)]
        assert len(units) == len(set(units)) and all(unit < num_units for unit in units)
        assert arena.free_bytes == (num_units - len(units)) * ALIGN
        assert len(claims) == len(in_use)


def largest_gap(in_use: dict[int, int], num_units: int) -> int:
    """In units, counted one by one."""
    taken = {u for at, size in in_use.items() for u in range(at // ALIGN, (at + size) // ALIGN)}
    best = run = 0
    for unit in range(num_units):
        run = 0 if unit in taken else run + 1
        best = max(best, run)
    return best
