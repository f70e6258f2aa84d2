"""Measuring single cuts for FastNAS: the score of each axis at a few sizes, and the latency of whole plans."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.ladder import Ladder, Levels, Meter, plan_of, unreachable
from secateur.choose.plan import Plan
from secateur.choose.profile import profile_space
from secateur.cut.pretend import Pretence
from secateur.errors import SecateurError
from secateur.load.batches import Batch, first_samples
from secateur.load.mode import evaluating
from secateur.measure.closeness import Closeness
from secateur.measure.quality import Metric
from secateur.mend.batch_norm import adapt_batch_norm
from secateur.methods.ranking import check_above, costs_of, hinting, limited, settled
from secateur.progress import Track
from secateur.space import Polynomial, Space
from secateur.space.trace import Inputs

TURNED = 0.9
"""Share of the cut models that may score above the dense one before the sign of the score looks wrong."""
Score = Metric | Callable[[nn.Module], float] | None


class Prober:
    """Scores what a plan makes of a model, its batch norms estimated anew.

    Attributes:
        name: Of the score.
    """

    def __init__(
        self, model: nn.Module, space: Space, inputs: Inputs, data: Sequence[Batch], score: Score, samples: int,
        adapt_batches: int, track: Track,
    ) -> None:  # fmt: skip
        self._pretence = Pretence(model, space, inputs)
        normed = any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())
        self._batches = list(data[:adapt_batches]) if normed else []
        self._function, self.name = _function(score, model, first_samples(data, samples), track)

    def __call__(self, plan: Plan) -> float:
        """The score; higher is better.

        Raises:
            SecateurError: The score function fails, or returns no finite number.
        """
        with self._pretence.cut(plan) as pruned:
            if self._batches:
                adapt_batch_norm(pruned, self._batches)
            with evaluating(pruned):
                return _number(self._function, self.name, pruned)


def _function(
    score: Score, model: nn.Module, batches: Sequence[Batch], track: Track
) -> tuple[Callable[[nn.Module], float], str]:
    if score is None:
        closeness = Closeness(model, batches, track=track)
        return lambda pruned: -closeness(pruned), f"-{closeness.measure}"
    if isinstance(score, Metric):
        sign, function = 1 if score.higher_is_better else -1, score.function
        return lambda pruned: sign * function(pruned), score.name if sign > 0 else f"-{score.name}"
    return score, getattr(score, "__name__", type(score).__name__)


def _number(function: Callable[[nn.Module], float], name: str, model: nn.Module) -> float:
    try:
        number = float(function(model))
    except SecateurError:
        raise
    except Exception as error:  # whatever the user's own code raises
        text = " ".join(str(error).split())
        raise SecateurError(f"score {name} failed: {type(error).__name__}: {text[:500]}") from error
    if not math.isfinite(number):
        raise SecateurError(f"score {name} returned {number}, not a finite number: give one that no cut makes infinite")
    return number


@dataclass(frozen=True)
class Sensitivities:
    """What cuts of one axis alone cost in score."""

    ladders: Sequence[Ladder]
    """Those that were given, with the loss at each rung in place of the scores of units."""
    told: Mapping[str, Any]


def sensitivities(
    prober: Prober, ladders: Sequence[Ladder], scores: Mapping[str, torch.Tensor], levels: int, track: Track
) -> Sensitivities:
    """score(dense) - score(one ladder alone at a size), made monotone: a smaller size is never thought better.

    Sizes are tried from the smallest up; where one costs nothing, the larger ones do not either. Between sizes that
    were tried the loss is interpolated.

    Raises:
        SecateurError: where nearly all cut models score above the dense one.
    """
    dense = prober(Plan())
    better = tried = 0
    found: list[Ladder] = []
    table: dict[str, dict[str, float]] = {}
    for number, one in enumerate(track(ladders, "what each axis costs")):
        depth = len(one.sizes) - 1
        at = sorted({round(depth * (i + 1) / levels) for i in range(levels)} - {0})
        losses = dict.fromkeys([0, *at], 0.0)
        for level in reversed(at):
            only = np.array([level if i == number else 0 for i in range(len(ladders))], dtype=np.int64)
            value = prober(plan_of(ladders, only, scores))
            tried, better = tried + 1, better + (value > dense)
            losses[level] = dense - value
            if value >= dense:
                break
        monotone = np.maximum.accumulate([losses[level] for level in (0, *at)])
        gone = np.array(one.sizes[0]) - np.array(one.sizes)
        every = np.interp(gone, gone[[0, *at]], monotone)[1:]
        found.append(replace(one, scores=every))
        table[one.axes[0].name] = {str(one.sizes[level]): float(x) for level, x in zip((0, *at), monotone, strict=True)}
    if tried >= 3 and better >= TURNED * tried:
        raise SecateurError(
            f"the dense model scores {dense:.6g} by {prober.name}, and {better} of {tried} cut models score more: is "
            "higher better? The sign looks wrong"
        )
    worst = max(float(one.scores[-1]) for one in found) or 1.0
    found = [replace(one, scores=one.scores + 1e-9 * worst * _share(one)) for one in found]  # ties go down evenly
    told = {"score": {"name": prober.name, "dense": dense, "candidates": tried}, "sensitivity": table}
    return Sensitivities(found, told)


def _share(one: Ladder) -> Any:
    return 1 - np.array(one.sizes[1:]) / one.sizes[0]


class Reach:
    """What a budget allows of a search space, and what the space can reach at all; nothing is scored for it.

    Attributes:
        profile: See `profile_space`; latency at three points, where it is limited.

    Args:
        space: the Space.
        workload: what memory counts.
        budget: limits on analytic costs and latency.
        ladders: how far each axis may go.
        units: scores of the units.
        clock: plan -> seconds; needed where latency is limited.

    Raises:
        SecateurError: for a clock that fails, a budget that the model keeps already, or one that cannot be met: says
            the smallest reachable of each measure.
    """

    def __init__(
        self, space: Space, workload: Workload, budget: Budget, ladders: Sequence[Ladder],
        units: Mapping[str, torch.Tensor], clock: Callable[[Plan], float] | None,
    ) -> None:  # fmt: skip
        self._ladders, self._units, self._clock = ladders, units, clock
        analytic = Budget({m: limit for m, limit in budget.limits.items() if m != "latency"})
        self._timed = "latency" in budget.limits
        costs, self._allowed = _analytic(space, workload, analytic, alone=not self._timed)
        self._meter = Meter(space, ladders, costs)
        self.profile = profile_space(space, ladders, costs_of(space, workload), self._allowed)
        if self._timed:
            self.profile["latency"] = self._latency(budget)
            self.limit = float(self.profile["latency"]["limit"])
        dense = {m: row["max"] for m, row in self.profile.items() if "limit" in row}
        allowed = {m: self.profile[m]["limit"] for m in dense}
        check_above(budget, dense, allowed)
        if not all(self.profile[m]["satisfiable"] for m in dense):
            with hinting():
                raise SecateurError(unreachable(dense, {m: self.profile[m]["min"] for m in dense}, allowed))

    def _latency(self, budget: Budget) -> dict[str, Any]:
        steps = np.array([len(one.sizes) - 1 for one in self._ladders], dtype=np.int64)
        dense, middle, least = (self.seconds(levels) for levels in (steps * 0, steps // 2, steps))
        limit = budget.limits["latency"].absolute(dense)
        return {"min": least, "middle": middle, "max": dense, "limit": limit, "satisfiable": least <= limit}

    def seconds(self, levels: Levels) -> float:
        """What the clock says of these levels.

        Raises:
            SecateurError: It fails, or says no time above 0.
        """
        clock = self._clock
        if clock is None:
            raise SecateurError("latency must be measured: give a clock, a function plan -> seconds")
        plan = plan_of(self._ladders, levels, self._units)
        found = _number(lambda _: clock(plan), "clock", nn.Identity())
        if found <= 0:
            raise SecateurError(f"clock returned {found} seconds: it must be above 0")
        return found

    def settled(self, order: Levels) -> tuple[Levels, dict[str, dict[str, float]]]:
        """How far each ladder goes, and for each limit what is reached.

        With latency it is the shortest beginning of the order that keeps all limits, by bisection: each step is one
        measurement.
        """
        if not self._timed:
            return settled(order, self._meter, self._allowed)
        low, high = 0, len(order)
        at = {high: float(self.profile["latency"]["min"])}
        while low < high:
            middle = (low + high) // 2
            levels = np.bincount(order[:middle], minlength=len(self._ladders))
            costs = self._meter(levels)
            met = all(costs[measure] <= limit for measure, limit in self._allowed.items())
            if met:
                at[middle] = self.seconds(levels)
            low, high = (low, middle) if met and at[middle] <= self.limit else (middle + 1, high)
        levels = np.bincount(order[:high], minlength=len(self._ladders))
        reached = {m: {"limit": limit, "reached": self._meter(levels)[m]} for m, limit in self._allowed.items()}
        return levels, {**reached, "latency": {"limit": self.limit, "reached": at[high]}}


def _analytic(
    space: Space, workload: Workload, budget: Budget, *, alone: bool
) -> tuple[dict[str, Polynomial], dict[str, float]]:
    """What the budget limits but latency; where latency is limited too, the dense model may keep all the others."""
    if alone:
        return limited(space, workload, budget)
    costs = costs_of(space, workload)
    costs = {measure: costs[measure] for measure in budget.limits}
    dense = Meter(space, [], costs)(np.zeros(0, dtype=np.int64))
    return costs, {measure: limit.absolute(dense[measure]) for measure, limit in budget.limits.items()}
