"""A weight matrix exactly as the checkpoint has it, and the product of float32 rows with it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor

from experts.kernels.runtime import kernels
from experts.tensor_files import SCALE_BLOCK

_CHUNK_BYTES: Final = 4 << 20
"""Rows dequantised at a time, as float32 bytes: small enough to stay in the last-level cache."""

SUPPORTED_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)
"""In the order of experts.kernels.simd.Kind."""

MAX_KERNEL_SCALE: Final = 2.0**8
"""The kernels fold 2^120 into a scale of fp8; those of released models are near 2^-12."""


class Operand(NamedTuple):
    """A weight as addresses and numbers, good as long as the Weight it came from lives."""

    kind: int  # index in SUPPORTED_DTYPES
    data: int
    scales: int  # 0 without
    num_outputs: int
    length: int


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix in the dtype of its file; often a view of a memory-mapped file.

    data: [out, in] float32, bfloat16 or float8_e4m3fn, row-major.
    scale_inv: [ceil(out/128), ceil(in/128)] float32, only with fp8. The value of an element is
        data * scale_inv of its block, rounded to float32 (despite its name the scale multiplies).
    Raises ValueError when dtype, rank, layout or the scale's shape differ.
    """

    data: Tensor
    scale_inv: Tensor | None = None

    def __post_init__(self) -> None:
        if self.data.dtype not in SUPPORTED_DTYPES:
            raise ValueError(f"weight dtype {self.data.dtype}, supported: {SUPPORTED_DTYPES}")
        if self.data.ndim != 2 or not self.data.is_contiguous():
            raise ValueError(f"weight must be a row-major matrix, got {tuple(self.data.shape)}")
        if (self.data.dtype == torch.float8_e4m3fn) != (self.scale_inv is not None):
            raise ValueError("scale_inv belongs to float8_e4m3fn weights and to no others")
        if self.scale_inv is not None:
            self._check_scale(self.scale_inv)

    def _check_scale(self, scale_inv: Tensor) -> None:
        expected = tuple(-(-size // SCALE_BLOCK) for size in self.shape)
        if tuple(scale_inv.shape) != expected or scale_inv.dtype != torch.float32:
            raise ValueError(
                f"scale_inv {tuple(scale_inv.shape)} {scale_inv.dtype}, expected {expected} float32"
            )
        if not scale_inv.is_contiguous():
            raise ValueError("scale_inv must be row-major")

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        out, length = self.data.shape
        return out, length

    @property
    def num_bytes(self) -> int:
        """Bytes one product has to read."""
        scale_bytes = 0 if self.scale_inv is None else self.scale_inv.nbytes
        return self.data.nbytes + scale_bytes

    @cached_property
    def operand(self) -> Operand | None:
        """How compiled kernels see it; None when they cannot take it (a scale of 2^8 or more)."""
        scales = self.scale_inv
        if scales is not None and scales.numel() and float(scales.max()) >= MAX_KERNEL_SCALE:
            return None
        address = 0 if scales is None else scales.data_ptr()
        kind = SUPPORTED_DTYPES.index(self.data.dtype)
        return Operand(kind, self.data.data_ptr(), address, *self.shape)

    def dequantize(self) -> Tensor:
        """[out, in] float32; shares memory with `data` when that is float32 already."""
        return self.dequantize_rows(0, self.shape[0])

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop-1 as [stop - start, in] float32."""
        rows = self.data[start:stop].float()
        if self.scale_inv is None:
            return rows
        blocks = torch.arange(start, stop) // SCALE_BLOCK
        scales = self.scale_inv[blocks].repeat_interleave(SCALE_BLOCK, dim=1)
        return rows.mul_(scales[:, : self.shape[1]])


_pack_arguments = struct.Struct("10q").pack


def linear(x: Tensor, w: Weight, *, deterministic: bool = False) -> Tensor:
    """y = x w^T in float32.

    x [T, in] float32 -> [T, out] float32. deterministic: a row of y depends only on its row of x,
    bit for bit, whatever else is in the batch (the compiled kernel always has this property).
    Raises ValueError for another dtype or width.
    """
    rows, columns = x.shape if x.ndim == 2 else (0, -1)
    if x.dtype != torch.float32 or columns != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit a weight of shape {w.shape}")
    chosen, operand = kernels(), w.operand
    if not chosen.compiled or operand is None:
        return linear_torch(x, w, deterministic=deterministic)
    row_stride, column_stride = x.stride()
    if column_stride != 1:
        x, row_stride = x.contiguous(), columns
    y = torch.empty(rows, operand.num_outputs)
    chosen.linear(
        _pack_arguments(
            chosen.pool_address, *operand, x.data_ptr(), 4 * row_stride, rows, y.data_ptr()
        )
    )
    return y


def linear_torch(x: Tensor, w: Weight, *, deterministic: bool = False) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `linear`."""
    out = torch.empty(x.shape[0], w.shape[0])
    # BLAS picks its summation order by the shape, so one row at a time is what fixes it.
    row_batches = [x[i : i + 1] for i in range(x.shape[0])] if deterministic else [x]
    for start in range(0, w.shape[0], step := max(1, _CHUNK_BYTES // (4 * max(1, w.shape[1])))):
        stop = min(start + step, w.shape[0])
        rows_t = w.dequantize_rows(start, stop).t()
        for i, rows in enumerate(row_batches):
            target = out[i : i + 1] if deterministic else out
            target[:, start:stop] = rows @ rows_t
    return out
