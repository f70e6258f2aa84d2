"""What `search` and `obs` share: from a survey to a plan."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from secateur.choose.budget import Budget
from secateur.choose.cost import Workload
from secateur.choose.plan import Plan
from secateur.choose.refine import fill, refine
from secateur.choose.select import check_divisors, choose_axes, least_units
from secateur.choose.slots import step_of
from secateur.choose.table import Choice, Level, Slot, Table, Term, cost_terms, solve
from secateur.cut.names import new_name, renumbered
from secateur.cut.prove import discover
from secateur.errors import SecateurError
from secateur.load.batches import Batch, first_samples
from secateur.load.model import sliding_window
from secateur.measure.clock import Clock
from secateur.measure.closeness import Closeness
from secateur.measure.latency import LatencyTable
from secateur.measure.quality import Metric
from secateur.methods.base import Decision
from secateur.methods.levels import config_allows, measured, sizes_of_choice, slots_for, table_of
from secateur.methods.survey import Survey, load_survey
from secateur.methods.surveying import survey as make_survey
from secateur.methods.timing import latency_terms, timed, timing_inputs
from secateur.methods.trials import Trials
from secateur.progress import Track
from secateur.space import Axis, Space
from secateur.space.trace import Inputs

MEASURES = ("params", "active_params", "macs", "flops", "memory", "latency")
WITHOUT = ("hidden",)
"""Kinds that go only when asked for: units that a norm counts are zeroed in trials, and still counted by it."""
FRONT = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the first limited measure at which the front is shown."""
DAMPING = 1e-3
ROUNDS = 3
"""Times that a plan is timed for real, and made anew with a tighter limit where it is too slow."""
SLACK = 0.02
"""Share by which a measured time may exceed the limit: the noise of a quiet machine."""


@dataclass(frozen=True)
class Asked:
    """Options of a search; see `methods.search.search`."""

    inputs: Inputs
    uniform: bool | None
    only: Sequence[str]
    ignore: Sequence[str]
    keep_at_least: float
    limits: Mapping[str, float] | None
    round_to: int | Mapping[str, int] | None
    levels: int
    drop: bool
    probes: int
    trials: int
    score: Metric | None
    score_samples: int
    adapt_samples: int
    gradients: bool
    survey: Path | None
    damping: float | None
    latency_table: Path | None
    latency_batch: int
    latency_seq_len: int | None
    seed: int
    workload: Workload


@dataclass
class Ground:
    """What all steps stand on."""

    model: nn.Module
    data: Sequence[Batch]
    asked: Asked
    space: Space
    survey: Survey
    uniform: bool
    round_to: Mapping[str, int]
    workload: Workload
    clock: Clock | None
    track: Track
    grids: dict[str, list[int]] = field(default_factory=dict)
    """Lengths of axes at which parts are timed."""


def decide_levels(
    model: nn.Module,
    budget: Budget,
    data: Sequence[Batch],
    asked: Asked,
    track: Track,
    reference: nn.Module | None = None,
) -> Decision:
    """Make a table of levels, solve it, refine the choice, and use up what the budget has left.

    What is measured is the distance to `reference`, the model itself by default.
    """
    check(budget, data, asked)
    begin = time.perf_counter()
    ground, axes, least = grounded(model, budget, data, asked, track)
    surveyed = time.perf_counter()
    table = level_table(ground, axes, least)
    allowed = absolute(table, budget)
    solve(table, allowed)  # what cannot be met is said before anything is measured
    shown: dict[str, Any] = {"uniform": ground.uniform, "slots": len(table.slots)}
    decided = {name for slot in table.slots for name in slot.axes}
    whole = [axis.name for axis in axes if axis.name in ground.survey.orders and axis.name not in decided]
    if whole:  # the layers cannot be smaller there in one way that a stock config has
        shown["whole"] = whole
    trial, rows = None, first_samples(data, asked.score_samples)
    if rows and (asked.probes or asked.trials):
        closeness, score = Closeness(reference or model, rows, track=track), asked.score
        own, sign = (None, 1.0) if score is None else (score.function, -1.0 if score.higher_is_better else 1.0)
        trial = Trials(ground.survey, closeness, adapt=first_samples(data, asked.adapt_samples), score=own, sign=sign)
        table, counts = measured(table, trial, probes=asked.probes, track=track)
        shown |= {"measure": closeness.measure if score is None else score.name, **counts}
    tabled = time.perf_counter()
    first = solve(table, allowed)
    choice, history = _refined(table, first.choice, allowed, trial, asked, track)
    shown |= history | {"optimal": first.optimal, "gap": first.gap, "front": _front(table, allowed)}
    finer, last, plan, latency = _fitting(ground, table, choice, allowed, shown)
    target = {m: {"limit": limit, "reached": finer.cost(m, last)} for m, limit in allowed.items()}
    seconds = {"survey": surveyed - begin, "measuring": tabled - surveyed, "refining": time.perf_counter() - tabled}
    told: dict[str, Any] = {"levels": shown, "target": target, "seconds": seconds, **latency}
    return _decision(ground, plan, sizes_of_choice(finer, last)[0], told)


