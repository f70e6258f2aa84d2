"""Prove a Space: what the trace says can be cut is cut for a trial, on meta tensors, and traced again.

Rules see how tensors depend on each other. Python code between them may not follow all the same: a scale worked out
from a size, a size that is written out. A trial finds that, and the axis is frozen with what went wrong as the reason.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.plan import Kept, Plan
from secateur.cut.apply import apply, sliced
from secateur.cut.surgery import operate, with_tensors
from secateur.errors import SecateurError
from secateur.load.megatron import is_megatron, opened, token_inputs
from secateur.space import Axis, Block, Space
from secateur.space import discover as traced
from secateur.space.trace import Inputs, arguments
from secateur.space.types import Frozen

Item = TypeVar("Item", Axis, Block)
_SHARE = 4
"""A trial takes every fourth unit."""


def discover(model: nn.Module, inputs: Inputs = None, *, prove: bool = True) -> Space:
    """Find every axis of a model that can be cut, and prove it by a trial.

    Args:
        model: the model; meta tensors will do, since no weight is read.
        inputs: arguments for one forward pass: a tensor, a tuple, or a mapping of keyword arguments; None for a
            Hugging Face model.
        prove: cut all axes and one block of each kind for a trial, on meta tensors, and freeze what does not follow.

    Returns:
        The Space: axes, blocks, readers, costs, and what is frozen and why.

    Raises:
        SecateurError: when the model cannot be traced.
    """
    if is_megatron(model):
        model, inputs = opened(model), token_inputs(inputs)
    space = traced(model, inputs)
    return proved(model, space, inputs) if prove and (space.axes or space.blocks) else space


def proved(model: nn.Module, space: Space, inputs: Inputs = None) -> Space:
    """The Space without the axes and blocks whose trial cut fails; the frozen places say why."""
    args, kwargs = arguments(model, inputs)
    args, kwargs = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, (args, kwargs))
    stored = [*model.named_parameters(), *model.named_buffers()]
    hollow = with_tensors(model, {name: torch.empty_like(tensor, device="meta") for name, tensor in stored})
    subject, given = hollow, cast("Inputs", kwargs or args)
    real = not any(tensor.is_meta for _, tensor in stored)

    def fault(axes: Sequence[Axis], blocks: Sequence[Block]) -> str | None:
        nonlocal subject, given
        plan = trial_plan(axes, blocks, space.stacks)
        if not plan.kept and not plan.dropped:
            return None
        wrong = _trial(subject, plan, space, given)
        if wrong is not None and "device" in wrong and real and subject is hollow:
            subject, given = model, inputs  # its code makes tensors on the CPU: the real weights are tried
            wrong = _trial(subject, plan, space, given)
        return wrong

    if fault(space.axes, space.blocks) is None and (not _untried(space) or fault(space.axes, ()) is None):
        return space
    bad: dict[str, str] = {}
    good_axes = _sound(space.axes, lambda axes: fault(axes, ()), bad)
    good_blocks = _sound(space.blocks, lambda blocks: fault((), blocks), bad)
    if fault(good_axes, good_blocks) is not None:  # each alone is sound, together they are not
        good_blocks = good_blocks if fault(good_axes, ()) is None else ()
    return without(space, good_axes, good_blocks, bad)


def _untried(space: Space) -> bool:
    """Whether some form of axis lies in none but blocks that the trial drops."""
    dropped = trial_plan(space.axes, space.blocks, space.stacks).dropped
    gone = {form(axis) for axis in space.axes if axis.block in dropped}
    return not gone <= {form(axis) for axis in space.axes if axis.block not in dropped}


def _trial(model: nn.Module, plan: Plan, space: Space, inputs: Inputs) -> str | None:
    """What goes wrong when a plan is applied; None where nothing does."""
    try:
        plan.check(space)
        operate(model, plan, space, sliced(model, plan, space), inputs)
    except SecateurError as error:
        wrong = str(error)
    else:
        return None
    try:  # what surgery cannot follow, the stock class may still build from a config
        apply(model, plan, space=space, inputs=inputs)
    except SecateurError:
        return wrong
    return None


def _sound(
    items: Sequence[Item], fault: Callable[[Sequence[Item]], str | None], bad: dict[str, str]
) -> tuple[Item, ...]:
    """Items whose form passes a trial; `bad` takes the others' faults."""
    kinds: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        kinds[item.kind].append(item)
    sound: list[Item] = []
    for kind in kinds.values():
        if fault(kind) is None:
            sound += kind
            continue
        forms: dict[str, list[Item]] = defaultdict(list)
        for item in kind:
            forms[form(item)].append(item)
        for alike in forms.values():
            wrong = fault(alike)
            if wrong is None:
                sound += alike
            else:
                bad |= {item.name: wrong for item in alike}
    return tuple(item for item in items if item in sound)


def trial_plan(axes: Iterable[Axis], blocks: Iterable[Block], stacks: Mapping[str, int]) -> Plan:
    """Every fourth unit of each axis, and the first block of each form, as long as its stack keeps a layer."""
    kept = {}
    for axis in axes:
        per_group = axis.per_group
        stay = max(per_group - max(1, per_group // _SHARE), 1, -(-axis.minimum // axis.groups))
        if stay < per_group:
            units = tuple(g * per_group + u for g in range(axis.groups) for u in range(stay))
            kept[axis.name] = Kept(axis.kind, axis.size, units)
    left = dict(stacks)
    dropped: list[str] = []
    for block in {form(block): block for block in reversed(list(blocks))}.values():
        apart = not any(block.name.startswith(f"{d}.") or d.startswith(f"{block.name}.") for d in dropped)
        if apart and (block.kind != "layers" or left[block.stack] > 1):
            left[block.stack] -= block.kind == "layers"
            dropped.append(block.name)
    return Plan(kept, tuple(dropped))


def form(item: Axis | Block) -> str:
    """What is alike in its place but for the number of its layer, and has the same parameters."""
    own = sorted(n.removeprefix(item.name) for n in item.parameters) if isinstance(item, Block) else []
    return re.sub(r"\d+", "*", " ".join([item.kind, item.name, *own]))


def without(space: Space, axes: Sequence[Axis], blocks: Sequence[Block], bad: dict[str, str]) -> Space:
    """The Space with these axes and blocks alone; lengths of the others are constants from now on."""
    gone = {axis.name: axis for axis in space.axes if axis not in axes}
    frozen = [
        Frozen(part.parameter, part.dim, f"a trial cut failed: {bad.get(name, 'together with others')}")
        for name, axis in gone.items()
        for part in axis.slices
    ]
    rest = space.fixed(gone)
    kept = tuple(replace(axis, parent=None) if axis.parent in gone else axis for axis in rest.axes)
    sound = tuple(block for block in space.blocks if block in blocks)
    return replace(rest, axes=kept, blocks=sound, frozen=(*space.frozen, *frozen))
