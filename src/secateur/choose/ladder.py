"""Ladders: each axis (or several in lockstep) goes down rung by rung; a budget says how far.

Every rung is a set of units that goes at once, and all rungs of all ladders stand in one order. A bisection finds the
shortest beginning of that order that meets the budget, with the exact analytic costs; single rungs are then given
back, so that the result lands as close below the limit as rungs allow.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil, gcd

import numpy as np
import numpy.typing as npt
import torch

from secateur.choose.plan import Plan
from secateur.choose.rank import keep_best
from secateur.errors import SecateurError
from secateur.space import Axis, Polynomial, Space

Levels = npt.NDArray[np.int64]
"""How many rungs each ladder has gone down."""
CLOSE = 0.01
"""Share of the limit that may be left over before swaps are tried."""
SWAPS, DEEPER = 24, 4
"""Ladders that are tried then, and rungs of each."""


@dataclass(frozen=True)
class Ladder:
    """Axes of one size that are cut alike (mostly one), and how far down they may go."""

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]
    """Units that stay at each level, the whole first; the same in each group of the axis."""
    scores: npt.NDArray[np.float64]
    """Mean score of the units that each rung takes, ascending [len(sizes) - 1]."""


def ladder(axes: Sequence[Axis], scores: Mapping[str, torch.Tensor], least: int, divisor: int = 1) -> Ladder:
    """Order the units of axes of one shape, worst first, and cut the order into rungs.

    Args:
        axes: one axis, or several that keep the same number of units.
        scores: axis name -> float [size], higher = keep; comparable between these axes.
        least: units that must stay.
        divisor: sizes, but for the whole, are multiples of it.
    """
    first = axes[0]
    step = divisor // gcd(divisor, first.groups)  # in each group
    lowest = max(1, ceil(least / first.groups - 1e-9))
    counts = [n for n in range(first.per_group - 1, lowest - 1, -1) if n % step == 0]
    sizes = [first.per_group, *counts]
    ordered = [scores[a.name].double().reshape(a.groups, a.per_group).sort(dim=1).values.mean(0) for a in axes]
    each = torch.stack(ordered).mean(0).numpy()
    gone = [first.per_group - n for n in sizes]
    rungs = np.array([each[a:b].mean() for a, b in pairwise(gone)], dtype=np.float64)
    return Ladder(tuple(axes), tuple(n * first.groups for n in sizes), np.maximum.accumulate(rungs))


def in_order(ladders: Sequence[Ladder], classes: Sequence[Hashable]) -> Levels:
    """Number of the ladder of each rung, in the order in which rungs go.

    Ladders of one class are ranked together, by score. Classes go down side by side: a rung's place is the share of the
    units of its class that is gone halfway through it.
    """
    keys = [np.zeros(0)] * len(ladders)
    for name in dict.fromkeys(classes):
        members = [i for i, own in enumerate(classes) if own == name]
        counts = [-np.diff(ladders[i].sizes) * len(ladders[i].axes) for i in members]
        scores = np.concatenate([ladders[i].scores for i in members])
        taken = np.concatenate(counts)[np.argsort(scores, kind="stable")]
        total = sum(ladders[i].sizes[0] * len(ladders[i].axes) for i in members)
        share = np.empty(len(scores))
        share[np.argsort(scores, kind="stable")] = (np.cumsum(taken) - taken / 2) / total
        for i, part in zip(members, np.split(share, np.cumsum([len(c) for c in counts])[:-1]), strict=True):
            keys[i] = part
    owner = np.concatenate([np.full(len(key), i, dtype=np.int64) for i, key in enumerate(keys)])
    return owner[np.argsort(np.concatenate(keys), kind="stable")]


class Meter:
    """Costs by the levels of ladders, quick enough to be asked thousands of times."""

    def __init__(self, space: Space, ladders: Sequence[Ladder], costs: Mapping[str, Polynomial]) -> None:
        self.ladders = ladders
        axes = [*space.axes]
        number = {axis.name: i for i, axis in enumerate(axes)}
        self._whole = np.array([*(axis.per_group for axis in axes), 1.0])
        self._steps = [np.array(x.sizes) / x.axes[0].groups for x in ladders]
        self._places = [np.array([number[axis.name] for axis in x.axes]) for x in ladders]
        self._terms = {}
        for measure, size in costs.items():
            width = max((len(names) for names in size), default=0)
            factors = [[number[n] for n in names] + [len(axes)] * (width - len(names)) for names in size]
            table = np.array(factors, dtype=np.int64).reshape(len(factors), width)
            self._terms[measure] = (np.array(list(size.values()), dtype=np.float64), table)

    def __call__(self, levels: Levels) -> dict[str, float]:
        """Cost by measure."""
        lengths = self._whole.copy()
        for step, places, level in zip(self._steps, self._places, levels, strict=True):
            lengths[places] = step[level]
        return {m: float((c * lengths[table].prod(1)).sum()) for m, (c, table) in self._terms.items()}


def settle(order: Levels, meter: Meter, limits: Mapping[str, float]) -> Levels:
    """Levels that keep all limits and leave little over.

    Args:
        order: see `in_order`.
        meter: costs of levels; at least of the measures that are limited.
        limits: measure -> the most that it may be.

    Raises:
        SecateurError: where even the lowest levels do not keep them; says the smallest reachable costs.
    """
    count = len(meter.ladders)

    def after(rungs: int) -> Levels:
        return np.bincount(order[:rungs], minlength=count)

    def fits(levels: Levels) -> bool:
        return _over(meter(levels), limits) <= 0

    low, high = 0, len(order)
    if not fits(after(high)):
        raise SecateurError(unreachable(meter(after(0)), meter(after(high)), limits))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(after(middle)) else (middle + 1, high)
    place = {(int(i), level): rank for rank, (i, level) in enumerate(_rungs(order))}
    best = _give_back(after(low), meter, limits, place)
    left = -_over(meter(best), limits)
    for i, more in product(list(dict.fromkeys(order[low:].tolist()))[:SWAPS], range(1, DEEPER + 1)):
        if left <= CLOSE:
            break
        trial = after(low)  # rungs are coarse: take some more of one ladder, and see what then fits
        trial[i] += more
        if trial[i] < len(meter.ladders[i].sizes):
            trial = _give_back(trial, meter, limits, place, never=i)
            less = -_over(meter(trial), limits)
            best, left = (trial, less) if less < left else (best, left)
    return best


def _rungs(order: Levels) -> list[tuple[int, int]]:
    """(ladder, level that it leaves behind) of each rung."""
    seen: dict[int, int] = {}
    found = []
    for i in order.tolist():
        seen[i] = seen.get(i, 0) + 1
        found.append((i, seen[i]))
    return found


def _over(costs: Mapping[str, float], limits: Mapping[str, float]) -> float:
    """By which share the worst limit is exceeded; below 0, what is left of the tightest."""
    return max(costs[measure] / limit - 1 for measure, limit in limits.items())


def _give_back(
    levels: Levels, meter: Meter, limits: Mapping[str, float], place: Mapping[tuple[int, int], int], never: int = -1
) -> Levels:
    """Climb up again wherever the limits allow it, the best rungs first."""
    levels = levels.copy()
    closed = {never}
    while True:
        open_ = [i for i in range(len(levels)) if levels[i] and i not in closed]
        if not open_:
            return levels
        best = max(open_, key=lambda i: place[i, int(levels[i])])
        levels[best] -= 1
        if _over(meter(levels), limits) > 0:
            levels[best] += 1
            closed.add(best)  # the others only make it dearer


def unreachable(dense: Mapping[str, float], smallest: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """That limits cannot be met, and what can: measure -> cost of the dense and of the smallest, and the limit."""
    parts = []
    for measure, limit in limits.items():
        floor, whole = smallest[measure], dense[measure]
        missed = ", which is above the limit" if floor > limit else ""
        share = f" ({100 * floor / whole:.1f}% of the dense)" if whole else ""
        shown = ".6g" if measure == "latency" else ",.0f"
        parts.append(f"{measure}={limit:{shown}}: the smallest reachable is {floor:{shown}}{share}{missed}")
    return f"the budget cannot be met ({'; '.join(parts)})"


def plan_of(ladders: Sequence[Ladder], levels: Levels, scores: Mapping[str, torch.Tensor]) -> Plan:
    """Keep the best units of every axis that goes down."""
    kept = {
        axis.name: keep_best(axis, scores[axis.name], rungs.sizes[level])
        for rungs, level in zip(ladders, levels, strict=True)
        for axis in rungs.axes
        if level
    }
    return Plan(kept)
