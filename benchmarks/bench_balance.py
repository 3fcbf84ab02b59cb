"""How even the experts' load is before and after rebalancing, and what the balancing costs.

    python benchmarks/bench_balance.py
    python benchmarks/bench_balance.py --prompts 20 --pairs 4

Skewed traffic over pools of V3's and V2-Lite's shape, and over the default model's real routing of
each domain of its corpus, with shifts from one domain to another. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import machine

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tools"))

from balance import cost, domains  # noqa: E402
from balance.imbalance import Imbalance, Rows, Step, eplb_imbalance, imbalance, loads_of, run_steps  # noqa: E402
from balance.report import MAX_STEPS, markdown  # noqa: E402
from balance.traces import V2_LITE, V3_32, V3_64, Pool, zipf_windows  # noqa: E402
from bench_serving import commit, say  # noqa: E402

from cluster.config import Rebalancing, default_model  # noqa: E402
from experts.placement.rebalance import Limits, rebalance  # noqa: E402
from experts.placement.replan import initial_table  # noqa: E402
from experts.placement.space import Table  # noqa: E402

LIKE_R1 = 0.65
"""Zipf exponent that gives V3 on 32 workers the imbalance that TensorRT-LLM reports for R1."""
ZIPF = [(V3_32, LIKE_R1), *itertools.product((V3_32, V3_64, V2_LITE), (1.0, 1.2))]
DEFAULT_MAX_MOVES_SHARE = 8
"""Part of the pool's slots that a step may load, where `experts.rebalance.max_moves` is not set."""


def main() -> None:
    """Measure, print, write."""
    options = _options()
    run: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "machine": machine.describe(),
        "seed": options.seed,
        "tokens_a_window": options.tokens,
        "zipf": list(zipf_cases(options.tokens, options.seed)),
        "domains": [],
        "shifts": [],
        "cost": None,
    }
    say("measuring the default model's routing")
    rows = domains.measure(default_model(), options.prompts, MAX_STEPS + 1)
    for pool in domains.pools(default_model()):
        run["domains"] += domain_cases(pool, rows)
        run["shifts"] += shift_cases(pool, rows)
    if options.pairs:
        say("measuring the cost")
        run["cost"] = cost_of(options.pairs, rows)
    _write(run, options.output)
    print(markdown(run))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tokens", type=int, default=65_536, help="of a window of skewed traffic [65536]")
    add("--prompts", type=int, default=200, help="of each domain, if it has so many [200]")
    add("--pairs", type=int, default=60, help="of rounds with and without counting; 0: none [60]")
    add("--seed", type=int, default=1)
    add("--output", type=Path, default=HERE / "results")
    return parser.parse_args()


def zipf_cases(tokens: int, seed: int) -> Iterator[dict[str, Any]]:
    """Traffic that stays as it is."""
    for pool, exponent in ZIPF:
        say(f"{pool.name}, Zipf {exponent}")
        windows = list(zipf_windows(pool, exponent, tokens, seed, MAX_STEPS + 1))
        steps, _ = balance(pool, start(pool), windows)
        yield case(pool, f"Zipf {exponent}", steps, eplb(pool, windows))


def eplb(pool: Pool, windows: list[Rows]) -> Imbalance | None:
    """What EPLB makes of the last step's windows; None where it cannot use so many slots."""
    num_layers = len(pool.space.moe_layers)
    each, left = divmod(sum(pool.slots.values()), num_layers * pool.num_workers)
    if left:
        return None
    return eplb_imbalance(windows[-2], windows[-1], each * pool.num_workers, pool.num_workers)


def domain_cases(pool: Pool, rows: dict[str, list[Rows]]) -> Iterator[dict[str, Any]]:
    """Each domain alone, then all in equal parts, from a table that knows no load."""
    mixed = [sum(by_domain) for by_domain in zip(*map(equal_parts, rows.values()), strict=True)]
    for name, windows in (rows | {"all domains": mixed}).items():
        yield case(pool, name, balance(pool, start(pool), windows)[0])


def shift_cases(pool: Pool, rows: dict[str, list[Rows]]) -> list[dict[str, Any]]:
    """The pair of domains whose change upsets the balance most."""
    settled = {domain: balance(pool, start(pool), windows)[1] for domain, windows in rows.items()}
    old, new = max(
        itertools.permutations(rows, 2),
        key=lambda pair: imbalance(pool.space, settled[pair[0]], rows[pair[1]][0]).mean_layer,
    )
    return [case(pool, f"{old} -> {new}", balance(pool, settled[old], rows[new])[0])]


def balance(pool: Pool, table: Table, windows: list[Rows]) -> tuple[list[Step], Table]:
    """MAX_STEPS steps."""
    return run_steps(pool.space, pool.slots, table, windows, limits(pool))


def equal_parts(windows: list[Rows]) -> list[Rows]:
    """The same shares, as many rows as any other domain has."""
    return [window / window.sum() for window in windows]


def start(pool: Pool) -> Table:
    """What the pool begins with."""
    return initial_table(pool.space, pool.slots, pool.redundancy)


def limits(pool: Pool) -> Limits:
    """The product's defaults."""
    settings = Rebalancing()
    num_slots = sum(pool.slots.values())
    return Limits(settings.max_moves or num_slots // DEFAULT_MAX_MOVES_SHARE, settings.min_gain)


def cost_of(num_pairs: int, rows: dict[str, list[Rows]]) -> dict[str, Any]:
    """Of counting and balancing, with the default model in this process."""
    pool = domains.pools(default_model())[0]
    windows = next(iter(rows.values()))
    _, at_rest = balance(pool, start(pool), windows)
    plan_us = cost.median_us(
        lambda: rebalance(
            pool.space, pool.slots, at_rest, loads_of(pool.space, windows[-1]), limits(pool)
        )
    )
    found = cost.measure(default_model(), num_pairs, plan_us)
    shares = {"median": found.median, "interval": found.interval, "share": found.accounted.share}
    return asdict(found) | shares


def case(
    pool: Pool, traffic: str, steps: list[Step], reference: Imbalance | None = None
) -> dict[str, Any]:
    """A line of a table."""
    return {
        "pool": pool.name,
        "traffic": traffic,
        "slots_a_worker": next(iter(pool.slots.values())),
        "redundant_share": pool.redundant_share,
        "eplb": reference and asdict(reference),
        "steps": [
            asdict(step.imbalance) | {"num_loads": step.num_loads, "seconds": step.seconds}
            for step in steps
        ],
    }


def _write(run: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "balance.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "balance.md").write_text(markdown(run))


if __name__ == "__main__":
    main()
