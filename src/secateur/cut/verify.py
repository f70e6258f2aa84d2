"""Trace a cut model again and compare with what the plan predicts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from secateur.choose.cost import gone_parameters, lengths
from secateur.choose.plan import Plan
from secateur.cut.names import new_name, renumbered
from secateur.errors import SecateurError
from secateur.space import Space, discover, evaluate


def mismatch(new: nn.Module, plan: Plan, space: Space, inputs: Mapping[str, Any] | None = None) -> str | None:
    """What is otherwise than predicted in the cut model, in one line; None when all agrees.

    Compared are the shape of every parameter and every floating-point literal in the graph: a scale that follows a
    size would show here.
    """
    try:
        traced = discover(new, inputs)
    except SecateurError as error:
        return str(error)
    moved, at = renumbered(space, plan), lengths(space, plan)
    shapes = {name: p.shape for name, p in traced.parameters.items()}
    gone = gone_parameters(space, plan)
    expected = {
        new_name(name, moved): tuple(int(evaluate(dim, at)) for dim in parameter.dims)
        for name, parameter in space.parameters.items()
        if name not in gone
    }
    for name, shape in expected.items():
        if shapes.get(str(name)) != shape:
            return f"{name} has shape {shapes.get(str(name))}, predicted was {shape}"
    if len(shapes) != len(expected):
        return f"{len(shapes)} parameters, predicted were {len(expected)}"
    out = tuple(f"{name}." for name in (*plan.dropped, *_idle(space, plan)))
    before = [
        (new_name(c.module, moved), c.operator, c.values)
        for c in space.constants
        if not f"{c.module}.".startswith(out or ("\0",))
    ]
    return _constant_mismatch(before, [(c.module, c.operator, c.values) for c in traced.constants], traced)


def _constant_mismatch(before: Sequence[Any], now: Sequence[Any], traced: Space) -> str | None:
    """Constants inside layers must be the same; outside of them (rotary tables of a layer type) some may vanish."""
    layers = tuple(f"{layer.name}." for layer in traced.layers()) or ("\0",)
    inside = [[c for c in constants if f"{c[0]}.".startswith(layers)] for constants in (before, now)]
    for old, new in zip(*inside, strict=False):
        if old != new:
            return f"{new[1]} in {new[0]} has the constant {new[2]}, before the cut it was {old[2]} in {old[0]}"
    if len(inside[0]) != len(inside[1]):
        return f"{len(inside[1])} constants in the layers, before the cut there were {len(inside[0])}"
    for module, operator, values in now:
        if (module, operator, values) not in before:
            return f"{operator} in {module} has the constant {values}, which it had not before the cut"
    return None


def _idle(space: Space, plan: Plan) -> list[str]:
    return [module for block in space.blocks if block.name in plan.dropped for module in block.idle]


def literal_mismatch(
    new: nn.Module,
    plan: Plan,
    space: Space,
    inputs: Mapping[str, Any] | None = None,
    *,
    other_path: bool = False,
) -> str | None:
    """As `mismatch`, and every integer that Python code put into the graph.

    Code may take another path where a size has become one (no repeat of a single head): with `other_path`, integers
    may then be missing, but none may be there that was not predicted.
    """
    wrong = mismatch(new, plan, space, inputs)
    if wrong is not None:
        return wrong
    at, moved = lengths(space, plan), renumbered(space, plan)
    out = tuple(f"{name}." for name in plan.dropped)
    kept = [x for x in space.literals if not f"{x.module}.".startswith(out or ("\0",))]
    sizes = [(str(new_name(x.module, moved)), int(evaluate(x.size, at))) for x in kept]
    expected = [(module, size) for module, size in sizes if size > 1]  # a one is not noted, since it may be anything
    found = [(x.module, x.value) for x in discover(new, inputs).literals]
    shorter = other_path and len(expected) < len(sizes) and not Counter(found) - Counter(expected)
    return None if found == expected or shorter else "sizes in its Python code do not follow the cut"
