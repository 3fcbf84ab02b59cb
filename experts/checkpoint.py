"""A folder of safetensors files: tensors by name, as views of the mapped files.

Opening reads headers only (`experts.tensor_files`); no weight is read.
A tensor is a view of a private mapping of its file: creating it costs nothing, its pages come from
the page cache when a kernel first touches them, and processes on one host share them.
Only safetensors: a pickle would run the code inside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experts.errors import CheckpointError
from experts.linear import Weight
from experts.tensor_files import DTYPES, TensorFiles

__all__ = ["Checkpoint", "CheckpointError"]

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES.values()}


class Checkpoint(TensorFiles):
    """Use `Checkpoint.open`. Asking for a tensor that is not there raises CheckpointError."""

    def tensor(self, name: str) -> Tensor:
        """The tensor as its file has it: dtype of the file, CPU, a view of the mapping.

        Writing to it changes this process only, never the file.
        """
        info = self.info(name)
        dtype = TORCH_DTYPES[info.dtype]
        data = torch.from_numpy(self.raw(name))
        if info.begin % dtype.itemsize:  # a view needs alignment; writers may omit it
            data = data.clone()
        return data.view(dtype).view(info.shape)

    def weight(self, name: str) -> Weight:
        """A matrix [out, in] and, for fp8, its scales [ceil(out/128), ceil(in/128)] float32."""
        self.check_weight(name)
        data = self.tensor(name)
        scaled = data.dtype is torch.float8_e4m3fn
        return Weight(data, torch.from_numpy(self.scales(name)) if scaled else None)
