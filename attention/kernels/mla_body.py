"""Compiled paged attention: chunks of a token's context in parallel, then merged in order.

A task is one token against one chunk of CHUNK_TOKENS cached tokens, counted from the start of the
context: its scores, their softmax relative to the chunk's maximum m, and the weighted sum of
latents. Chunks are merged in ascending order with factors e^(m - new maximum) (online softmax,
Milakov and Gimelshein, arXiv 1805.02867; split over the context as in Flash-Decoding). Neither the
batch nor the threads change what is added to what.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import cfunc, njit, types

from attention.kernels.mla_tiles import (
    HEAD_TILES,
    LARGEST_MIX,
    MIX_VECTORS,
    exp_of,
    merge,
    mix_tile,
    score_tile,
    softmax_part,
)
from experts.kernels import elementwise
from experts.kernels.memory import read_f32, read_i32, read_i64, take, write_i32, write_i64
from experts.kernels.pool import NUM_THREADS, allocate, release, run_with_helpers
from experts.kernels.tiles import TILE_ROWS

# mypy: disable-error-code="no-untyped-def,misc,no-untyped-call"

CHUNK_TOKENS: Final = 128
"""295 KB of float32 cache for c + r = 576: read for the scores, then from L2 for the sums."""

_MIX_VECTORS: Final = tuple(MIX_VECTORS.get(heads, 0) for heads in range(LARGEST_MIX + 1))

MAX_PARTIAL_BYTES: Final = 32 << 20
"""Of chunk results held at once; more tokens are done in several rounds."""

# The arguments (all int64), then what the driver adds for the tasks.
POOL: Final = 0
CHUNK_BODY: Final = 1
MERGE_BODY: Final = 2
NUM_TOKENS: Final = 3
NUM_HEADS: Final = 4
LATENT: Final = 5
ROPE: Final = 6
Q_LATENT: Final = 7  # address; then bytes from token to token and from head to head
Q_LATENT_TOKEN: Final = 8
Q_LATENT_HEAD: Final = 9
Q_PE: Final = 10
Q_PE_TOKEN: Final = 11
Q_PE_HEAD: Final = 12
CACHE: Final = 13
CACHE_KIND: Final = 14
BLOCK_SIZE: Final = 15
NUM_BLOCKS: Final = 16
BLOCK_TABLES: Final = 17
NUM_SEQS: Final = 18
MAX_BLOCKS: Final = 19
SEQ_IDS: Final = 20
CONTEXT_LENS: Final = 21
SCALE: Final = 22  # address of a float32
OUT: Final = 23
NUM_ARGUMENTS: Final = 24
NEXT_TASK: Final = 24
NUM_TASKS: Final = 25
TASK_TOKENS: Final = 26  # [num_tasks] int32
FIRST_TASKS: Final = 27  # [num_tokens + 1] int64: tasks of token t of this round
PARTIALS: Final = 28  # [num_tasks] of H * (c + 2) float32: u, then (m, sum) of each head
FIRST_TOKEN: Final = 29  # of this round
LAST_TOKEN: Final = 30
JOB_FIELDS: Final = 32


@njit(inline="always")
def _num_chunks(context_len):
    return (context_len + CHUNK_TOKENS - 1) // CHUNK_TOKENS


@njit(inline="always")
def _partial_floats(job):
    return (read_i64(job, NUM_HEADS) * (read_i64(job, LATENT) + 2) + 15) // 16 * 16


@njit(inline="always")
def _element_bytes(job):
    return 4 if read_i64(job, CACHE_KIND) == 0 else 2


@njit(inline="always")
def _gather_query(job, token, query, pointers):
    """The token's heads as rows of c + r floats, and pointers to them."""
    latent, rope = read_i64(job, LATENT), read_i64(job, ROPE)
    q_latent = read_i64(job, Q_LATENT) + token * read_i64(job, Q_LATENT_TOKEN)
    q_pe = read_i64(job, Q_PE) + token * read_i64(job, Q_PE_TOKEN)
    for head in range(read_i64(job, NUM_HEADS)):
        row = query + 4 * head * (latent + rope)
        elementwise.copy(row, q_latent + head * read_i64(job, Q_LATENT_HEAD), latent)
        elementwise.copy(row + 4 * latent, q_pe + head * read_i64(job, Q_PE_HEAD), rope)
        write_i64(pointers, head, row)


@njit(inline="always")
def _point_to_rows(job, token, start, length, rows):
    """Addresses of the cached rows of context positions start..start + length - 1."""
    block_size = read_i64(job, BLOCK_SIZE)
    row_bytes = (read_i64(job, LATENT) + read_i64(job, ROPE)) * _element_bytes(job)
    seq = read_i32(read_i64(job, SEQ_IDS), token)
    table = read_i64(job, BLOCK_TABLES) + 4 * seq * read_i64(job, MAX_BLOCKS)
    for i in range(length):
        block = (start + i) // block_size
        slot = read_i32(table, block) * block_size + (start + i - block * block_size)
        write_i64(rows, i, read_i64(job, CACHE) + slot * row_bytes)


