"""What a run finds, and its JSON. Standard library only.

A number that was not measured is None, in JSON null: never an estimate.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

COPY = "copy"
"""Name of the ceiling of memory traffic; those of arithmetic are named after their type."""


@dataclass(frozen=True)
class Ceiling:
    """What the device reaches at its best. unit: of `value`, as it is printed."""

    name: str
    unit: str
    value: float | None
    how: str


@dataclass(frozen=True)
class Check:
    """A result against its reference. error: of the worst row, relative to the row."""

    kernel: str
    shape: str
    dtype: str
    error: float | None
    allowed: float
    problem: str = ""
    """What is wrong besides the error: poison, another shape, an exception."""
    note: str = ""

    @property
    def passed(self) -> bool:
        return not self.problem and self.error is not None and self.error <= self.allowed


@dataclass(frozen=True)
class Benchmark:
    """A timed piece of work. rate: name of the ceiling of its arithmetic."""

    kernel: str
    shape: str
    rate: str
    num_bytes: int
    flops: int
    seconds: float | None
    peers: dict[str, float | None] = field(default_factory=dict)
    """Seconds of the same work by something else; None where this machine has it not."""
    tokens: int = 0
    """Produced in those seconds; 0: none."""
    goal: str = ""
    """Key of `goals.GOALS` that this speaks to."""
    note: str = ""


@dataclass(frozen=True)
class Note:
    """A unit that did not run to its end. failed: a fault, else something that is not there."""

    unit: str
    text: str
    failed: bool


Row = Ceiling | Check | Benchmark | Note
KINDS: dict[str, type[Any]] = {
    "ceilings": Ceiling,
    "checks": Check,
    "benchmarks": Benchmark,
    "notes": Note,
}
DEVICE_FIELDS = ("name", "slug", "driver", "torch", "triton", "cuda", "commit", "date")
Results = dict[str, Any]
"""`device`, `smoke`, `finished`, then a list for each of KINDS."""


def new_results(smoke: bool) -> Results:
    """Of a run that has not begun."""
    return {"device": {}, "smoke": smoke, "finished": False} | {kind: [] for kind in KINDS}


def to_message(row: Row) -> dict[str, Any]:
    """{kind: fields}; JSON has no NaN and no infinity: None."""
    kind = next(kind for kind, type_ in KINDS.items() if isinstance(row, type_))
    fields = dataclasses.asdict(row).items()
    return {kind: {name: None if _is_wild(value) else value for name, value in fields}}


def _is_wild(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def rows_of(results: Results, kind: str) -> list[Any]:
    """Back from JSON. Raises TypeError for a field that does not belong there."""
    return [KINDS[kind](**fields) for fields in results[kind]]


def validate(results: Results) -> None:
    """Raises ValueError that names what does not fit the schema."""
    expected = set(new_results(False))
    if set(results) != expected:
        raise ValueError(f"keys {sorted(results)}, expected {sorted(expected)}")
    missing = [name for name in DEVICE_FIELDS if not isinstance(results["device"].get(name), str)]
    if missing:
        raise ValueError(f"device lacks {missing}")
    for kind, type_ in KINDS.items():
        for number, fields in enumerate(results[kind]):
            _validate_fields(f"{kind}[{number}]", type_, fields)


def _validate_fields(place: str, type_: type[Any], fields: dict[str, Any]) -> None:
    declared = {one.name: str(one.type) for one in dataclasses.fields(type_)}
    if set(fields) != set(declared):
        raise ValueError(f"{place}: fields {sorted(fields)}, expected {sorted(declared)}")
    for name, value in fields.items():
        if not isinstance(value, _JSON_TYPES[declared[name]]):
            raise ValueError(f"{place}.{name} = {value!r}, expected {declared[name]}")


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
    "dict[str, float | None]": (dict,),
}
