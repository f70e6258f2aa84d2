"""What each choice would lose and cost: slots, their levels, and a mixed-integer program that picks one level of each.

A slot is what goes down together: the units of an axis, the heads and KV groups of one attention, and at the end the
whole sub-layer. Costs are exact: the Space's polynomials in axis lengths become sums of terms, each a table over the
levels of the slots that it depends on. Terms over several slots are made linear by one variable for each combination.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from secateur import world
from secateur.choose.cost import Workload, active_sizes, cache_dtype
from secateur.errors import SecateurError
from secateur.space import Polynomial, Space

if TYPE_CHECKING:
    from scipy.optimize import LinearConstraint

Values = npt.NDArray[np.float64]
Choice = tuple[int, ...]
"""The level of each slot."""


@dataclass(frozen=True)
class Level:
    """One state of a slot.

    Attributes:
        sizes: Axis -> units that stay in each of its groups; axes that are not named stay whole.
        dropped: Blocks that go whole.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Slot:
    """What one decision is made for.

    Attributes:
        name: For people.
        levels: The whole first, then ever less.
        axes: All axes that its levels may cut.
    """

    name: str
    levels: tuple[Level, ...]
    axes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Term:
    """A number for every combination of levels of some slots: an array with one dimension for each of them."""

    slots: tuple[int, ...]
    values: Values

    def at(self, choice: Choice) -> float:
        """Its value for a choice."""
        return float(self.values[tuple(choice[s] for s in self.slots)])


@dataclass(frozen=True)
class Table:
    """Slots, what their levels lose, and what they cost by measure."""

    slots: tuple[Slot, ...]
    loss: tuple[Term, ...]
    costs: Mapping[str, tuple[Term, ...]]

    def cost(self, measure: str, choice: Choice) -> float:
        """What a choice costs."""
        return sum(term.at(choice) for term in self.costs[measure])

    def lost(self, choice: Choice) -> float:
        """What it is expected to lose."""
        return sum(term.at(choice) for term in self.loss)

    def fits(self, choice: Choice, limits: Mapping[str, float]) -> bool:
        """Whether it keeps all limits."""
        return all(self.cost(m, choice) <= limit * (1 + 1e-12) for m, limit in limits.items())

    @property
    def whole(self) -> Choice:
        """The dense model."""
        return (0,) * len(self.slots)


def cost_terms(space: Space, workload: Workload, slots: Sequence[Slot]) -> dict[str, tuple[Term, ...]]:
    """Exact costs (params, active_params, memory, macs, flops) as terms over slots; see `choose.cost.polynomials`."""
    builder = _Builder(space, slots)
    active = active_sizes(space)
    owned = {name: block.name for block in space.blocks for name in block.parameters}
    blocks = {name: [b.name for b in space.blocks if name in b.parameters] for name in owned}
    for parameter in space.parameters.values():
        gone = blocks.get(parameter.name, [])
        builder.add("params", parameter.size, 1.0, gone)
        builder.add("active_params", active.get(parameter.name, parameter.size), 1.0, gone)
        builder.add("memory", parameter.size, workload.itemsize(parameter.dtype), gone)
    bytes_each = workload.batch * workload.itemsize(cache_dtype(space))
    for cache in space.caches:
        builder.add("memory", cache.size, bytes_each * workload.positions(cache.module), _around(space, cache.module))
    for work in space.work:
        around = _around(space, work.module)
        builder.add("macs", work.macs, 1 / space.batch, around)
        builder.add("flops", work.macs, 2 / space.batch, around)
    return {m: builder.terms(m) for m in ("params", "active_params", "memory", "macs", "flops")}


def _around(space: Space, module: str) -> list[str]:
    """Blocks that a module lies in."""
    return [block.name for block in space.blocks if f"{module}.".startswith(f"{block.name}.")]


