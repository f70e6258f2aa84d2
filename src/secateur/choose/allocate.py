"""How much of each weight goes, where not all lose the same share; the total is what the budget says."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import SecateurError, nearest
from secateur.space.weights import Weight, matching

NAMED = ("uniform", "magnitude", "owl")
Allocation = str | Mapping[str, float]
"""``uniform``, ``magnitude``, ``owl``, shares by pattern, or a file or JSON text of them or of a sensitivity table."""
_GRID = 100
_SENSITIVITY = ("sensitivity", 1)
"""Kind and format of the files of `secateur sensitivity`; a table by hand says neither."""


def read_allocation(allocation: Allocation) -> str | dict[str, Any]:
    """What an allocation says: a name, shares by pattern, or a sensitivity table ``{"losses": {...}}``.

    Raises:
        SecateurError: for an unknown name, an unreadable file, or what is none of these.
    """
    if isinstance(allocation, Mapping):
        return dict(allocation)
    if allocation in NAMED:
        return allocation
    text = allocation
    if not allocation.lstrip().startswith("{"):
        if not allocation.endswith(".json") and not Path(allocation).exists():
            raise SecateurError(f"there is no allocation {allocation!r}{nearest(allocation, NAMED)} (or a .json file)")
        try:
            text = Path(allocation).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise SecateurError(f"allocation {allocation}: cannot be read ({why})") from error
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise SecateurError(f"allocation {allocation[:80]!r} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise SecateurError(f"allocation {allocation[:80]!r} is no JSON object of pattern: share")
    told = found.get("kind"), found.get("format")
    if told not in ((None, None), _SENSITIVITY):
        raise SecateurError(
            f"allocation {allocation[:80]!r}: a file of kind {told[0]!r} and format {told[1]!r}; this version reads "
            f"{_SENSITIVITY[0]} files of format {_SENSITIVITY[1]}: make it anew with secateur sensitivity"
        )
    if ("losses" in found or told == _SENSITIVITY) and not isinstance(found.get("losses"), dict):
        raise SecateurError(f"allocation {allocation[:80]!r}: losses must be {{pattern: {{share: loss}}}}")
    return found


def shares(
    weights: Sequence[Weight],
    sparsity: float,
    allocation: str | Mapping[str, Any],
    measured: Mapping[str, float] | None = None,
    spread: float = 0.08,
) -> dict[str, float]:
    """Share of each weight that goes.

    Args:
        weights: all of them.
        sparsity: of all of them together, in [0, 1).
        allocation: what `read_allocation` gave.
        measured: for owl: weight -> share of outliers in its block; for magnitude: weight -> its share itself.
        spread: for owl: how far a share may lie from the mean.

    Raises:
        SecateurError: for patterns that match nothing or contradict each other, and a total that cannot be met.
    """
    if allocation == "uniform":
        return {w.name: sparsity for w in weights}
    if isinstance(allocation, str) and allocation in NAMED:
        if measured is None:
            raise ValueError(f"{allocation} needs what was measured of each weight")
        return owl(weights, sparsity, measured, spread) if allocation == "owl" else dict(measured)
    if isinstance(allocation, str):
        raise SecateurError(f"there is no allocation {allocation!r}{nearest(allocation, NAMED)}")
    if "losses" in allocation:
        return from_table(weights, sparsity, allocation["losses"])
    return from_map(weights, sparsity, allocation)


def owl(weights: Sequence[Weight], sparsity: float, outliers: Mapping[str, float], spread: float) -> dict[str, float]:
    """Blocks with more outliers keep more: Yin et al. 2023, "Outlier Weighed Layerwise Sparsity" (arXiv:2310.05175).

    The shares of outliers are stretched to a range of twice `spread` and moved so that the mean, by size, is
    `sparsity`.

    Raises:
        SecateurError: where that leaves [0, 1).
    """
    low, high = min(outliers.values()), max(outliers.values())
    width = 2 * spread / (high - low) if high > low else 0.0
    keep = {w.name: (outliers[w.name] - low) * width for w in weights}
    total = sum(w.size for w in weights)
    mean = sum(w.size * keep[w.name] for w in weights) / total
    found = {name: sparsity - (share - mean) for name, share in keep.items()}
    if min(found.values()) < 0 or max(found.values()) >= 1:
        raise SecateurError(
            f"owl would ask for shares from {min(found.values()):.2f} to {max(found.values()):.2f} around "
            f"{sparsity:g}: choose a smaller owl_spread than {spread:g}"
        )
    return found


def from_map(weights: Sequence[Weight], sparsity: float, given: Mapping[str, Any]) -> dict[str, float]:
    """The shares that patterns name; all other weights lose alike, so that the total is met.

    Raises:
        SecateurError: for a share outside of [0, 1), a pattern that matches nothing, two that disagree, and a total
            that the others cannot meet.
    """
    found: dict[str, float] = {}
    said: dict[str, str] = {}
    for pattern, share in given.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise SecateurError(f"allocation {pattern}: the share must be in [0, 1), not {share!r}")
        for name in matching([w.name for w in weights], pattern):
            if name in found and found[name] != share:
                raise SecateurError(
                    f"allocation: {said[name]!r} gives {name} {found[name]:g} and {pattern!r} gives it {share:g}: "
                    "make one of the patterns narrower"
                )
            found[name], said[name] = float(share), pattern
    total = sum(w.size for w in weights)
    gone = sum(w.size * found.get(w.name, 0.0) for w in weights)
    rest = sum(w.size for w in weights if w.name not in found)
    if not rest:
        if abs(gone - sparsity * total) > 1:  # shares that stand for whole elements may be off by one
            raise SecateurError(
                f"allocation names every weight and comes to {100 * gone / total:.4g}%, and the budget asks for "
                f"{100 * sparsity:g}%: leave some weights to make up the difference, or change the budget"
            )
        return found
    other = (sparsity * total - gone) / rest
    if not 0 <= other < 1:
        raise SecateurError(
            f"allocation: the other weights would have to lose {100 * other:.4g}% of theirs to meet a sparsity of "
            f"{100 * sparsity:g}%; reachable are {100 * gone / total:.4g}% to {100 * (gone + rest) / total:.4g}%"
        )
    return {w.name: found.get(w.name, other) for w in weights}


def from_table(weights: Sequence[Weight], sparsity: float, losses: Mapping[str, Any]) -> dict[str, float]:
    """The shares with the smallest sum of measured losses, by mixed-integer programming over a grid of 1%.

    Args:
        weights: all of them.
        sparsity: of all together.
        losses: name or pattern -> {share: loss}; between shares losses are taken to be linear, at 0 none.

    Raises:
        SecateurError: where a weight has no losses, or two, or none of the shares is enough.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    names = [w.name for w in weights]
    groups = [(pattern, matching(names, pattern)) for pattern in losses]
    covered = [name for _, found in groups for name in found]
    for name in names:
        if covered.count(name) != 1:
            raise SecateurError(
                f"the sensitivity table has {covered.count(name) or 'no'} entries for {name}: it needs one"
            )
    curves = [_curve(pattern, losses[pattern]) for pattern, _ in groups]
    sizes = {w.name: w.size for w in weights}
    size = [sum(sizes[name] for name in found) for _, found in groups]
    cost = np.concatenate([[loss for _, loss in curve] for curve in curves])
    zeros = np.concatenate([[s * n for s, _ in curve] for curve, n in zip(curves, size, strict=True)])
    which = np.concatenate([np.full(len(curve), i) for i, curve in enumerate(curves)])
    one = np.stack([(which == i).astype(float) for i in range(len(curves))])
    target = sparsity * sum(size)
    most = sum(max(s for s, _ in curve) * n for curve, n in zip(curves, size, strict=True))
    if most < target - 1e-6 * sum(size):
        raise SecateurError(
            f"the sensitivity table's largest shares come to {100 * most / sum(size):.4g}%, less than the budget's "
            f"{100 * sparsity:g}%: measure larger ones, or ask for less"
        )
    constraints = [LinearConstraint(one, 1, 1), LinearConstraint(zeros[None], target - 1e-6 * sum(size), np.inf)]
    found = milp(cost, constraints=constraints, integrality=np.ones(len(cost), dtype=int), bounds=Bounds(0, 1))
    if found.x is None:
        raise SecateurError(f"no allocation was found from the sensitivity table: {found.message}")
    chosen = {
        name: curve[int(np.argmax(found.x[which == i]))][0]
        for i, (curve, (_, members)) in enumerate(zip(curves, groups, strict=True))
        for name in members
    }
    over = sum(sizes[name] * share for name, share in chosen.items()) - target
    for name in sorted(chosen, key=lambda n: -sizes[n]):  # the grid overshoots: give back, the largest first
        back = min(over / sizes[name], 1 / _GRID, chosen[name])
        if back > 0:
            chosen[name] -= back
            over -= back * sizes[name]
    return chosen


def _curve(name: str, given: Any) -> list[tuple[float, float]]:
    """(share, loss) on a grid, from the measured ones."""
    try:
        points = sorted({0.0: 0.0, **{float(share): float(loss) for share, loss in dict(given).items()}}.items())
    except (TypeError, ValueError) as error:
        raise SecateurError(f"the sensitivity table's entry {name} is not {{share: loss}}: {error}") from error
    if points[0][0] < 0 or points[-1][0] >= 1 or not np.isfinite([loss for _, loss in points]).all():
        raise SecateurError(
            f"the sensitivity table's entry {name} has a share outside of [0, 1) or a loss that is not finite"
        )
    at = [i / _GRID for i in range(int(points[-1][0] * _GRID + 1e-9) + 1)]
    at += [points[-1][0]] if points[-1][0] - at[-1] > 1e-9 else []
    losses = np.interp(at, [share for share, _ in points], [loss for _, loss in points])
    return list(zip(at, losses.tolist(), strict=True))
