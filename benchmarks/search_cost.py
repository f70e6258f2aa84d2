"""Seconds of the mixed-integer program against blocks, levels and limits: tables of convex losses, drawn at random."""

import time
from typing import Any

import numpy as np
from common import record

from secateur.choose.table import Level, Slot, Table, Term, solve

MEASURES = ("params", "macs", "memory", "latency")


def table(blocks: int, levels: int, seed: int = 0) -> Table:
    """Two slots for each block, whose costs are nearly, not quite, proportional to each other."""
    draw = np.random.default_rng(seed)
    slots = tuple(Slot(f"slot {i}", tuple(Level() for _ in range(levels))) for i in range(2 * blocks))
    share = np.linspace(1, 0, levels)
    loss = tuple(Term((i,), draw.lognormal() * (1 - share) ** draw.uniform(1.5, 3)) for i in range(len(slots)))
    costs = {
        m: tuple(Term((i,), draw.uniform(0.5, 2) * share ** draw.uniform(0.8, 1.2)) for i in range(len(slots)))
        for m in MEASURES
    }
    return Table(slots, loss, costs)


def main() -> None:
    """Run all sizes, and keep results/search_cost.json."""
    rows: list[dict[str, Any]] = []
    for blocks in (8, 20, 40, 80):
        for levels in (12,) if blocks != 80 else (6, 12, 24):
            for count in (1, 4):
                own = table(blocks, levels)
                limits = {m: 0.6 * own.cost(m, own.whole) for m in MEASURES[:count]}
                begin = time.perf_counter()
                found = solve(own, limits)
                row = {"blocks": blocks, "levels": levels, "limits": count, "seconds": time.perf_counter() - begin}
                rows.append(row | {"optimal": found.optimal, "gap": found.gap})
                print(rows[-1], flush=True)
    record("search_cost", {"rows": rows})


if __name__ == "__main__":
    main()
