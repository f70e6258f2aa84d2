"""Latency as a cost that a search can limit: measured times of parts, as terms over slots."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.choose.table import Level, Slot, Term, Values
from secateur.cut import apply
from secateur.errors import SecateurError
from secateur.load.batches import Batch
from secateur.measure.clock import Clock
from secateur.measure.latency import time_models
from secateur.measure.leaves import Leaf
from secateur.progress import Track, quiet
from secateur.space import Space
from secateur.space.trace import Inputs

GRID = 4
"""Lengths of an axis at which a part is timed; between them, times are interpolated."""


def timing_inputs(
    model: nn.Module, data: Sequence[Batch], inputs: Inputs, *, batch: int = 1, length: int | None = None
) -> Inputs:
    """What is timed: token rows of a Hugging Face model, else the inputs that the model was traced with.

    Args:
        model: any module.
        data: calibration batches.
        inputs: arguments of one forward pass, for what is no Hugging Face model.
        batch: token rows.
        length: tokens in each; by default those of the data, or 128 where it is no tensor of them.

    Raises:
        SecateurError: where there are none.
    """
    if not hasattr(getattr(model, "config", None), "to_dict"):
        if inputs is None:
            raise SecateurError("a latency budget needs inputs: what one forward pass takes, with the batch of use")
        return inputs
    if length is None:
        first = data[0] if len(data) else None
        length = first.shape[1] if isinstance(first, torch.Tensor) and first.dim() == 2 else 128
    return {"input_ids": torch.zeros(batch, length, dtype=torch.int64, device=next(model.parameters()).device)}


def timed(clock: Clock, plan: Plan, inputs: Inputs, *, track: Track = quiet) -> dict[str, float]:
    """Seconds of the cut model (measured) and of the dense one, taken in turns.

    Args:
        clock: of the dense model.
        plan: what is cut.
        inputs: that the Space was found with.
        track: shows progress.
    """
    pruned = apply(clock.model, plan, space=clock.space, inputs=inputs)
    dense, cut = time_models([clock.model, pruned], clock.inputs, timer=clock.timer, track=track)
    return {"measured": cut.median, "dense": dense.median}


def latency_terms(
    clock: Clock, space: Space, slots: Sequence[Slot], grids: dict[str, list[int]], *, track: Track = quiet
) -> tuple[Term, ...]:
    """Seconds of one forward pass.

    Args:
        clock: of the dense model.
        space: its Space.
        slots: what is decided on.
        grids: lengths of axes at which parts are timed; those that are missing are made of the levels, and kept there.
        track: shows progress.
    """
    slot_of = {axis: i for i, slot in enumerate(slots) for axis in slot.axes}
    droppers = {b: i for i, slot in enumerate(slots) for level in slot.levels for b in level.dropped}
    inside = {block.name: [n for n in droppers if f"{block.name}.".startswith(f"{n}.")] for block in space.blocks}
    for axis, i in slot_of.items():
        if axis not in grids:
            grids[axis] = _grid(space.axis(axis).per_group, slots[i], axis)
    clock.measure(
        (leaf, dict(zip(leaf.axes, sizes, strict=True)))
        for leaf in track(clock.leaves, "timing parts")
        for sizes in product(*(grids.get(name, [clock.whole[name]]) for name in leaf.axes))
    )
    terms: list[Term] = []
    for leaf in clock.leaves:
        own = [name for name in leaf.axes if name in slot_of]
        terms.append(
            _term(slots, own, inside.get(leaf.block or "", []), slot_of, droppers, _Times(clock, leaf, own, grids))
        )
    for block in (None, *(block.name for block in space.blocks)):
        fixed, parts = clock.rest_parts(block)
        gone = inside.get(block or "", [])
        terms.append(_term(slots, [], gone, slot_of, droppers, lambda _, fixed=fixed: fixed))  # type: ignore[misc]
        for axes, seconds in parts:
            terms.append(_term(slots, [n for n in axes if n in slot_of], gone, slot_of, droppers, seconds))
    return tuple(_merged(terms))


def _grid(whole: int, slot: Slot, axis: str) -> list[int]:
    """Lengths to time: of the levels of a slot the least, the whole, and some between."""
    sizes = sorted({level.sizes.get(axis, whole) for level in slot.levels if not level.dropped})
    if len(sizes) <= GRID:
        return sizes
    return [sizes[round(i * (len(sizes) - 1) / (GRID - 1))] for i in range(GRID)]


class _Times:
    """Seconds of a leaf at any lengths within its grid."""

    def __init__(self, clock: Clock, leaf: Leaf, axes: Sequence[str], grids: Mapping[str, Sequence[int]]) -> None:
        from scipy.interpolate import RegularGridInterpolator

        sizes = [grids[name] for name in axes]
        found = [clock.leaf_seconds(leaf, dict(zip(axes, at, strict=True))) for at in product(*sizes)]
        values = np.array(found).reshape([len(own) for own in sizes])
        self.whole = clock.whole
        kept = [i for i, own in enumerate(sizes) if len(own) > 1]
        self.free = [axes[i] for i in kept]
        values = values.reshape([len(sizes[i]) for i in kept])
        self.constant = float(values) if not kept else 0.0
        self.between = RegularGridInterpolator([sizes[i] for i in kept], values) if kept else None

    def __call__(self, at: Mapping[str, int]) -> float:
        if self.between is None:
            return self.constant
        return float(self.between([[at.get(name, self.whole[name]) for name in self.free]])[0])


def _term(
    slots: Sequence[Slot],
    axes: Sequence[str],
    blocks: Sequence[str],
    slot_of: Mapping[str, int],
    droppers: Mapping[str, int],
    seconds: Callable[[Mapping[str, int]], float],
) -> Term:
    """A part's time for every combination of the levels of the slots that it depends on."""
    involved = sorted({*(slot_of[name] for name in axes), *(droppers[name] for name in blocks)})
    values: Values = np.zeros([len(slots[i].levels) for i in involved])
    for place in np.ndindex(*values.shape):
        states: list[Level] = [slots[i].levels[k] for i, k in zip(involved, place, strict=True)]
        if any(name in state.dropped for state in states for name in blocks):
            continue
        at = {name: size for state in states for name, size in state.sizes.items()}
        values[place] = seconds(at)
    return Term(tuple(involved), values)


def _merged(terms: Sequence[Term]) -> list[Term]:
    """Terms over the same slots, added up."""
    found: dict[tuple[int, ...], Values] = {}
    for term in terms:
        found[term.slots] = found[term.slots] + term.values if term.slots in found else term.values
    return [Term(slots, values) for slots, values in found.items()]
