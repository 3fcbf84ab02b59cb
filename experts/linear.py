"""A weight matrix exactly as the checkpoint has it, and the product of float32 rows with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

SCALE_BLOCK: Final = 128
"""An fp8 checkpoint has one scale for each 128 x 128 block; blocks at the edges are partial."""

_CHUNK_BYTES: Final = 4 << 20
"""Rows dequantised at a time, as float32 bytes: small enough to stay in the last-level cache."""

SUPPORTED_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)


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
            raise ValueError(f"weight must be a row-major matrix, got shape {self.shape}")
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

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return tuple(self.data.shape)  # type: ignore[return-value]

    @property
    def num_bytes(self) -> int:
        """Bytes one product has to read."""
        scale_bytes = 0 if self.scale_inv is None else self.scale_inv.nbytes
        return self.data.nbytes + scale_bytes

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


def linear(x: Tensor, w: Weight, *, deterministic: bool = False) -> Tensor:
    """y = x w^T in float32.

    x [T, in] float32 -> [T, out] float32. deterministic: a row of y depends only on its row of x,
    bit for bit, whatever else is in the batch. Raises ValueError for another dtype or width.
    """
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} does not fit a weight of shape {w.shape}")
    return linear_torch(x, w, deterministic=deterministic)


def linear_torch(x: Tensor, w: Weight, *, deterministic: bool = False) -> Tensor:
    """Plain-torch twin of the kernel: oracle and fall-back. Same arguments as `linear`."""
    out = torch.empty(x.shape[0], w.shape[0])
    # BLAS picks its summation order by the shape, so one row at a time is what fixes it.
    row_batches = x.split(1) if deterministic else (x,)
    for start in range(0, w.shape[0], step := max(1, _CHUNK_BYTES // (4 * max(1, w.shape[1])))):
        stop = min(start + step, w.shape[0])
        rows_t = w.dequantize_rows(start, stop).t()
        for i, rows in enumerate(row_batches):
            target = out[i : i + 1] if deterministic else out
            target[:, start:stop] = rows @ rows_t
    return out
