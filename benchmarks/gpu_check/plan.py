"""Units of work, and the sections that list them.

A unit is what is lost when a kernel takes the process down. The list of units is the same in every
process of a run, so that a new process can go on after the unit that ended the last one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from experts.device import ComputeDevice
from gpu_check.rows import Note, Row
from gpu_check.sections import SECTIONS
from gpu_check.timing import Timer


@dataclass(frozen=True)
class Context:
    """What a section works with."""

    compute: ComputeDevice
    timer: Timer
    smoke: bool
    """Shapes for the interpreter, and no claims."""

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def has_fp8(self) -> bool:
        """Whether fp8 is multiplied with fp8 here."""
        return self.compute.fp8_matmul or self.smoke

    def generator(self, seed: int) -> torch.Generator:
        """Of the device."""
        return torch.Generator(self.device).manual_seed(seed)


@dataclass(frozen=True)
class Unit:
    """Some rows' work."""

    name: str
    run: Callable[[], Iterable[Row]]
    section: int = 0
    """Its number among those that were asked for."""


def plan(context: Context, sections: Iterable[str]) -> list[Unit]:
    """All units of these sections. A section that cannot be imported is one unit that says so."""
    return [
        replace(unit, section=number)
        for number, section in enumerate(sections)
        for unit in _section(context, section)
    ]


def _section(context: Context, section: str) -> list[Unit]:
    try:
        module = importlib.import_module(SECTIONS[section])
        return list(module.units(context))
    except ImportError as error:
        note = lacking(section, error)
    return [Unit(section, lambda: [note])]


def lacking(unit: str, error: ImportError) -> Note:
    """A module of ours that is missing is a fault, another's is something this machine lacks."""
    missing = isinstance(error, ModuleNotFoundError) and error.name is not None
    name = (error.name or "").partition(".")[0]
    ours = name in ("experts", "router", "attention", "cluster", "gpu_check")
    text = f"skipped: no module {error.name}" if missing and not ours else f"{error}"
    return Note(unit, text, failed=not missing or ours)


def run_unit(unit: Unit) -> Iterator[Row]:
    """Its rows; an exception becomes a row, so that the others run."""
    try:
        yield from unit.run()
    except ImportError as error:
        yield lacking(unit.name, error)
    except Exception as error:
        yield Note(unit.name, f"{type(error).__name__}: {error}", failed=True)
