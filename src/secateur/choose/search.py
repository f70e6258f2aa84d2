"""Enumerate the uniform architectures within a budget, and rank them by a proxy."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil

from secateur.choose.budget import Budget
from secateur.choose.cost import Costs, UniformCost
from secateur.errors import SecateurError

# Minitron's step sizes; halved until an axis has MIN_CHOICES sizes to choose from, so that small models have some.
DIVISORS: Mapping[str, int] = {"hidden": 256, "ffn": 512, "heads": 1, "kv_groups": 1, "layers": 2}
MIN_CHOICES = 8
MEASURES = ("params", "active_params", "memory")


@dataclass(frozen=True)
class Candidate:
    """One architecture that meets the budget."""

    sizes: Mapping[str, int]
    """Kind -> size; heads are counted over all groups, layers are those that stay."""
    costs: Costs
    loss: float
    """What the proxy expects it to lose; lower is better."""


@dataclass(frozen=True)
class Grid:
    """The sizes to choose from, for each kind, largest first."""

    dense: Mapping[str, int]
    choices: Mapping[str, Sequence[int]]

    def points(self) -> Iterator[dict[str, int]]:
        """Every combination, one at a time; heads only where the KV groups share them evenly, and gain none."""
        kinds = list(self.choices)
        for values in product(*self.choices.values()):
            sizes = dict(zip(kinds, values, strict=True))
            if (
                "kv_groups" not in sizes
                or "heads" not in sizes
                or (sizes["heads"] % sizes["kv_groups"] == 0 and per_group(sizes) <= per_group(self.dense))
            ):
                yield sizes

    def probes(self) -> dict[str, int]:
        """For each kind that can be cut: a size in the middle of its choices, where the others keep theirs."""
        found = {kind: sizes[len(sizes) // 2] for kind, sizes in self.choices.items() if len(sizes) > 1}
        found = {kind: size for kind, size in found.items() if kind != "layers"}
        if "kv_groups" in self.dense and "heads" in found:
            del found["heads"]  # heads of the groups that go are the groups' loss: probe what one group may lose
            each = sorted({per_group(sizes) for sizes in self.points()} - {per_group(self.dense)}, reverse=True)
            if each:
                found["heads"] = each[len(each) // 2] * self.dense["kv_groups"]
        return found


def per_group(sizes: Mapping[str, int]) -> int:
    """Query heads in each KV group; all heads where there are no groups."""
    return sizes.get("heads", 1) // sizes.get("kv_groups", 1)


def choices(kind: str, size: int, max_cut: float, divisor: int | None = None) -> list[int]:
    """Sizes from `size` down to (1 - max_cut) * size in steps of a divisor; the present size is always one.

    Args:
        kind: what is cut; sets the default divisor.
        size: the present size.
        max_cut: the largest share that may go, 0 to 1.
        divisor: multiples of which are allowed; None for the kind's default, halved while fewer than
            `MIN_CHOICES` sizes are left.

    Raises:
        SecateurError: for a divisor below 1.
    """
    lowest = max(1, ceil(size * (1 - max_cut) - 1e-9))
    step = DIVISORS[kind] if divisor is None else divisor
    if step < 1:
        raise SecateurError(f"the divisor of {kind} must be at least 1, not {step}")
    while True:
        found = [n for n in range(size - size % step, lowest - 1, -step) if n > 0]
        sizes = list(dict.fromkeys([size, *found]))
        if divisor is not None or step == 1 or len(sizes) >= MIN_CHOICES:
            return sizes
        step //= 2


def search(
    grid: Grid,
    cost: UniformCost,
    budget: Budget,
    loss: Callable[[Mapping[str, int]], float],
    valid: Callable[[Mapping[str, int]], bool],
    top_k: int,
) -> tuple[list[Candidate], int]:
    """The `top_k` feasible candidates of the least expected loss, best first, and how many were feasible.

    Nothing but the best is held in memory.

    Raises:
        SecateurError: where no candidate meets the budget; says the smallest reachable cost of each limit.
    """
    dense = cost_at(cost, grid.dense)
    limits = {measure: limit.absolute(dense.of(measure)) for measure, limit in budget.limits.items()}
    smallest = dict.fromkeys(limits, float("inf"))
    feasible = 0

    def candidates() -> Iterator[Candidate]:
        nonlocal feasible
        for sizes in grid.points():
            at = cost_at(cost, sizes)
            fits = all(at.of(measure) <= limit for measure, limit in limits.items())
            lower = any(at.of(measure) < smallest[measure] for measure in limits)
            if not (fits or lower) or not valid(sizes):
                continue
            for measure in limits:
                smallest[measure] = min(smallest[measure], at.of(measure))
            if fits and sizes != grid.dense:
                feasible += 1
                yield Candidate(sizes, at, loss(sizes))

    best = heapq.nsmallest(top_k, candidates(), key=lambda c: (c.loss, -c.costs.params))
    if not best:
        raise SecateurError(_unreachable(limits, smallest, dense))
    return best, feasible


def cost_at(cost: UniformCost, sizes: Mapping[str, int]) -> Costs:
    """Costs at sizes that count heads over all groups."""
    return cost({**sizes, "heads": per_group(sizes)}, sizes.get("layers", 1))


def _unreachable(limits: Mapping[str, float], smallest: Mapping[str, float], dense: Costs) -> str:
    parts = []
    for measure, limit in limits.items():
        floor, whole = smallest[measure], dense.of(measure)
        share = f"{100 * floor / whole:.1f}%" if whole else "?"
        missed = "" if floor <= limit else ", which is above the limit"
        parts.append(f"{measure}={limit:,.0f}: the smallest reachable is {floor:,.0f} ({share} of the dense){missed}")
    if all(smallest[measure] <= limit for measure, limit in limits.items()):
        parts.append("each alone can be met, but not all together")
    return (
        f"the budget cannot be met ({'; '.join(parts)}); "
        "allow more with --max-width-cut or --max-depth-cut, smaller --divisors, or fewer --skip"
    )