@njit(inline="always")
def _score(job, rows, start, length, query_pointers, score_pointers):
    """scores[h][i] = query[h] . rows[i]; up to TILE_ROWS - 1 scores past the end may be written."""
    block_size, num_heads = read_i64(job, BLOCK_SIZE), read_i64(job, NUM_HEADS)
    width = read_i64(job, LATENT) + read_i64(job, ROPE)
    row_bytes = width * _element_bytes(job)
    i = 0
    while i < length:
        # Rows of a block follow each other; whatever stands behind the context is not looked at.
        left_in_block = block_size - (start + i) % block_size
        tile_rows = TILE_ROWS if left_in_block >= TILE_ROWS else 1
        head = 0
        while head < num_heads:
            tile_heads = 1
            if tile_rows > 1:
                tile_heads = _largest_tile(HEAD_TILES[0], num_heads - head)
            score_tile(
                read_i64(job, CACHE_KIND), tile_rows, tile_heads, read_i64(rows, i), row_bytes, 0,
                query_pointers + 8 * head, 0, width, score_pointers + 8 * head, 4 * i, 1,
            )  # fmt: skip
            head += tile_heads
        i += tile_rows


@njit(inline="always")
def _largest_tile(tile, num_heads):
    """Half of `tile` heads, and so on, until there are as many."""
    while tile > num_heads:
        tile //= 2
    return tile


@njit(inline="always")
def _mix(job, rows, length, score_pointers, result_pointers):
    """results[h] = sum of scores[h][i] * latent of rows[i]."""
    kind, latent = read_i64(job, CACHE_KIND), read_i64(job, LATENT)
    num_heads, head = read_i64(job, NUM_HEADS), 0
    while head < num_heads:
        tile = _largest_tile(LARGEST_MIX, num_heads - head)
        scores, results = score_pointers + 8 * head, result_pointers + 8 * head
        column = 0
        while column < latent:
            vectors = _MIX_VECTORS[tile] if latent - column >= 16 * _MIX_VECTORS[tile] else 1
            width = min(16, latent - column)
            mix_tile(kind, tile, vectors, scores, rows, column, length, width, results)
            column += 16 * vectors
        head += tile


@cfunc(types.void(types.int64), cache=True)
def attend_chunks(job):
    """Tasks: (u, m, sum) of one token, chunk and all heads."""
    num_heads, latent = read_i64(job, NUM_HEADS), read_i64(job, LATENT)
    counter = job + 8 * NEXT_TASK
    task = take(counter, 1)
    if task >= read_i64(job, NUM_TASKS):
        return
    query_bytes = 4 * num_heads * (latent + read_i64(job, ROPE))
    score_bytes = 4 * (CHUNK_TOKENS + 16)
    memory = allocate(
        read_i64(job, POOL),
        query_bytes + num_heads * (score_bytes + 24) + 8 * (CHUNK_TOKENS + TILE_ROWS),
    )
    query_pointers = memory
    score_pointers = query_pointers + 8 * num_heads
    result_pointers = score_pointers + 8 * num_heads
    rows = result_pointers + 8 * num_heads
    query = rows + 8 * (CHUNK_TOKENS + TILE_ROWS)
    scores = query + query_bytes
    for head in range(num_heads):
        write_i64(score_pointers, head, scores + head * score_bytes)
    while task < read_i64(job, NUM_TASKS):
        token = read_i32(read_i64(job, TASK_TOKENS), task)
        local = token - read_i64(job, FIRST_TOKEN)
        start = (task - read_i64(read_i64(job, FIRST_TASKS), local)) * CHUNK_TOKENS
        length = min(CHUNK_TOKENS, read_i32(read_i64(job, CONTEXT_LENS), token) - start)
        partial = read_i64(job, PARTIALS) + 4 * task * _partial_floats(job)
        stats = partial + 4 * num_heads * latent
        for head in range(num_heads):
            write_i64(result_pointers, head, partial + 4 * head * latent)
        _gather_query(job, token, query, query_pointers)
        _point_to_rows(job, token, start, length, rows)
        _score(job, rows, start, length, query_pointers, score_pointers)
        for head in range(num_heads):
            scale = read_f32(read_i64(job, SCALE), 0)
            softmax_part(scores + head * score_bytes, length, scale, stats + 8 * head)
        _mix(job, rows, length, score_pointers, result_pointers)
        task = take(counter, 1)
    release(read_i64(job, POOL), memory)


