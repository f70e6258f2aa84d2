"""What the methods share that rank units of axes and cut until a budget is met."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload, polynomials
from secateur.choose.ladder import Ladder, Levels, Meter, ladder, settle
from secateur.choose.select import check_divisors, choose_axes, divisor_of, least_units
from secateur.errors import SecateurError
from secateur.space import Axis, Polynomial, Space

MEASURES = ("params", "active_params", "macs", "flops", "memory")
"""What analytic costs are known of."""
UNITS = ("ffn", "expert_ffn", "shared_expert_ffn", "heads", "kv_groups", "channels")
"""Kinds that lie inside of blocks, and the channels of what has none."""


@dataclass(frozen=True)
class Range:
    """How far which axes may go down."""

    axes: Sequence[Axis]
    least: Mapping[str, int]
    """Axis -> units that must stay."""
    round_to: int | Mapping[str, int] | None = None

    def ladders(self, groups: Sequence[Sequence[Axis]], scores: Mapping[str, torch.Tensor]) -> list[Ladder]:
        """One for each group of axes that go down in lockstep, where anything may go.

        Raises:
            SecateurError: where nothing may.
        """
        every = [
            ladder(group, scores, max(self.least[axis.name] for axis in group), divisor_of(group[0], self.round_to))
            for group in groups
        ]
        found = [one for one in every if len(one.sizes) > 1]
        if not found:
            raise SecateurError("keep_at_least, limits and round_to leave nothing to cut: allow more")
        return found


def range_of(
    model: nn.Module,
    space: Space,
    axes: Sequence[Axis],
    keep_at_least: float,
    limits: Mapping[str, float] | None,
    round_to: int | Mapping[str, int] | None,
) -> Range:
    """How far these axes may go down.

    Raises:
        SecateurError: for shares, patterns and divisors that do not fit; see `choose.select`.
    """
    check_divisors(round_to, [axis.kind for axis in axes])
    modules = [name for name, _ in model.named_modules()]
    return Range(axes, least_units(space, modules, axes, keep_at_least, limits or {}), round_to)


def axes_inside(model: nn.Module, space: Space, only: Sequence[str], ignore: Sequence[str]) -> list[Axis]:
    """What is cut unless `only` says otherwise: FFN units and heads, or the channels of what has neither.

    Heads that share keys and values go with those: the KV group is the unit.

    Raises:
        SecateurError: for a pattern that matches nothing, or where nothing is left.
    """
    modules = [name for name, _ in model.named_modules()]
    if only:
        return choose_axes(space, modules, only, ignore)
    found = choose_axes(space, modules, (), ignore)
    inside = [axis for axis in found if axis.kind in UNITS]
    grouped = {axis.name for axis in inside if axis.kind == "heads" and axis.parent is not None}
    return [axis for axis in inside if axis.name not in grouped] or found


def check_limits(method: str, budget: Budget, served: Sequence[str] = MEASURES) -> None:
    """Raise SecateurError unless the budget is made of limits that the method serves."""
    if budget.dims:
        raise SecateurError(f"{method} takes a budget, such as macs=50%, and no exact dims")
    unserved = [m for m in budget.limits if m not in served] + (["n:m"] if budget.n_m else [])
    if unserved or not budget.limits:
        what = f"a budget of {unserved[0]} is not served by {method}" if unserved else "no budget is given"
        raise SecateurError(f"{what}: it takes {', '.join(served)}")


def costs_of(space: Space, workload: Workload, dropped: Sequence[str] = ()) -> dict[str, Polynomial]:
    """What a model costs by every measure of `MEASURES` that is known of it; see `choose.cost.polynomials`."""
    costs = dict(polynomials(space, workload, dropped))
    costs["flops"] = {names: 2 * count for names, count in costs["macs"].items()}
    return costs


def limited(space: Space, workload: Workload, budget: Budget) -> tuple[dict[str, Polynomial], dict[str, float]]:
    """The polynomials of what the budget limits, and the limits in their units.

    Raises:
        SecateurError: for a measure that is not known of the model, and a budget that the model keeps already.
    """
    costs = costs_of(space, workload)
    for measure in budget.limits:
        if not costs[measure]:
            raise SecateurError(f"the budget limits {measure}, and the model has none that are counted")
    costs = {measure: costs[measure] for measure in budget.limits}
    dense = Meter(space, [], costs)(np.zeros(0, dtype=np.int64))
    allowed = {measure: limit.absolute(dense[measure]) for measure, limit in budget.limits.items()}
    check_above(budget, dense, allowed)
    return costs, allowed


def check_above(budget: Budget, dense: Mapping[str, float], allowed: Mapping[str, float]) -> None:
    """Raise SecateurError where the dense model keeps all limits."""
    if all(dense[measure] <= limit for measure, limit in allowed.items()):
        have = ", ".join(f"{dense[m]:,.6g} {m}" if m == "latency" else f"{dense[m]:,.0f} {m}" for m in allowed)
        raise SecateurError(f"the model keeps the budget {budget} already ({have}): nothing would be cut")


@contextmanager
def hinting() -> Iterator[None]:
    """Say to a budget that cannot be met what would allow more."""
    try:
        yield
    except SecateurError as error:
        raise SecateurError(f"{error}; allow more: a lower keep_at_least, fewer limits, ignore or only") from None


def settled(order: Levels, meter: Meter, allowed: Mapping[str, float]) -> tuple[Levels, dict[str, dict[str, float]]]:
    """How far each ladder goes, and for each limit what is reached.

    Raises:
        SecateurError: for a budget that cannot be met; says the smallest reachable costs.
    """
    with hinting():
        levels = settle(order, meter, allowed)
    return levels, {m: {"limit": limit, "reached": meter(levels)[m]} for m, limit in allowed.items()}


def together(axes: Sequence[Axis], alike: bool) -> list[list[Axis]]:
    """Axes that go down in lockstep: with `alike`, those of one kind and shape in all layers; else each alone."""
    found: dict[Hashable, list[Axis]] = {}
    for axis in axes:
        shared = alike and axis.block is not None
        key = (axis.kind, axis.size, axis.groups, axis.minimum) if shared else axis.name
        found.setdefault(key, []).append(axis)
    return list(found.values())


def is_pretrained(model: nn.Module) -> bool:
    """Whether it is a Hugging Face model: stock loaders take uniform sizes only."""
    return hasattr(type(model), "from_pretrained")


def by_mean(values: torch.Tensor) -> torch.Tensor:
    """Scores of one axis over their mean, float64."""
    mean = values.double().mean()
    return values.double() / mean if mean > 0 else values.double()


def check_finite(scores: Mapping[str, torch.Tensor], what: str) -> None:
    """Raise SecateurError for scores that are not finite; names the axis."""
    for name, values in scores.items():
        if not bool(torch.isfinite(values).all()):
            raise SecateurError(f"{what}: scores of {name} are not finite: check the weights and dtype")
