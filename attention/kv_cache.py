"""Blocks of the latent cache: who holds which, which still hold a prefix worth sharing. Pure.

A block is in exactly one state: held (ref count > 0), cached (no holder, its content has a hash and
can be shared again) or blank (no holder, no content). Allocation takes blank blocks first, then
evicts the cached block that was released longest ago. held + cached + blank = num_blocks at all
times.

A block's hash covers its tokens and, through the parent's hash, all tokens before it and the
request's salt: equal hash means equal prefix. It is a 128-bit blake2b, not Python's hash(): a
collision would hand one user's context to another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_hash(cache_salt: str) -> bytes:
    """What the first block of a request chains from."""
    return hashlib.blake2b(cache_salt.encode(), digest_size=16, person=b"shoal-prefix").digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block after the blocks hashed by `parent`."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class OutOfBlocks(Exception):
    """More blocks asked for than are free; the caller checks `num_free` first."""


class BlockPool:
    """Reference-counted blocks 0..num_blocks-1 with prefix sharing."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._refs = [0] * num_blocks
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest release first
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated: blank and cached."""
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold num_tokens tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix; nothing is taken yet."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """num_free once `blocks` (from `match`) are held."""
        return self.num_free - sum(1 for block in blocks if not self._refs[block])

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to blocks found by `match`."""
        for block in blocks:
            if not self._refs[block]:
                del self._cached[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder each and no content; raises OutOfBlocks and takes none."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks asked for, {self.num_free} free")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._refs[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each, last block first: a prefix is evicted from its end."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} released but not held")
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            if block in self._hash_of:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Offer a held, fully written block for sharing; the first of a hash stays the one."""
        known = key in self._block_of or block in self._hash_of
        if self.enable_prefix_caching and not known:
            self._block_of[key] = block
            self._hash_of[block] = key