class _Builder:
    """Adds up polynomials in axis lengths as terms over slots."""

    def __init__(self, space: Space, slots: Sequence[Slot]) -> None:
        self.slots = slots
        self.whole = {axis.name: float(axis.per_group) for axis in space.axes}
        self.slot_of = {axis: i for i, slot in enumerate(slots) for axis in slot.axes}
        self.droppers = defaultdict(list)
        for i, slot in enumerate(slots):
            for block in {name for level in slot.levels for name in level.dropped}:
                self.droppers[block].append(i)
        self.found: dict[str, dict[tuple[int, ...], Values]] = defaultdict(dict)

    def add(self, measure: str, size: Polynomial, factor: float, blocks: Sequence[str]) -> None:
        """Add a polynomial that is 0 once one of some blocks is dropped."""
        for names, coefficient in size.items():
            axes = defaultdict(list)
            value = coefficient * factor
            for name in names:
                if name in self.slot_of:
                    axes[self.slot_of[name]].append(name)
                else:
                    value *= self.whole[name]
            involved = sorted({*axes, *(i for block in blocks for i in self.droppers[block])})
            parts = [self._along(i, axes[i], blocks) for i in involved]
            array = np.array(value)
            for part in parts:
                array = np.multiply.outer(array, part)
            key = tuple(involved)
            table = self.found[measure]
            table[key] = table[key] + array if key in table else array

    def _along(self, i: int, axes: Sequence[str], blocks: Sequence[str]) -> Values:
        """The factor that a slot's levels bring."""
        values = []
        for level in self.slots[i].levels:
            length = 0.0 if set(level.dropped) & set(blocks) else 1.0
            for name in axes:
                length *= level.sizes.get(name, self.whole[name])
            values.append(length)
        return np.array(values)

    def terms(self, measure: str) -> tuple[Term, ...]:
        """All terms of a measure; those within others are added to them, so that there are few."""
        table = dict(self.found.get(measure, {}))
        for key in sorted(table, key=len):
            wider = next((other for other in table if len(other) > len(key) and set(key) < set(other)), None)
            if wider is not None and key:
                shape = [len(self.slots[s].levels) if s in key else 1 for s in wider]
                table[wider] = table[wider] + table.pop(key).reshape(shape)
        return tuple(Term(key, values) for key, values in table.items())


@dataclass(frozen=True)
class Solution:
    """What the program found.

    Attributes:
        choice: Levels.
        optimal: Whether nothing better exists, as far as the table tells.
        gap: How far from the best it may be, as a share of the loss.
    """

    choice: Choice
    optimal: bool
    gap: float


MOST_COMBINATIONS = 200_000
OUT_OF_TIME = 1
"""What scipy's milp says then."""
EXCEEDED = (0, 0, 0, 0, 1e-7, 1e-6, 1e-5, 1e-4)
"""Shares by which limits are lowered, one after the other, while the solver exceeds them by a rounding error."""
OBJECTIVE = 1e4
"""Largest coefficient of the objective: the solver stops within 1e-6 of the best, whatever the scale."""


def solve(table: Table, limits: Mapping[str, float], *, seconds: float = 120.0, gap: float = 1e-6) -> Solution:
    """The choice of least loss that keeps all limits.

    Args:
        table: losses and costs.
        limits: measure -> the most that it may be.
        seconds: after which the best that was found so far counts.
        gap: share of the loss by which the result may be worse than the best.

    Raises:
        SecateurError: where no choice keeps the limits (says the smallest reachable value of each), where levels have
            too many combinations, or where time runs out before any choice is found.
    """
    if world.split():  # where time runs out, each process may be elsewhere
        return world.from_first(lambda: _solve(table, limits, seconds, gap))
    return _solve(table, limits, seconds, gap)


def _solve(table: Table, limits: Mapping[str, float], seconds: float, gap: float) -> Solution:
    program = _Program(table, limits)
    objective = program.objective(table.loss)
    over: list[Choice] = []
    for less in EXCEEDED:  # the solver keeps limits but to about a millionth
        within = {measure: limit - less * abs(limit) for measure, limit in limits.items()}
        result = program.run(objective, within, seconds, gap, without=over)
        if result is None:
            break
        choice, left = result
        if table.fits(choice, limits):
            return Solution(choice, left <= max(gap, 1e-9), left)
        over.append(choice)
    raise SecateurError(unreachable(table, limits))


def least(table: Table, measure: str) -> float:
    """The smallest value of a measure that any choice has."""
    if all(len(t.slots) <= 1 for t in table.costs[measure]):
        total = [np.zeros(len(slot.levels)) for slot in table.slots]
        fixed = 0.0
        for term in table.costs[measure]:
            if term.slots:
                total[term.slots[0]] = total[term.slots[0]] + term.values
            else:
                fixed += float(term.values)
        return fixed + sum(float(values.min()) for values in total)
    program = _Program(table, {measure: 0.0})
    found = program.run(program.objective(table.costs[measure]), {}, 20.0, 1e-6)
    return table.cost(measure, found[0]) if found is not None else table.cost(measure, table.whole)


