"""Search with a residual stream that may get narrower too: in a basis of its own, before all else is searched.

The width that stays is picked by the same program, from what each width is expected to cost (`methods.rotation`); then
the stream is cut, and everything else is searched in the narrower model, still measured against the dense one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from torch import nn

from secateur.choose.budget import Budget, Limit
from secateur.choose.plan import Plan
from secateur.choose.select import check_divisors
from secateur.choose.table import Level, Slot, Table, Term, cost_terms, solve
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.methods.base import Decision
from secateur.methods.rotation import after_cut, basis, expected_loss, first_units, measure_streams, rotated
from secateur.methods.searching import Asked, absolute, check, decide_levels, grounded, level_table
from secateur.methods.streams import KIND, stream_axis
from secateur.progress import Track

WIDTHS = (1.0, 0.92, 0.84, 0.75, 0.67)
"""Shares of the hidden size that are looked at."""


def decide_with_width(model: nn.Module, budget: Budget, data: Sequence[Batch], asked: Asked, track: Track) -> Decision:
    """Pick a width, turn and cut the stream, and search the rest.

    Raises:
        SecateurError: for a stream that cannot be turned (says why), options that keep it whole or leave nothing beside
            it, and what `search` raises.
    """
    check(budget, data, asked)
    asked, step = _parted(asked)
    if "latency" in budget.limits or not data or asked.survey is not None:
        raise SecateurError("rotate goes with data, without a survey, and with limits other than latency")
    ground, axes, least = grounded(model, budget, data, asked, track)
    space, axis = ground.space, stream_axis(ground.space)
    table = level_table(ground, [a for a in axes if a.name != axis.name], least)
    allowed = absolute(table, budget)
    widths = list(dict.fromkeys(max(step, round(share * axis.size / step) * step) for share in WIDTHS[1:]))
    widths = [axis.size, *(k for k in widths if k < axis.size)]
    streams = measure_streams(model, space, data, seed=asked.seed, track=track)
    losses = [0.0, *(expected_loss(streams, k) for k in track(widths[1:], "what a narrower stream costs"))]
    wide = Slot(axis.name, tuple(Level({axis.name: k} if k < axis.size else {}) for k in widths), (axis.name,))
    slots = (*table.slots, wide)
    whole = Table(
        slots,
        (*table.loss, Term((len(slots) - 1,), np.array(losses))),
        cost_terms(space, ground.workload, slots),
    )
    k = widths[solve(whole, allowed).choice[-1]]
    told = {"hidden": {"dense": axis.size, "pruned": k, "expected": dict(zip(map(str, widths), losses, strict=True))}}
    rest = replace(asked, ignore=[*asked.ignore, axis.kind])
    if k == axis.size:
        found = decide_levels(model, budget, data, rest, track)
        return replace(found, details={**found.details, **told})
    base, units, turned = rotated(model, space, streams, k), first_units(space, k), basis(streams, k)
    narrow = apply(base, Plan(units), space=space)
    after_cut(base, narrow, space, Plan(units), streams, turned)
    inner = Budget({m: Limit(limit) for m, limit in allowed.items()})
    kept: Mapping[str, Any] = units
    details: Mapping[str, Any] = {"seconds": {}}
    dropped: tuple[str, ...] = ()
    if not all(whole.cost(m, (*(0 for _ in table.slots), widths.index(k))) <= limit for m, limit in allowed.items()):
        found = decide_levels(narrow, inner, data, rest, track, reference=model)
        kept, dropped, details = {**units, **found.plan.kept}, found.plan.dropped, found.details
    plan = Plan(kept, dropped)
    pruned = apply(base, plan, space=space)
    after_cut(base, pruned, space, plan, streams, turned)
    weights = {name: p.detach() for name, p in pruned.named_parameters()}
    return Decision(plan, space, {**details, **told}, weights=weights, base=base)


def _parted(asked: Asked) -> tuple[Asked, int]:
    """What is asked of all but the hidden size, and of what that is a multiple.

    Raises:
        SecateurError: where the hidden size is to stay whole, or is all that may be cut.
    """
    spared = next((pattern for pattern in asked.ignore if fnmatchcase(KIND, pattern)), None)
    if spared is not None:
        raise SecateurError(f"rotate cuts the {KIND} size, and ignore={spared!r} keeps it: leave one of them out")
    others = [pattern for pattern in asked.only if pattern != KIND]
    if asked.only and not others:
        raise SecateurError(
            f"rotate cuts the {KIND} size and searches all else, and only={KIND!r} leaves nothing else: name more in "
            "only, such as ffn, or leave it out"
        )
    if asked.round_to is None or isinstance(asked.round_to, int):
        return replace(asked, only=others), 8 if asked.round_to is None else asked.round_to
    step = asked.round_to.get(KIND, 8)
    check_divisors({KIND: step}, [KIND])
    return replace(asked, only=others, round_to={k: n for k, n in asked.round_to.items() if k != KIND}), step
