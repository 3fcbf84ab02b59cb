"""The Markdown of a run, from the dict that is written as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gpu_check.goals import (
    Ceilings,
    Measure,
    binding,
    ceilings_of,
    verdicts,
)
from gpu_check.rows import Benchmark, Ceiling, Check, Note, Results, rows_of

NOT_MEASURED = "not measured"
_FACTORS = {"GB/s": 1e9, "TFLOP/s": 1e12, "us": 1e-6}


def markdown(results: Results) -> str:
    """Head, what is wrong, goals, ceilings, times, checks, what did not run."""
    rows: list[Ceiling] = rows_of(results, "ceilings")
    ceilings = ceilings_of(rows)
    benchmarks: list[Benchmark] = rows_of(results, "benchmarks")
    parts = [
        _head(results),
        _problems(results),
        _table("Goals", ("goal", "at", "wanted", "found", "possible", ""),
               _goals(benchmarks, ceilings)),
        _table("Ceilings", ("ceiling", "measured", "how"), map(_ceiling, rows)),
        _table("Times", ("work", "shape", "type", "time", "GB/s", "TFLOP/s", "binds", "share",
                         "tokens/s", "others", "note"),
               (_benchmark(one, ceilings) for one in benchmarks)),
        _table("Results against their twins", ("kernel", "shape", "type", "error", "allowed", "",
                                               "note"),
               map(_check, rows_of(results, "checks"))),
        _table("Not run", ("unit", "why"),
               ((note.unit, note.text) for note in rows_of(results, "notes") if not note.failed)),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def problems(results: Results) -> list[str]:
    """What makes the run a failure, a line each."""
    checks: list[Check] = rows_of(results, "checks")
    notes: list[Note] = rows_of(results, "notes")
    return [
        *(
            f"{one.kernel}, {one.shape}, {one.dtype}: {_wrong(one)}"
            for one in checks
            if not one.passed
        ),
        *(f"{note.unit}: {note.text}" for note in notes if note.failed),
    ]


def _wrong(one: Check) -> str:
    error = "not known" if one.error is None else f"{one.error:.2e}"
    return one.problem or f"error {error}, allowed {one.allowed:.2e}"


def _head(results: Results) -> str:
    device = results["device"]
    checks: list[Check] = rows_of(results, "checks")
    versions = f"driver {device['driver']}, CUDA {device['cuda']}, torch {device['torch']}"
    lines = [
        f"# GPU check: {device['name']}",
        "",
        f"{device['date']}, commit {device['commit']}, {versions}, triton {device['triton']}.",
        f"{sum(one.passed for one in checks)} of {len(checks)} results agree with their twins.",
    ]
    if results["smoke"]:
        lines.append("A smoke run: tiny shapes on the CPU, nothing measured.")
    if not results["finished"]:
        lines.append("The run did not reach its end.")
    return "\n".join(lines)


def _problems(results: Results) -> str:
    found = problems(results)
    if not found:
        return ""
    return "\n".join(["## Wrong", "", *(f"- {_one_line(line)}" for line in found)])


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_one_line, row))} |" for row in rows]
    if not lines:
        return ""
    head = [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *lines])


def _one_line(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _goals(benchmarks: Sequence[Benchmark], ceilings: Ceilings) -> Iterable[Sequence[str]]:
    for verdict in verdicts(benchmarks, ceilings):
        goal = verdict.goal
        sign = "<=" if goal.measure == "seconds" else ">="
        yield (
            goal.text,
            verdict.where or "-",
            f"{sign} {_amount(goal.limit, goal.measure)}{_WHAT[goal.measure]}",
            _amount(verdict.value, goal.measure),
            _amount(verdict.most_possible, goal.measure),
            verdict.text,
        )


_WHAT: dict[Measure, str] = {
    "bound": " of what binds",
    "copy": " of copy bandwidth",
    "rate": " of the dense rate",
    "seconds": "",
}


def _amount(value: float | None, measure: Measure) -> str:
    if value is None:
        return NOT_MEASURED
    return _time(value) if measure == "seconds" else f"{value:.0%}"


def _ceiling(row: Ceiling) -> Sequence[str]:
    if row.value is None:
        return row.name, NOT_MEASURED, row.how
    return row.name, f"{row.value / _FACTORS[row.unit]:.4g} {row.unit}", row.how


def _benchmark(one: Benchmark, ceilings: Ceilings) -> Sequence[str]:
    seconds = one.seconds
    others = ", ".join(f"{name} {_peer(time, seconds)}" for name, time in one.peers.items())
    return (
        one.kernel,
        one.shape,
        one.rate,
        _time(seconds),
        _rate(one.num_bytes, 1e9, seconds),
        _rate(one.flops, 1e12, seconds),
        *_share(one, ceilings),
        _rate(one.tokens, 1.0, seconds),
        others or "-",
        one.note,
    )


def _share(one: Benchmark, ceilings: Ceilings) -> tuple[str, str]:
    """Which ceiling binds, and how much of it was reached."""
    if not one.num_bytes:
        return "-", "-"
    bound = binding(one, ceilings)
    if bound is None or one.seconds is None:
        return NOT_MEASURED, NOT_MEASURED
    return bound[0], f"{bound[1] / one.seconds:.0%}"


def _rate(amount: int, unit: float, seconds: float | None) -> str:
    if not amount:
        return "-"
    return NOT_MEASURED if seconds is None else f"{amount / unit / seconds:.4g}"


def _peer(time: float | None, seconds: float | None) -> str:
    """Its time, and how many times ours that is."""
    if time is None:
        return NOT_MEASURED
    return f"{_time(time)} ({time / seconds:.2f}x)" if seconds else _time(time)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.3f} ms"


def _check(one: Check) -> Sequence[str]:
    error = "-" if one.error is None else f"{one.error:.1e}"
    verdict = "ok" if one.passed else f"WRONG {one.problem}".strip()
    return one.kernel, one.shape, one.dtype, error, f"{one.allowed:.0e}", verdict, one.note