@cfunc(types.void(types.int64), cache=True)
def merge_chunks(job):
    """Tasks: the chunks of one token, merged in ascending order, divided by the sum."""
    num_heads, latent = read_i64(job, NUM_HEADS), read_i64(job, LATENT)
    first_tasks, first_token = read_i64(job, FIRST_TASKS), read_i64(job, FIRST_TOKEN)
    floats = _partial_floats(job)
    counter = job + 8 * NEXT_TASK
    local = take(counter, 1)
    while first_token + local < read_i64(job, LAST_TOKEN):
        first, last = read_i64(first_tasks, local), read_i64(first_tasks, local + 1)
        for head in range(num_heads):
            out = read_i64(job, OUT) + 4 * ((first_token + local) * num_heads + head) * latent
            partial = read_i64(job, PARTIALS) + 4 * first * floats
            stats = partial + 4 * num_heads * latent + 8 * head
            highest, total = read_f32(stats, 0), read_f32(stats, 1)
            elementwise.copy(out, partial + 4 * head * latent, latent)
            for _ in range(first + 1, last):
                partial += 4 * floats
                stats += 4 * floats
                new = max(highest, read_f32(stats, 0))
                kept, added = exp_of(highest - new), exp_of(read_f32(stats, 0) - new)
                merge(out, kept, partial + 4 * head * latent, added, latent)
                total = total * kept + read_f32(stats, 1) * added
                highest = new
            elementwise.scale(out, latent, np.float32(1.0) / total)
        local = take(counter, 1)


@njit
def _first_bad_token(arguments):
    """Index of the first token whose sequence, length or blocks do not exist, or -1."""
    tables, max_blocks = read_i64(arguments, BLOCK_TABLES), read_i64(arguments, MAX_BLOCKS)
    for token in range(read_i64(arguments, NUM_TOKENS)):
        seq = read_i32(read_i64(arguments, SEQ_IDS), token)
        length = read_i32(read_i64(arguments, CONTEXT_LENS), token)
        if seq < 0 or seq >= read_i64(arguments, NUM_SEQS) or length < 1:
            return token
        num_blocks = (length - 1) // read_i64(arguments, BLOCK_SIZE) + 1
        if num_blocks > max_blocks:
            return token
        for block in range(num_blocks):
            block_id = read_i32(tables, seq * max_blocks + block)
            if block_id < 0 or block_id >= read_i64(arguments, NUM_BLOCKS):
                return token
    return -1


@cfunc(types.int64(types.int64), cache=True)
def mla_driver(arguments):
    """All tokens of a call; -1, or the index of the first bad token (then nothing is computed)."""
    bad = _first_bad_token(arguments)
    if bad >= 0:
        return bad
    pool, num_tokens = read_i64(arguments, POOL), read_i64(arguments, NUM_TOKENS)
    lens = read_i64(arguments, CONTEXT_LENS)
    task_bytes = 4 * _partial_floats(arguments)
    most_tasks, most_chunks = 0, 0
    for token in range(num_tokens):
        chunks = _num_chunks(read_i32(lens, token))
        most_tasks += chunks
        most_chunks = max(most_chunks, chunks)
    most_tasks = max(most_chunks, min(most_tasks, MAX_PARTIAL_BYTES // task_bytes))
    ints = JOB_FIELDS + num_tokens + 1 + most_tasks
    ints = (ints + 7) // 8 * 8
    job = allocate(pool, 8 * ints + most_tasks * task_bytes)
    for field in range(NUM_ARGUMENTS):
        write_i64(job, field, read_i64(arguments, field))
    first_tasks = job + 8 * JOB_FIELDS
    task_tokens = first_tasks + 8 * (num_tokens + 1)
    write_i64(job, FIRST_TASKS, first_tasks)
    write_i64(job, TASK_TOKENS, task_tokens)
    write_i64(job, PARTIALS, job + 8 * ints)
    first = 0
    while first < num_tokens:
        last, tasks = first, 0
        write_i64(first_tasks, 0, 0)
        while last < num_tokens and tasks + _num_chunks(read_i32(lens, last)) <= most_tasks:
            for _ in range(_num_chunks(read_i32(lens, last))):
                write_i32(task_tokens, tasks, last)
                tasks += 1
            last += 1
            write_i64(first_tasks, last - first, tasks)
        write_i64(job, FIRST_TOKEN, first)
        write_i64(job, LAST_TOKEN, last)
        write_i64(job, NUM_TASKS, tasks)
        num_threads = min(tasks, read_i64(pool, NUM_THREADS))
        write_i64(job, NEXT_TASK, 0)
        run_with_helpers(pool, num_threads, read_i64(job, CHUNK_BODY), job)
        write_i64(job, NEXT_TASK, 0)
        run_with_helpers(pool, num_threads, read_i64(job, MERGE_BODY), job)
        first = last
    release(pool, job)
    return -1
