"""Enumerate the uniform architectures within a budget, and rank them by a proxy."""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import ceil, prod

from secateur.choose.budget import Budget
from secateur.choose.cost import Costs, UniformCost
from secateur.errors import SecateurError

# Minitron's step sizes; halved until an axis has MIN_CHOICES sizes to choose from, so that small models have some.
DIVISORS: Mapping[str, int] = {
    **{"hidden": 256, "ffn": 512, "heads": 1, "kv_groups": 1},
    **{"experts": 8, "expert_ffn": 512, "shared_expert_ffn": 512},
    **{"ssm_heads": 1, "ssm_head_dim": 8, "ssm_channels": 256, "layers": 2},
}
MIN_CHOICES = 8
MOST_POINTS = 200_000
"""Architectures that a search looks at: with many kinds each gets fewer sizes to choose from."""
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
    ties: Mapping[str, str] = field(default_factory=dict)
    """Kind -> the kind that it follows in proportion."""

    def points(self, *, smallest_first: bool = False) -> Iterator[dict[str, int]]:
        """Every combination, one at a time; heads only where the KV groups share them evenly, and gain none."""
        free = {kind: sizes for kind, sizes in self.choices.items() if kind not in self.ties}
        for values in product(*(sizes[::-1] if smallest_first else sizes for sizes in free.values())):
            sizes = dict(zip(free, values, strict=True))
            for follower, leader in self.ties.items():
                sizes[follower] = self.dense[follower] * sizes[leader] // self.dense[leader]
            if (
                "kv_groups" not in sizes
                or "heads" not in sizes
                or (sizes["heads"] % sizes["kv_groups"] == 0 and per_group(sizes) <= per_group(self.dense))
            ):
                yield sizes

    def thinned(self, most: int = MOST_POINTS) -> "Grid":
        """Every other size of the kind that has most, until there are at most so many combinations."""
        thin = {kind: list(sizes) for kind, sizes in self.choices.items()}
        free = [kind for kind in thin if kind not in self.ties]
        while prod(len(thin[kind]) for kind in free) > most:
            kind = max(free, key=lambda k: len(thin[k]))
            if len(thin[kind]) < 3:
                break
            thin[kind] = list(dict.fromkeys([*thin[kind][::2], thin[kind][-1]]))
        return Grid(self.dense, thin, self.ties)

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


def choices(
    kind: str, size: int, max_cut: float, divisor: int | None = None, *, multiple: int = 1, minimum: int = 1
) -> list[int]:
    """Sizes from `size` down to (1 - max_cut) * size in steps of a divisor; the present size is always one.

    Args:
        kind: what is cut; sets the default divisor.
        size: the present size.
        max_cut: the largest share that may go, 0 to 1.
        divisor: multiples of which are allowed; None for the kind's default, halved while fewer than
            `MIN_CHOICES` sizes are left.
        multiple: what else sizes must be multiples of.
        minimum: units that must stay.

    Raises:
        SecateurError: for a divisor below 1.
    """
    lowest = max(1, minimum, ceil(size * (1 - max_cut) - 1e-9))
    step = DIVISORS[kind] if divisor is None else divisor
    if step < 1:
        raise SecateurError(f"the divisor of {kind} must be at least 1, not {step}")
    while True:
        found = [n for n in range(size - size % step, lowest - 1, -step) if n > 0 and n % multiple == 0]
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
    limits = _limits(grid, cost, budget)
    smallest = dict.fromkeys(limits, float("inf"))
    feasible = 0

    def candidates() -> Iterator[Candidate]:
        nonlocal feasible
        for sizes in _fitting(grid.points(), cost, limits, valid, smallest):
            if sizes != grid.dense:
                feasible += 1
                yield Candidate(sizes, cost_at(cost, sizes), loss(sizes))

    best = heapq.nsmallest(top_k, candidates(), key=lambda c: (c.loss, -c.costs.params))
    if not best:
        raise SecateurError(_unreachable(limits, smallest, cost_at(cost, grid.dense)))
    return best, feasible


def check_reachable(grid: Grid, cost: UniformCost, budget: Budget, valid: Callable[[Mapping[str, int]], bool]) -> None:
    """Raise SecateurError at once where no candidate can meet the budget; says the smallest reachable costs."""
    limits = _limits(grid, cost, budget)
    smallest = dict.fromkeys(limits, float("inf"))
    found = _fitting(grid.points(smallest_first=True), cost, limits, valid, smallest)
    if next((sizes for sizes in found if sizes != grid.dense), None) is None:
        raise SecateurError(_unreachable(limits, smallest, cost_at(cost, grid.dense)))


def _limits(grid: Grid, cost: UniformCost, budget: Budget) -> dict[str, float]:
    dense = cost_at(cost, grid.dense)
    return {measure: limit.absolute(dense.of(measure)) for measure, limit in budget.limits.items()}


def _fitting(
    points: Iterator[dict[str, int]],
    cost: UniformCost,
    limits: Mapping[str, float],
    valid: Callable[[Mapping[str, int]], bool],
    smallest: dict[str, float],
) -> Iterator[dict[str, int]]:
    """Valid points within the limits; on the way the smallest cost of any valid one is noted."""
    for sizes in points:
        at = {m: cost.of(m, *_counted(sizes)) for m in limits}
        fits = all(at[m] <= limit for m, limit in limits.items())
        if (fits or any(at[m] < smallest[m] for m in limits)) and valid(sizes):
            smallest.update({m: min(smallest[m], at[m]) for m in limits})
            if fits:
                yield sizes


def cost_at(cost: UniformCost, sizes: Mapping[str, int]) -> Costs:
    """Costs at sizes that count heads over all groups."""
    return cost(*_counted(sizes))


def _counted(sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    return {**sizes, "heads": per_group(sizes)}, sizes.get("layers", 1)


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