def _decision(ground: Ground, plan: Plan, sizes: Mapping[str, int], told: dict[str, Any]) -> Decision:
    found = ground.survey
    told["calibration"] = {"samples": found.samples, "gradients": found.gradients}
    if found.left:
        told["left"] = dict(found.left)
    if found.thin:
        told["fewer_rows_than_columns"] = list(found.thin)
    if ground.data:
        return Decision(plan, ground.space, told)
    moved = renumbered(ground.space, plan)
    repaired = found.repaired(sizes, plan)
    told["repaired_by_survey"] = len(repaired)
    weights = {str(new_name(name, moved)): tensor for name, tensor in repaired.items()}
    return Decision(plan, ground.space, told, weights=weights)


def grounded(
    model: nn.Module, budget: Budget, data: Sequence[Batch], asked: Asked, track: Track
) -> tuple["Ground", list[Axis], dict[str, int]]:
    """Trace and survey the model, and start a clock where latency is limited."""
    space = discover(model, asked.inputs)
    modules = [name for name, _ in model.named_modules()]
    axes = may_go(space, modules, asked.only, asked.ignore)
    check_divisors(asked.round_to, [axis.kind for axis in axes])
    least = least_units(space, modules, axes, asked.keep_at_least, asked.limits or {})
    uniform = asked.uniform if asked.uniform is not None else hasattr(type(model), "from_pretrained")
    workload = replace(asked.workload, window=sliding_window(getattr(model, "config", None)))
    rows = first_samples(data, asked.score_samples)
    if asked.survey is not None:
        found = load_survey(asked.survey, model, space)
    else:
        found = make_survey(
            model, space, axes, data, rows=rows, inputs=asked.inputs, damping=asked.damping or DAMPING,
            gradients=asked.gradients, keep_moments=bool(asked.drop or asked.probes or asked.trials), seed=asked.seed,
            track=track,
        )  # fmt: skip
    clock = None
    if "latency" in budget.limits:
        known = None if asked.latency_table is None else LatencyTable.load(asked.latency_table)
        own = timing_inputs(model, data, asked.inputs, batch=asked.latency_batch, length=asked.latency_seq_len)
        clock = Clock(model, space, own, known, traced=asked.inputs, track=track)
    rounded = _rounded(model, space, axes, asked.round_to)
    return Ground(model, data, asked, space, found, uniform, rounded, workload, clock, track), axes, least


