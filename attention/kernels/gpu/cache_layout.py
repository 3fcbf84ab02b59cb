"""How a token lies in a layer's paged latent cache [num_blocks, block_size, width].

bfloat16 or float32: c values of the latent, then r of the rotated key. fp8: a row of bytes (uint8),
padded to a multiple of 16 so that every row can be read 16 bytes at a time:

    | c codes, float8_e4m3fn | ceil(c/128) scales, float32 | r of the key, bfloat16 | padding |

value = code * scale of its group of 128; the key is never quantised. 512 + 16 + 128 = 656 bytes for
DeepSeek's c 512, r 64, against 1152 in bfloat16: the `fp8_ds_mla` layout of FlashMLA and vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128
"""Consecutive values of a latent that share a scale."""
FP8_MAX = 448.0
"""Largest float8_e4m3fn: a group's scale is max|x| / 448."""
MIN_SCALE = 2.0**-126
"""Smallest normal float32: the scale of a group of zeros."""
_ROW_ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """c and r, and the dtype of the latent: float32, bfloat16 or float8_e4m3fn."""

    latent: int
    rope: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            raise ValueError(f"a cache is float32, bfloat16 or float8_e4m3fn, not {self.dtype}")
        if self.is_fp8 and (self.latent % 4 or self.rope % 2):
            raise ValueError(
                f"an fp8 cache has scales and keys at whole words: latent {self.latent} must be a "
                f"multiple of 4, rope {self.rope} of 2"
            )

    @classmethod
    def of(cls, kv_cache: Tensor, latent: int, rope: int) -> CacheLayout:
        """The layout of a layer's cache. Raises ValueError when the cache is not of that width."""
        fp8 = kv_cache.dtype == torch.uint8
        layout = cls(latent, rope, torch.float8_e4m3fn if fp8 else kv_cache.dtype)
        if kv_cache.ndim != 3 or kv_cache.shape[2] != layout.width or not kv_cache.is_contiguous():
            raise ValueError(
                f"kv_cache must be [num_blocks, block_size, {layout.width}] and contiguous for "
                f"latent {latent}, rope {rope}; got {tuple(kv_cache.shape)} {kv_cache.dtype}"
            )
        return layout

    @property
    def is_fp8(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    @property
    def num_groups(self) -> int:
        return -(-self.latent // GROUP)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of the cache tensor."""
        return torch.uint8 if self.is_fp8 else self.dtype

    @property
    def width(self) -> int:
        """Last dimension of the cache tensor: values, of an fp8 cache bytes."""
        if not self.is_fp8:
            return self.latent + self.rope
        used = self.latent + 4 * self.num_groups + 2 * self.rope
        return -(-used // _ROW_ALIGNMENT) * _ROW_ALIGNMENT

    @property
    def row_bytes(self) -> int:
        """Of a token in one layer."""
        return self.width * self.storage_dtype.itemsize

    @property
    def scales_at(self) -> int:
        """Index of the first scale in a row of an fp8 cache viewed as float32."""
        return self.latent // 4

    @property
    def key_at(self) -> int:
        """Index of the rotated key in a row: of an fp8 cache viewed as bfloat16."""
        return (self.latent + 4 * self.num_groups) // 2 if self.is_fp8 else self.latent

    def new_cache(
        self, layers: int, num_blocks: int, block_size: int, device: torch.device
    ) -> Tensor:
        """[layers, num_blocks, block_size, width] zeros; a layer's cache is `cache[layer]`."""
        shape = (layers, num_blocks, block_size, self.width)
        return torch.zeros(shape, dtype=self.storage_dtype, device=device)


def key_view(kv_cache: Tensor, layout: CacheLayout) -> Tensor:
    """The cache as the dtype of its keys; they begin at `layout.key_at` of a row."""
    return kv_cache.view(torch.bfloat16) if layout.is_fp8 else kv_cache


def scale_view(kv_cache: Tensor, layout: CacheLayout) -> Tensor:
    """The cache as float32; an fp8 cache's scales begin at `layout.scales_at` of a row."""
    return kv_cache.view(torch.float32) if layout.is_fp8 else kv_cache


def row_strides(layout: CacheLayout) -> tuple[int, int, int]:
    """Elements from row to row in the cache, its `scale_view` and its `key_view`."""
    if not layout.is_fp8:
        return layout.width, layout.width, layout.width
    return layout.width, layout.width // 4, layout.width // 2


def read_rows(rows: Tensor, layout: CacheLayout) -> Tensor:
    """Rows of the cache [S, width], dequantised: [S, c + r] float32."""
    if not layout.is_fp8:
        return rows.float()
    codes = rows[:, : layout.latent].view(torch.float8_e4m3fn).float()
    scales = rows.view(torch.float32)[:, layout.scales_at : layout.scales_at + layout.num_groups]
    latent = codes * scales.repeat_interleave(GROUP, dim=1)[:, : layout.latent]
    key = rows.view(torch.bfloat16)[:, layout.key_at : layout.key_at + layout.rope]
    return torch.cat([latent, key.float()], dim=1)


def encode_rows(values: Tensor, layout: CacheLayout) -> Tensor:
    """[S, c + r] float32 -> rows of the cache [S, width]; `read_rows` reads them back."""
    if not layout.is_fp8:
        return values.to(layout.dtype)
    rows = values.new_zeros(values.shape[0], layout.width, dtype=torch.uint8)
    padded = torch.nn.functional.pad(values[:, : layout.latent], (0, -layout.latent % GROUP))
    groups = padded.view(values.shape[0], layout.num_groups, GROUP)
    scales = groups.abs().amax(dim=2)  # [S, num_groups]
    scales /= torch.full_like(scales, FP8_MAX)  # by a number CUDA would multiply with its inverse
    scales = scales.clamp_(min=MIN_SCALE)
    codes = (groups / scales[:, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    rows[:, : layout.latent] = codes.flatten(1)[:, : layout.latent].view(torch.uint8)
    first = layout.scales_at
    rows.view(torch.float32)[:, first : first + layout.num_groups] = scales
    key = values[:, layout.latent :].bfloat16()
    rows.view(torch.bfloat16)[:, layout.key_at : layout.key_at + layout.rope] = key
    return rows
