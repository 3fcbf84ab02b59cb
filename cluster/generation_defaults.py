"""What a checkpoint's generation_config.json says about requests that name no settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import CheckpointError
from experts.files import read_json_object

FILE = "generation_config.json"


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """How requests that name no temperature or top_p are sampled."""

    temperature: float = 1.0
    top_p: float = 1.0

    @classmethod
    def load(cls, folder: Path) -> GenerationDefaults:
        """Of a checkpoint folder; the file may be missing. Raises CheckpointError.

        `do_sample: false` asks for greedy, which is temperature 0.
        """
        file = folder / FILE
        if not file.exists():
            return cls()
        settings = read_json_object(file)
        temperature = _number(file, settings, "temperature")
        if settings.get("do_sample") is False:
            temperature = 0.0
        return cls(temperature, _number(file, settings, "top_p"))


def _number(file: Path, settings: dict[str, Any], key: str) -> float:
    """1, which changes nothing, where the file says nothing or `null`."""
    value = settings.get(key)
    if value is None:
        return 1.0
    # json reads NaN, Infinity and whole numbers too large for a float.
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise CheckpointError(file, f"a number as {key}", repr(value))
    return float(value)