def _rounded(
    model: nn.Module, space: Space, axes: Sequence[Axis], round_to: int | Mapping[str, int] | None
) -> dict[str, int]:
    """Of what sizes are multiples, by kind. Grouped products of experts want rows of 16 bytes."""
    kinds = dict.fromkeys(axis.kind for axis in axes)
    found = {kind: round_to if isinstance(round_to, int) else (round_to or {}).get(kind, 1) for kind in kinds}
    if "expert_ffn" in found and getattr(getattr(model, "config", None), "_experts_implementation", "") == "grouped_mm":
        stacked = {router.parameter for router in space.routers}
        least = min((p.dtype.itemsize for n, p in space.parameters.items() if n in stacked), default=4)
        found["expert_ffn"] = lcm(found["expert_ffn"], 16 // least)
    return found


def level_table(ground: Ground, axes: Sequence[Axis], least: Mapping[str, int]) -> Table:
    """Slots of some axes, with estimated losses."""
    asked = ground.asked
    slots = slots_for(
        ground.model, ground.survey, axes, least, levels=asked.levels, round_to=ground.round_to,
        uniform=ground.uniform, drop=asked.drop,
    )  # fmt: skip
    return _timed(ground, table_of(ground.survey, slots, ground.workload))


def _timed(ground: Ground, table: Table) -> Table:
    """With latency among the costs, where a budget limits it."""
    if ground.clock is None:
        return table
    terms = latency_terms(ground.clock, ground.space, table.slots, ground.grids, track=ground.track)
    return Table(table.slots, table.loss, {**table.costs, "latency": terms})


def _fitting(
    ground: Ground, table: Table, choice: Choice, allowed: Mapping[str, float], shown: dict[str, Any]
) -> tuple[Table, Choice, Plan, dict[str, Any]]:
    """Fill the budget by single units; where it limits latency, time the result and tighten the limit if need be.

    What is shown of the choice is set right where a tighter limit makes another.
    """
    limits = dict(allowed)
    tried: list[dict[str, float]] = []
    for attempt in range(ROUNDS):
        finer, last = _by_units(ground, table, choice, limits)
        sizes, dropped = sizes_of_choice(finer, last)
        plan = ground.survey.plan(sizes, whole_layers(ground.space, dropped))
        if ground.clock is None:
            return finer, last, plan, {}
        found = timed(ground.clock, plan, ground.asked.inputs, track=ground.track)
        tried.append({"predicted": finer.cost("latency", last), **found})
        if found["measured"] <= allowed["latency"] * (1 + SLACK) or attempt + 1 == ROUNDS:
            break
        limits["latency"] *= allowed["latency"] / found["measured"] * 0.99
        again = solve(table, limits)
        choice = again.choice
        shown |= {"expected": table.lost(choice), "optimal": again.optimal, "gap": again.gap}
        shown.pop("measured", None)  # it was of the first choice
    return finer, last, plan, {"latency": {**tried[-1], "limit": allowed["latency"], "tried": tried}}


def check(budget: Budget, data: Sequence[Batch], asked: Asked) -> None:
    """Raise SecateurError for options that contradict each other."""
    unserved = [m for m in budget.limits if m not in MEASURES] + (["n:m"] if budget.n_m else [])
    if budget.dims:
        raise SecateurError("search takes a budget, such as params=70%, and no exact dims")
    if unserved or not budget.limits:
        what = f"a budget of {unserved[0]} is not served by search" if unserved else "no budget is given"
        raise SecateurError(f"{what}: it takes {', '.join(MEASURES)}")
    if not data and asked.survey is None:
        raise SecateurError("search needs data, or a survey that was made with some: give batches, or survey=FOLDER")
    if asked.survey is not None and asked.damping is not None:
        raise SecateurError("damping is fixed in a survey when it is made: leave it out, or make another survey")
    if asked.survey is not None and not asked.gradients:
        raise SecateurError("gradients are taken or not when a survey is made: leave the option out, or make another")
    if "latency" not in budget.limits and (asked.latency_table is not None or asked.latency_seq_len is not None):
        raise SecateurError("latency_table and latency_seq_len go with a budget of latency, such as latency=60%")
    least = {"score_samples": 1, "adapt_samples": 1, "probes": 0, "trials": 0, "latency_batch": 1}
    for name, lowest in least.items():
        if getattr(asked, name) < lowest:
            raise SecateurError(f"{name} must be at least {lowest}, not {getattr(asked, name)}")


def may_go(space: Space, modules: Sequence[str], only: Sequence[str], ignore: Sequence[str]) -> list[Axis]:
    """The axes that may be cut: `choose_axes`, without the hidden size unless `only` names something."""
    spared = [kind for kind in WITHOUT if not only and space.of_kind(kind) and kind not in ignore]
    return choose_axes(space, modules, only, [*ignore, *spared])


def absolute(table: Table, budget: Budget) -> dict[str, float]:
    """Limits in the units of their measures.

    Raises:
        SecateurError: where the model keeps all of them already, or has none of what is limited.
    """
    dense = {m: table.cost(m, table.whole) for m in budget.limits}
    for measure, cost in dense.items():
        if not cost:
            raise SecateurError(f"the budget limits {measure}, and the model has none that are counted")
    allowed = {m: limit.absolute(dense[m]) for m, limit in budget.limits.items()}
    if all(dense[m] <= limit for m, limit in allowed.items()):
        have = ", ".join(f"{dense[m]:,.0f} {m}" for m in allowed)
        raise SecateurError(f"the model keeps the budget {budget} already ({have}): nothing would be cut")
    return allowed


def _refined(
    table: Table, start: Choice, limits: Mapping[str, float], trial: Trials | None, asked: Asked, track: Track
) -> tuple[Choice, dict[str, Any]]:
    """Switch levels under the true loss, where that can be measured."""
    told: dict[str, Any] = {"expected": table.lost(start)}
    if trial is None or not asked.trials:
        return start, told
    batches = len(trial.closeness.batches)
    few = list(range(max(1, batches // 4)))

    def loss(choice: Choice, which: Sequence[int] | None) -> float:
        return trial.loss(*sizes_of_choice(table, choice), which)

    found = refine(
        table, start, limits, lambda c: loss(c, few), lambda c: loss(c, None), trials=asked.trials, seed=asked.seed,
        track=track,
    )  # fmt: skip
    history = [[n, value] for n, value in found.history]
    return found.choice, told | {"measured": found.loss, "before_refinement": history[0][1], "history": history}


def _front(table: Table, limits: Mapping[str, float]) -> list[dict[str, float]]:
    """The least expected loss at several budgets of the first limited measure."""
    measure = next(iter(limits))
    whole = table.cost(measure, table.whole)
    found = []
    for share in FRONT:
        try:
            choice = solve(table, {measure: share * whole}, seconds=5.0, gap=1e-3).choice
        except SecateurError:
            break
        found.append({"share": share, measure: table.cost(measure, choice), "expected": table.lost(choice)})
    return found


def _by_units(ground: Ground, table: Table, choice: Choice, limits: Mapping[str, float]) -> tuple[Table, Choice]:
    """Between the chosen level of each slot and the one above it lie single units: use up what the budget has left."""
    allows = config_allows(ground.model, ground.space) if ground.uniform else None
    slots, losses = [], []
    for i, (slot, level) in enumerate(zip(table.slots, choice, strict=True)):
        now, between = slot.levels[level], _between(ground, slot, level, allows)
        gain = max(0.0, table.lost(choice) - table.lost(_at(choice, i, level - 1))) if between else 0.0
        slots.append(Slot(slot.name, (*between, now), slot.axes))
        losses.append(Term((i,), np.linspace(0, gain, len(between) + 1)))
    start = tuple(len(slot.levels) - 1 for slot in slots)
    finer = _timed(ground, Table(tuple(slots), tuple(losses), cost_terms(ground.space, ground.workload, slots)))
    filled = fill(finer, start, limits)
    return finer, filled if filled is not None else start


def _at(choice: Choice, slot: int, level: int) -> Choice:
    return (*choice[:slot], level, *choice[slot + 1 :])


def _between(ground: Ground, slot: Slot, level: int, allows: Callable[[Mapping[str, int]], bool] | None) -> list[Level]:
    """The next larger level of a slot and what lies between, unit by unit; nothing where axes of two kinds are cut."""
    now = slot.levels[level]
    kinds = {ground.space.axis(name).kind for name in slot.axes}
    if not level or now.dropped or len(kinds) != 1 or len(set(now.sizes.values())) != 1:
        return []
    above = slot.levels[level - 1]
    if set(above.sizes) not in (set(now.sizes), set()) or len(set(above.sizes.values())) > 1:
        return []
    axis = ground.space.axis(next(iter(now.sizes)))
    step, most = step_of(axis, ground.round_to), above.sizes.get(axis.name, axis.per_group)
    sizes = [n for n in range(most - 1, now.sizes[axis.name], -1) if n % step == 0]
    stock = allows is not None and allows({axis.kind: now.sizes[axis.name] * axis.groups})
    if stock and allows is not None:  # so it must stay
        sizes = [n for n in sizes if allows({axis.kind: n * axis.groups})]
    return [above, *(Level(dict.fromkeys(now.sizes, n)) for n in sizes)]


def whole_layers(space: Space, dropped: Sequence[str]) -> list[str]:
    """A layer that loses both of its sub-layers goes whole, for what is left of it does nothing; one always stays."""
    gone = set(dropped)
    for layer in space.layers():
        inside = [b.name for b in space.blocks if b.kind != "layers" and b.name.startswith(f"{layer.name}.")]
        last = sum(not out for out in space.gone_layers(list(gone))[layer.stack]) == 1
        if len(inside) > 1 and gone.issuperset(inside) and not last:
            gone = gone.difference(inside) | {layer.name}
    return [block.name for block in space.blocks if block.name in gone]
