"""From a survey to a table: what each level of each slot would lose, estimated in closed form or measured."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import nn

from secateur.choose.cost import Workload
from secateur.choose.slots import make_slots
from secateur.choose.table import Choice, Slot, Table, Term, Values, cost_terms
from secateur.cut.uniform import Uniform
from secateur.errors import SecateurError
from secateur.methods.survey import Survey
from secateur.methods.trials import Trials, prefix_of
from secateur.progress import Track, quiet
from secateur.space import Axis, Space


def config_allows(model: nn.Module, space: Space) -> Callable[[Mapping[str, int]], bool] | None:
    """Whether a stock config can have sizes by kind; None for a model without a config."""
    return Uniform(model, space).describes if hasattr(getattr(model, "config", None), "to_dict") else None


def slots_for(
    model: nn.Module,
    survey: Survey,
    axes: Sequence[Axis],
    least: Mapping[str, int],
    *,
    levels: int,
    round_to: int | Mapping[str, int] | None,
    uniform: bool,
    drop: bool,
) -> list[Slot]:
    """The slots of the axes that a survey knows; with `uniform`, sizes that a stock config can have, if any can."""
    known = [axis for axis in axes if axis.name in survey.orders]
    if not known:
        told = "; ".join(f"{name}: {why}" for name, why in list(survey.left.items())[:3])
        raise SecateurError(f"no axis that may be cut was surveyed ({told or 'the survey is of other axes'})")
    allowed = config_allows(model, survey.space) if uniform else None
    args = {"levels": levels, "round_to": round_to, "uniform": uniform, "drop": drop}
    slots = make_slots(survey.space, known, least, allowed=allowed, **args)  # type: ignore[arg-type]
    if allowed is not None and not any(slot.axes for slot in slots):
        slots = make_slots(survey.space, known, least, **args)  # type: ignore[arg-type]  # no config has any smaller size
    return slots


def table_of(survey: Survey, slots: Sequence[Slot], workload: Workload) -> Table:
    """Costs, and losses as the survey estimates them."""
    droppers = {name: i for i, slot in enumerate(slots) if not slot.axes for x in slot.levels for name in x.dropped}
    layers = {b.name for b in survey.space.layers()}
    loss: list[Term] = []
    for i, slot in enumerate(slots):
        own = np.zeros(len(slot.levels))
        apart: dict[int, Values] = {}  # what a layer's axes lose counts only while the layer is there
        for level, state in enumerate(slot.levels):
            if state.dropped:
                own[level] += _gone(survey, state.dropped)
            for block, sizes in _by_block(survey, state.sizes).items():
                lost = survey.axis_loss(sizes)
                if block in droppers and block in layers:
                    apart.setdefault(droppers[block], np.zeros((len(slot.levels), 2)))[level, 0] += lost
                else:
                    own[level] += lost
        loss.append(Term((i,), own))
        loss += [Term((i, other), values) for other, values in apart.items()]
    return Table(tuple(slots), tuple(loss), cost_terms(survey.space, workload, slots))


def _by_block(survey: Survey, sizes: Mapping[str, int]) -> dict[str | None, dict[str, int]]:
    found: dict[str | None, dict[str, int]] = {}
    for name, size in sizes.items():
        found.setdefault(survey.space.axis(name).block, {})[name] = size
    return found


def _gone(survey: Survey, blocks: Sequence[str]) -> float:
    """What it costs that nothing that a survey knows of is left in some blocks."""
    inside = {name for block in survey.space.blocks if block.name in blocks for name in block.parameters}
    axes = [a for a in survey.orders if all(p.parameter in inside for p in survey.space.axis(a).slices)]
    return survey.gone_loss(axes)


def sizes_of_choice(table: Table, choice: Choice) -> tuple[dict[str, int], list[str]]:
    """Axis -> units that stay in each group, and the blocks that go."""
    levels = [slot.levels[level] for slot, level in zip(table.slots, choice, strict=True)]
    sizes = {name: size for level in levels for name, size in level.sizes.items()}
    return sizes, [name for level in levels for name in level.dropped]


def measured(table: Table, trials: Trials, *, probes: int, track: Track = quiet) -> tuple[Table, dict[str, int]]:
    """Correct the losses of a table by measuring some levels of each slot alone, with all else whole.

    Between the levels that are measured, the estimate is scaled by the ratio there. The estimates know the shape well
    and the scale less: positions of a sequence count as independent.

    Args:
        table: with estimated losses.
        trials: what measures.
        probes: levels of each slot; 0 = none.
        track: shows progress.

    Returns:
        The corrected table, and what was measured, for the report.
    """
    if not probes:
        return table, {"measured_levels": 0, "prefix_reused": False}
    prefix = prefix_of(trials)
    floor = trials.loss({})
    order = range(len(table.slots))
    if prefix is not None:
        first = {i: _first_block(table.slots[i], trials, prefix.before) for i in order}
        order = sorted(order, key=lambda i: (first[i], i))  # type: ignore[assignment]
    factors = {}
    count = 0
    for i in track(list(order), "what single cuts cost"):
        slot = table.slots[i]
        if prefix is not None:
            prefix.advance(first[i])
        estimates = np.array([table.lost(_alone(table, i, level)) for level in range(len(slot.levels))])
        ratios = {0: 1.0}
        for level in _probed(slot, probes):
            true = trials.loss(slot.levels[level].sizes, slot.levels[level].dropped, prefix=prefix) - floor
            count += 1
            ratios[level] = max(true, 0.0) / max(float(estimates[level]), 1e-12)
        factors[i] = _factors(slot, estimates, ratios)
    terms = [_scaled(term, factors[term.slots[0]]) for term in table.loss]
    told = {"measured_levels": count, "prefix_reused": prefix is not None}
    return Table(table.slots, tuple(terms), table.costs), told


def _alone(table: Table, slot: int, level: int) -> Choice:
    """One slot at a level, all others whole."""
    return tuple(level if i == slot else 0 for i in range(len(table.slots)))


def _scaled(term: Term, factors: Values) -> Term:
    """A term times a factor for each level of its first slot."""
    return Term(term.slots, term.values * factors.reshape(-1, *(1,) * (term.values.ndim - 1)))


def _first_block(slot: Slot, trials: Trials, before: Callable[[str], int]) -> int:
    """How many blocks lie before everything that a slot's levels change."""
    names = {trials.survey.consumers[n].weight.name for a in slot.axes for n in trials.survey.by_axis.get(a, ())}
    names |= {block for level in slot.levels for block in level.dropped}
    return min((before(name) for name in names), default=0)


def _probed(slot: Slot, probes: int) -> list[int]:
    """Levels to measure: the dropped block, and some others evenly spread, the last one among them."""
    cut = [i for i in range(1, len(slot.levels)) if not slot.levels[i].dropped]
    gone = [i for i in range(1, len(slot.levels)) if slot.levels[i].dropped]
    if len(cut) <= probes:
        return [*cut, *gone]
    picked = {cut[round((k + 1) * len(cut) / probes) - 1] for k in range(probes)}
    return [*sorted(picked), *gone]


def _factors(slot: Slot, estimates: Values, ratios: Mapping[int, float]) -> Values:
    """Measured / estimated for every level, interpolated along the estimate where nothing was measured."""
    cut = [i for i in range(len(slot.levels)) if not slot.levels[i].dropped]
    known = sorted((float(estimates[i]), ratios[i]) for i in ratios if i in cut and i)
    new = np.ones(len(slot.levels))
    if known:
        at, ratio = (np.array(x) for x in zip(*known, strict=True))
        new[cut] = np.interp(estimates[cut], at, ratio)
    for i in ratios:
        if slot.levels[i].dropped:
            new[i] = ratios[i]
    return new
