"""transformers' model of a checkpoint folder, the oracle that others wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch


def load_model(folder: Path) -> Any:
    """In float32, fp8 matrices dequantised; eager attention and experts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers and accelerate warn at import and load
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    # Of an fp8 file only the dequantised matrices come out float32, whatever dtype says.
    return loaded.eval().float()
