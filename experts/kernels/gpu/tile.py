"""One tile of a product x . w^T and what all products of this folder share.

Three ways to multiply, by the types of the operands:

    PLAIN    x and w bfloat16 or float32
    SCALED   x and w e4m3: (q . q) of 128 channels, times the row's scale and the block's
    DECODED  w e4m3, x not: the codes become numbers of x's type, the block's scale comes after

All sums are float32. With few rows a tile is computed transposed, w . x^T: the matrix instructions
of sm_90 and later take 64 rows from their first operand but as few as 8 from their second. None of
the sizes below was measured on a GPU yet; they follow from shared memory (stages x (rows + columns)
x depth) and registers, which tests/gpu/test_expert_kernels_compiled.py checks for three targets.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined"

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl

from experts.kernels.gpu.fp8 import decode_e4m3

PLAIN: Final = tl.constexpr(0)
SCALED: Final = tl.constexpr(1)
DECODED: Final = tl.constexpr(2)
_INTERPRETED: Final = tl.constexpr(triton.knobs.runtime.interpret)


class Tile(NamedTuple):
    """Sizes of one program's share: `rows` of x, `columns` (rows of w), `depth` a step."""

    rows: int
    columns: int
    depth: int
    num_stages: int
    num_warps: int
    swap: bool = False
    """Compute the transposed tile."""


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


def operand(weight: torch.Tensor, mode: tl.constexpr) -> torch.Tensor:
    """The weight as the kernel takes it: codes that are decoded are bytes."""
    return weight.view(torch.uint8) if mode is DECODED else weight
