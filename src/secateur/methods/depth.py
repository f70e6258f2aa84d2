"""Depth pruning: layers or sub-layers go one after the other, each removal measured for real.

Block influence only proposes (Men et al. 2024, "ShortGPT", arXiv:2403.03853); the greedy removal by what it does to
the outputs is that of Song et al. 2024, "SLEB" (arXiv:2402.09025); sub-layers as in He et al. 2024 (arXiv:2406.15786).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload, costs
from secateur.choose.plan import Plan
from secateur.cut.prove import discover
from secateur.errors import SecateurError, nearest
from secateur.load.batches import Batch, first_samples, size_of
from secateur.load.model import sliding_window
from secateur.measure.closeness import Closeness
from secateur.methods.base import Decision
from secateur.methods.ranking import check_above, check_limits
from secateur.methods.sensitivity import Trial, tried_removals
from secateur.progress import Track, quiet
from secateur.score.influence import influence
from secateur.space import Block, Space
from secateur.space.trace import Inputs
from secateur.walk import each, remembered, way

WHAT: Mapping[str, tuple[str, ...]] = {
    "layers": ("layers",),
    "sublayers": ("attention", "mlp"),
    "both": ("layers", "attention", "mlp"),
}


def depth(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    *,
    inputs: Inputs = None,
    what: str = "layers",
    count: int | None = None,
    proposals: int = 4,
    score_samples: int = 64,
    ignore: Sequence[str] = (),
    kv_batch: int = 1,
    kv_seq_len: int = 4096,
    stored_dtype: torch.dtype | None = None,
    track: Track = quiet,
) -> Decision:
    """Decide which blocks go, one after the other; each time several are taken out for real, and the best one goes.

    What is best is the least growth of the distance from the dense model (KL of language models and classifiers, else
    the squared error) for what is saved. At the end, blocks that fit again come back where that brings it nearer.

    Args:
        model: any module with a list of layers that follow each other.
        budget: limits on params, active_params, macs, flops and memory; all of several must hold. None with `count`.
        data: calibration batches.
        inputs: arguments of one forward pass, to trace the model with; not needed for Hugging Face models.
        what: layers, which stock loaders take; sublayers, attention and MLP by themselves, which take the modelling
            file that is saved with the model; both.
        count: how many blocks go, in place of a budget.
        proposals: how many blocks, of the least influence, are tried for each that goes; 0 = all.
        score_samples: how many samples of the data distances are measured on; whole batches.
        ignore: names or patterns of blocks that stay.
        kv_batch: sequences whose KV cache the memory budget counts.
        kv_seq_len: positions of each.
        stored_dtype: type of the weights and the cache that the memory budget counts; the model's own by default.
        track: shows progress.

    Raises:
        SecateurError: for unknown names, missing data, a model without layers to drop, a budget that cannot be met.
    """
    _check(budget, data, what, count, proposals, score_samples)
    begin = time.perf_counter()
    space = discover(model, inputs)
    blocks = _blocks(space, WHAT[what], ignore, type(model).__name__)
    workload = Workload(kv_batch, kv_seq_len, sliding_window(getattr(model, "config", None)), stored_dtype)
    goal = Goal(space, workload, budget, count)
    goal.check(blocks)
    known = influence(model, data, blocks, track=track, through=way(model, "influence", track))
    rows = first_samples(data, score_samples)
    closeness = Closeness(model, rows, track=track, runs=each(model, "distances"))
    distance = remembered(model, closeness, "distances")
    search = _Search(model, space, inputs, [block.name for block in blocks], known, distance, goal, proposals, track)
    dropped, steps = search.run()
    target = {m: {"limit": limit, "reached": goal.costs(dropped)[m]} for m, limit in goal.limits.items()}
    told: dict[str, Any] = {"what": what, "distance": closeness.measure, "influence": known, "steps": steps}
    details = {**told, "target": target, "calibration": {"samples": sum(map(size_of, data))}}
    return Decision(Plan(dropped=dropped), space, {**details, "seconds": {"search": time.perf_counter() - begin}})


def _check(
    budget: Budget, data: Sequence[Batch], what: str, count: int | None, proposals: int, score_samples: int
) -> None:
    if what not in WHAT:
        raise SecateurError(f"what: there is no {what!r}{nearest(what, WHAT)}")
    if count is not None and (budget.limits or budget.dims or budget.n_m):
        raise SecateurError(f"give either count={count} or a budget, not both: {budget}")
    if count is None:
        check_limits("depth", budget)
    for option, value, least in (("count", count, 1), ("proposals", proposals, 0), ("score_samples", score_samples, 1)):
        if value is not None and value < least:
            raise SecateurError(f"{option} must be at least {least}, not {value}")
    if not data:
        raise SecateurError("depth needs data: give batches, or 'self' for a language model that writes its own")


def _blocks(space: Space, kinds: Sequence[str], ignore: Sequence[str], model: str) -> list[Block]:
    """The blocks that may go."""
    found = [block for block in space.blocks if block.kind in kinds]
    for pattern in ignore:
        if not any(fnmatchcase(block.name, pattern) for block in found):
            raise SecateurError(f"ignore: {pattern!r} matches no block{nearest(pattern, [b.name for b in found])}")
    left = [block for block in found if not any(fnmatchcase(block.name, pattern) for pattern in ignore)]
    if not left:
        spared = f" without {list(ignore)}" if ignore else ""
        raise SecateurError(
            f"{model} has no {' or '.join(kinds)} that can be dropped{spared}; `secateur inspect` says why"
        )
    return left


@dataclass(frozen=True)
class Goal:
    """How much is to go: a budget, or a number of blocks."""

    space: Space
    workload: Workload
    budget: Budget
    count: int | None

    @cached_property
    def limits(self) -> dict[str, float]:
        """Measure -> the most that it may be."""
        dense = costs(self.space, Plan(), self.workload)
        return {m: limit.absolute(dense.of(m)) for m, limit in self.budget.limits.items()}

    def costs(self, dropped: Sequence[str]) -> dict[str, float]:
        """What is limited, without these blocks."""
        found = costs(self.space, Plan(dropped=tuple(dropped)), self.workload)
        return {m: found.of(m) for m in self.budget.limits}

    def left(self, dropped: Sequence[str]) -> float:
        """How far the goal is, at most 0 where it is reached: the share by which a limit is exceeded, or blocks."""
        if self.count is not None:
            return self.count - len(dropped)
        return max(cost / self.limits[m] - 1 for m, cost in self.costs(dropped).items())

    def check(self, blocks: Sequence[Block]) -> None:
        """Raise SecateurError where the dense model is there already, or not even dropping nearly all would do."""
        stacks = {block.stack: [b for b in blocks if b.stack == block.stack and b.kind == "layers"] for block in blocks}
        most = [b.name for b in blocks if b.kind != "layers"]
        for stack, layers in stacks.items():
            whole = len(layers) == self.space.stacks.get(stack)  # one must stay: the cheapest
            cheapest = min(layers, key=lambda b: (len(b.parameters), b.name)) if layers and whole else None
            most += [b.name for b in layers if b is not cheapest]
        if self.count is not None:
            if self.count > len(most):
                raise SecateurError(f"count={self.count}: at most {len(most)} blocks can be dropped")
            return
        check_above(self.budget, self.costs(()), self.limits)
        if self.left(most) > 0:
            raise SecateurError(self.unreachable(most))

    def unreachable(self, dropped: Sequence[str]) -> str:
        """That the budget cannot be met, and what is reached without these blocks."""
        dense, least = self.costs(()), self.costs(dropped)
        parts = [
            f"{m}={limit:,.0f}: the smallest reachable is {least[m]:,.0f} ({100 * least[m] / dense[m]:.1f}% of the "
            "dense)"
            for m, limit in self.limits.items()
        ]
        return f"the budget cannot be met by dropping blocks ({'; '.join(parts)}); allow more, or cut widths too"


@dataclass(frozen=True)
class _Search:
    """Greedy removal, and what fits again comes back."""

    model: nn.Module
    space: Space
    inputs: Inputs
    order: Sequence[str]
    influence: Mapping[str, float]
    distance: Callable[[nn.Module], float]
    goal: Goal
    proposals: int
    track: Track

    def run(self) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
        """What goes, in the model's order, and the steps that led there."""
        gone: tuple[str, ...] = ()
        now, steps = 0.0, []
        while self.goal.left(gone) > 0:
            inside = tuple(f"{block}." for block in gone) or ("\0",)
            left = [name for name in self.order if name not in gone and not name.startswith(inside)]
            left.sort(key=lambda name: (self.influence[name], name))
            shown = self.track(left, f"dropping block {len(gone) + 1}")
            trials = tried_removals(
                self.model, self.space, self.order, gone, shown, self.distance, self.proposals, self.inputs
            )
            trials = [trial for trial in trials if self.goal.left(trial[2]) < self.goal.left(gone)]
            if not trials:
                raise SecateurError(self._stuck(gone))
            best = self._best(trials, gone, now)
            steps.append({"dropped": left[best[1]], "distance": best[0], "tried": len(trials)})
            now, gone = best[0], best[2]
        return self._back(gone, now, steps)

    def _best(self, trials: Sequence[Trial], gone: Sequence[str], now: float) -> Trial:
        """The one that costs least for what it saves; to save more than is asked for is worth nothing."""
        before = self.goal.left(gone)
        return min(trials, key=lambda t: ((t[0] - now) / (before - max(0.0, self.goal.left(t[2]))), t))

    def _back(
        self, gone: tuple[str, ...], now: float, steps: list[dict[str, Any]]
    ) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
        """Blocks that are gone in vain come back, the best first."""
        while True:
            fit = [tuple(b for b in gone if b != name) for name in gone]
            fit = [names for names in fit if names and self.goal.left(names) <= 0]
            trials = []
            for rank, names in enumerate(fit):
                rest, last = names[:-1], names[-1]
                trials += [
                    (distance, rank, found)
                    for distance, _, found in tried_removals(
                        self.model, self.space, self.order, rest, [last], self.distance, 1, self.inputs
                    )
                ]
            if not trials or min(trials)[0] > now:
                return gone, steps
            best = min(trials)
            steps.append(
                {"restored": next(b for b in gone if b not in best[2]), "distance": best[0], "tried": len(trials)}
            )
            now, gone = best[0], best[2]

    def _stuck(self, gone: Sequence[str]) -> str:
        if self.goal.count is not None:
            return f"count={self.goal.count}: only {len(gone)} blocks of this model can be dropped"
        return self.goal.unreachable(gone)
