"""A checkpoint folder back into the form that trains: what is graded is the file that ships."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from default_model.export import published_tensors
from default_model.model import DeepseekV3
from experts.checkpoint import Checkpoint


@torch.no_grad()
def restore(folder: Path) -> DeepseekV3:
    """The model of a folder that `export` wrote, weights dequantised to float32."""
    checkpoint = Checkpoint.open(folder)
    model = DeepseekV3(checkpoint.config)
    state = model.state_dict()
    for name, target in published_tensors(state, model.config.num_hidden_layers):
        target.copy_(_values(checkpoint, name))
    return model.eval()


def _values(checkpoint: Checkpoint, name: str) -> Tensor:
    if checkpoint.tensor(name).dim() == 2:
        return checkpoint.weight(name).dequantize()
    return checkpoint.tensor(name)
