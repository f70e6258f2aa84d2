"""What a search space can reach at all, known from analytic costs before anything is measured."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from secateur.choose.ladder import Ladder, Meter
from secateur.space import Polynomial, Space


def profile_space(
    space: Space, ladders: Sequence[Ladder], costs: Mapping[str, Polynomial], limits: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """What each measure is at the smallest, the middle and the largest sizes.

    Args:
        space: the Space.
        ladders: the sizes that each axis may have.
        costs: polynomials of all measures that are known.
        limits: measure -> the most that it may be; of some or all of them.

    Returns:
        Measure -> ``min``, ``middle``, ``max``; where it is limited also ``limit`` and ``satisfiable``.
    """
    meter = Meter(space, ladders, {measure: size for measure, size in costs.items() if size})
    steps = np.array([len(one.sizes) - 1 for one in ladders], dtype=np.int64)
    places = {"min": steps, "middle": steps // 2, "max": np.zeros_like(steps)}
    found = {name: meter(levels) for name, levels in places.items()}
    table: dict[str, dict[str, Any]] = {m: {name: at[m] for name, at in found.items()} for m in found["min"]}
    for measure, limit in limits.items():
        table[measure] |= {"limit": limit, "satisfiable": table[measure]["min"] <= limit}
    return table