def unreachable(table: Table, limits: Mapping[str, float]) -> str:
    """Why no choice keeps the limits: the smallest reachable value of each."""
    parts = []
    for measure, limit in limits.items():
        floor, whole = least(table, measure), table.cost(measure, table.whole)
        missed = ", which is above the limit" if floor > limit * (1 + 1e-9) else ""
        shown = f"{limit:.4g} s" if measure == "latency" else f"{limit:,.0f}"
        small = f"{floor:.4g} s" if measure == "latency" else f"{floor:,.0f}"
        share = f" ({100 * floor / whole:.1f}% of the dense)" if whole else ""
        parts.append(f"{measure}={shown}: the smallest reachable is {small}{share}{missed}")
    both = "" if any("above" in part for part in parts) else "; each could be met alone, but not all together"
    return f"the budget cannot be met ({'; '.join(parts)}){both}"


class _Program:
    """Variables: one for each level of each slot, and one for each combination of levels of terms over several."""

    def __init__(self, table: Table, limits: Mapping[str, float]) -> None:
        self.table = table
        counts = [len(slot.levels) for slot in table.slots]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.binary = int(self.starts[-1])
        size = self.binary
        self.joint: dict[tuple[int, ...], int] = {}
        terms = [*table.loss, *(term for measure in limits for term in table.costs[measure])]
        for term in terms:
            if len(term.slots) > 1 and term.slots not in self.joint:
                self.joint[term.slots] = size
                size += term.values.size
        if size > MOST_COMBINATIONS:
            raise SecateurError(f"the levels have {size:,} combinations, too many to solve: ask for fewer levels")
        self.size = size

    def objective(self, terms: Sequence[Term]) -> Values:
        """Terms as coefficients of the variables; constants are left out."""
        row = np.zeros(self.size)
        for term in terms:
            if term.slots:
                start = self.starts[term.slots[0]] if len(term.slots) == 1 else self.joint[term.slots]
                row[start : start + term.values.size] += term.values.ravel()
        return row

    def run(
        self,
        objective: Values,
        limits: Mapping[str, float],
        seconds: float,
        gap: float,
        without: Sequence[Choice] = (),
    ) -> tuple[Choice, float] | None:
        """Solve, without some choices; the choice and how far from the best it may be, or None where nothing fits."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints = [self._one_each(), *self._joined()]
        for measure, limit in limits.items():
            terms = self.table.costs[measure]
            fixed = sum(float(term.values) for term in terms if not term.slots)
            row, scale = self.objective(terms), max(abs(limit), 1e-30)
            constraints.append(LinearConstraint(row[None] / scale, -np.inf, (limit - fixed) / scale))
        for choice in without:
            row = np.zeros(self.size)
            row[self.starts[:-1] + np.array(choice)] = 1
            constraints.append(LinearConstraint(row[None], -np.inf, len(choice) - 1))
        integral = np.zeros(self.size, dtype=np.int64)
        integral[: self.binary] = 1
        scale = float(np.abs(objective).max()) or 1.0
        found = milp(
            objective * (OBJECTIVE / scale),
            constraints=constraints,
            integrality=integral,
            bounds=Bounds(0, 1),
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        if found.x is None and found.status == OUT_OF_TIME:
            raise SecateurError(f"no choice was found within {seconds:g} s: give it longer, or ask for fewer levels")
        if found.x is None:
            return None
        choice = tuple(int(np.argmax(found.x[a:b])) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True))
        return choice, float(getattr(found, "mip_gap", None) or 0.0)

    def _one_each(self) -> "LinearConstraint":
        from scipy import sparse
        from scipy.optimize import LinearConstraint

        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        ones = np.ones(self.binary)
        matrix = sparse.csr_matrix((ones, (rows, np.arange(self.binary))), shape=(len(self.starts) - 1, self.size))
        return LinearConstraint(matrix, 1, 1)

    def _joined(self) -> "list[LinearConstraint]":
        """Of each joint table what lies at a level adds up to that level's variable."""
        from scipy import sparse
        from scipy.optimize import LinearConstraint

        found = []
        for slots, start in self.joint.items():
            shape = tuple(len(self.table.slots[s].levels) for s in slots)
            numbers = np.arange(int(np.prod(shape))).reshape(shape)
            rows, columns, values, row = [], [], [], 0
            for dim, slot in enumerate(slots):
                for level in range(shape[dim]):
                    own = np.take(numbers, level, axis=dim).ravel() + start
                    rows += [row] * (len(own) + 1)
                    columns += [*own.tolist(), int(self.starts[slot]) + level]
                    values += [1.0] * len(own) + [-1.0]
                    row += 1
            matrix = sparse.csr_matrix((values, (rows, columns)), shape=(row, self.size))
            found.append(LinearConstraint(matrix, 0, 0))
        return found
