"""One tile of a product x . w^T and what all products of this folder share.

Three ways to multiply, by the types of the operands:

    PLAIN    x and w bfloat16 or float32
    SCALED   x and w e4m3: (q . q) of 128 channels, times the row's scale and the block's
    DECODED  w e4m3, x not: the codes become numbers of x's type, the block's scale comes after

All sums are float32. With few rows a tile is computed transposed, w . x^T: the matrix instructions
of sm_90 and later take 64 rows from their first operand but as few as 8 from their second. None of
the sizes below was measured on a GPU yet; they follow from shared memory (stages x (rows + columns)
x depth) and registers, which tools/compile_kernels.py checks for three targets.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from experts.kernels.gpu.fp8 import decode_e4m3

PLAIN: Final = tl.constexpr(0)
SCALED: Final = tl.constexpr(1)
DECODED: Final = tl.constexpr(2)
_INTERPRETED: Final = tl.constexpr(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """Sizes of one program's share: `rows` of x, twice `columns` (rows of w), `depth` a step."""

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    swap: bool = False
    """Compute the transposed tile."""


def tile_for(block_rows: int, mode: tl.constexpr, x: torch.Tensor) -> Tile:
    """A step's bytes are those of `rows` of x and 2 x `columns` of the weight; the comments say
    what all stages take.

    Before sm_90 one stage less lies there. 128 x 256 is what keeps the L2 cache's bandwidth from
    being the limit with many rows; smaller tiles leave room for a second block on a multiprocessor,
    which computes while one waits. Two targets have not the registers for 128 x 256: sm_80 for
    addresses, sm_100 for fp8's scales."""
    is_odd = x.shape[1] % 16 != 0  # read number by number, with an address each
    if x.dtype == torch.float32:  # no matrix instructions
        return Tile(block_rows, 32, 16 if is_odd else 32, 2, 4)
    if is_odd:
        return Tile(block_rows, 32, 32, 2, 8 if block_rows == 128 else 4)
    if mode is SCALED:
        return {
            16: Tile(16, 64, 128, 6, 4, swap=True),  # 108 KiB
            64: Tile(64, 64, 128, 4, 4),  # 96 KiB
            128: Tile(128, 128 if 90 <= _arch() < 100 else 64, 128, 4, 8),  # 192 or 128 KiB
        }[block_rows]
    if mode is DECODED:
        return {
            16: Tile(16, 64, 128, 4, 4),  # 80 KiB
            64: Tile(64, 64, 64, 4, 4),  # 64 KiB
            128: Tile(128, 64, 64, 3, 8),  # 72 KiB
        }[block_rows]
    return {
        16: Tile(16, 64, 128, 3, 4, swap=True),  # 108 KiB
        64: Tile(64, 64, 64, 4, 4),  # 96 KiB
        128: Tile(128, 64 if _arch() < 90 else 128, 64, 4, 8),  # 128 or 192 KiB
    }[block_rows]


@triton.jit
def zero_tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr, SWAP: tl.constexpr):
    """A tile of zeros, float32."""
    return tl.zeros((COLUMNS if SWAP else ROWS, ROWS if SWAP else COLUMNS), tl.float32)


@triton.jit
def multiply_add(total, x, w, x_scale, w_scale, MODE: tl.constexpr, SWAP: tl.constexpr):
    """total + x [rows, depth] . w [columns, depth]^T, transposed with SWAP.

    x_scale [rows] and w_scale (one number) as MODE asks for them; else not looked at."""
    if MODE == DECODED:
        w = decode_e4m3(w, x.dtype)
    if _INTERPRETED and x.dtype == tl.bfloat16:  # it would multiply their bits as integers
        x, w = x.to(tl.float32), w.to(tl.float32)
    if SWAP:
        x, w = w, x
    if MODE == PLAIN:
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    else:
        product = tl.dot(x, tl.trans(w), input_precision="ieee")
        if MODE == DECODED:
            total += product * w_scale
        elif SWAP:
            total += product * (x_scale * w_scale)[None, :]
        else:
            total += product * (x_scale * w_scale)[:, None]
    return total


@triton.jit
def weight_tile(
    w, row, last, length, k,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """[COLUMNS, DEPTH] of a weight [.., length] from (row, k) on: zeros behind its length, anything
    behind its last row, as those columns of the product are not stored."""
    if BY_DESCRIPTOR:  # one thread asks the copy engine: no addresses in registers
        tile = w.load([row.to(tl.int32), k])
    else:
        rows = tl.minimum(row + tl.arange(0, COLUMNS), last).to(tl.int64)
        depth = tl.arange(0, DEPTH)
        at = w + rows[:, None] * length + depth[None, :]
        tile = tl.load(at + k, (depth < length - k)[None, :], other=0.0)
    return tile


@triton.jit
def two_products(
    x_at, x_scale_at, is_row, w, w_scales, row_a, row_b, last_a, last_b, scales_a, scales_b,
    length, first, stop,
    MODE: tl.constexpr, SWAP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BY_DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Rows of x times COLUMNS rows of w from row_a on, and from row_b on: [ROWS, COLUMNS] each.

    Two sums, as the gate and up of an expert need, or two halves of a wider tile: with fp8 a step's
    product waits in registers for its scales, and half of it is half the registers.
    x_at, x_scale_at [ROWS]: where a row and its scales begin; scales_a, scales_b: offsets in
    w_scales likewise; length: of a row; channels first..stop-1 are summed.
    """
    depth = tl.arange(0, DEPTH)
    a = zero_tile(ROWS, COLUMNS, SWAP)
    b = zero_tile(ROWS, COLUMNS, SWAP)
    for k in range(first, stop, DEPTH):
        inside = is_row[:, None] & (depth < length - k)[None, :]
        x = tl.load(x_at[:, None] + (k + depth)[None, :], inside, other=0.0)
        w_a = weight_tile(w, row_a, last_a, length, k, COLUMNS, DEPTH, BY_DESCRIPTOR)
        w_b = weight_tile(w, row_b, last_b, length, k, COLUMNS, DEPTH, BY_DESCRIPTOR)
        group = k // 128
        x_scale = tl.load(x_scale_at + group, is_row, other=0.0) if MODE == SCALED else 0.0
        scale_a = tl.load(w_scales + scales_a + group) if MODE != PLAIN else 0.0
        scale_b = tl.load(w_scales + scales_b + group) if MODE != PLAIN else 0.0
        a = multiply_add(a, x, w_a, x_scale, scale_a, MODE, SWAP)
        b = multiply_add(b, x, w_b, x_scale, scale_b, MODE, SWAP)
    if SWAP:
        a, b = tl.trans(a), tl.trans(b)
    return a, b


@triton.jit
def tile_of_program(program, num_blocks, num_tiles, GROUP: tl.constexpr):
    """(block of rows, tile of columns): GROUP blocks share a tile before the next tile's turn, so
    that weights and rows are found in the L2 cache."""
    per_group = GROUP * num_tiles
    first = program // per_group * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    return first + program % per_group % size, program % per_group // size


def mode_of(x: torch.Tensor, weight: torch.Tensor) -> tl.constexpr:
    """Which of the three ways the operands ask for."""
    if weight.dtype != torch.float8_e4m3fn:
        return PLAIN
    return SCALED if x.dtype == torch.float8_e4m3fn else DECODED


def weight_operand(
    weight: torch.Tensor, mode: tl.constexpr, tile: Tile
) -> tuple[torch.Tensor | TensorDescriptor, bool]:
    """The weight [.., K] as rows of K for weight_tile, and whether by descriptor. Codes that are
    decoded are bytes. The copy engine is there from sm_90 on and wants rows that begin at multiples
    of 16 bytes."""
    rows = (weight.view(torch.uint8) if mode is DECODED else weight).view(-1, weight.shape[-1])
    if rows.shape[1] * rows.itemsize % 16 or _arch() < 90:
        return rows, False
    return TensorDescriptor.from_tensor(rows, [tile.columns, tile.depth]), True


def has_small_blocks() -> bool:
    """Whether a block has 99 KiB of shared memory, as on sm_86 and sm_89, where sm_80 has 163."""
    return _arch() in (86, 89)


def _arch() -> int:
    """80, 86, 89, 90 or 100: what Triton compiles for. The interpreter plays 90."""
    if triton.knobs.runtime.interpret:
        return 90
    return int(triton.runtime.driver.active.get_current_target().arch)
