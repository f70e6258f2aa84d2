"""Trace a cut model again and compare with what the plan predicts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.choose.cost import gone_parameters, lengths
from secateur.choose.plan import Plan
from secateur.cut.names import new_name, renumbered
from secateur.errors import SecateurError
from secateur.space import Space, discover, evaluate
from secateur.space.trace import Inputs


def mismatch(
    new: nn.Module, plan: Plan, space: Space, inputs: Inputs = None, without: Sequence[str] = ()
) -> str | None:
    """What is otherwise than predicted in the cut model, in one line; None when all agrees.

    Compared are the shape of every parameter, every floating-point literal in the graph (a scale that follows a size
    would show here), and every whole number that Python code put into the graph as a size. Code may take another
    path where a size has become one (no repeat of a single head): numbers may then be missing, but none may be there
    that was not predicted. Modules in `without` have other code than in the dense model: only their shapes count.
    """
    try:
        traced = discover(new, inputs, sources=False)
    except SecateurError as error:
        return str(error)
    return (
        _shape_mismatch(traced, plan, space)
        or _constants(traced, plan, space, without)
        or _sizes(traced, plan, space, without)
    )


def _shape_mismatch(traced: Space, plan: Plan, space: Space) -> str | None:
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
    return None


def _constants(traced: Space, plan: Plan, space: Space, without: Sequence[str]) -> str | None:
    """Constants inside layers must be the same; outside of them (rotary tables of a layer type) some may vanish."""
    moved = renumbered(space, plan)
    out = _gone(space, plan) + tuple(f"{path}." for path in without)
    other = tuple(f"{new_name(path, moved)}." for path in without) or ("\0",)
    before = [
        (new_name(c.module, moved), c.operator, c.values)
        for c in space.constants
        if not f"{c.module}.".startswith(out or ("\0",))
    ]
    now = [(c.module, c.operator, c.values) for c in traced.constants if not f"{c.module}.".startswith(other)]
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


def _gone(space: Space, plan: Plan) -> tuple[str, ...]:
    """Paths, each with a dot, of all that does nothing any more."""
    idle = [module for block in space.blocks if block.name in plan.dropped for module in block.idle]
    return tuple(f"{name}." for name in (*plan.dropped, *idle))


def _sizes(traced: Space, plan: Plan, space: Space, without: Sequence[str]) -> str | None:
    at, moved = lengths(space, plan), renumbered(space, plan)
    out = _gone(space, plan) + tuple(f"{path}." for path in without)
    other = tuple(f"{new_name(path, moved)}." for path in without) or ("\0",)
    kept = [x for x in space.literals if not f"{x.module}.".startswith(out or ("\0",))]
    sizes = [(str(new_name(x.module, moved)), int(evaluate(x.size, at))) for x in kept]
    expected = [(module, size) for module, size in sizes if size > 1]  # a one is not noted, since it may be anything
    found = [(x.module, x.value) for x in traced.literals if not f"{x.module}.".startswith(other)]
    if found == expected or (len(expected) < len(sizes) and not Counter(found) - Counter(expected)):
        return None
    return _first_difference(expected, found)


def _first_difference(expected: Sequence[Any], found: Sequence[Any]) -> str:
    for (module, size), (_, value) in zip(expected, found, strict=False):
        if size != value:
            return f"Python code of {module} works with the size {value}, predicted was {size}"
    return f"its Python code works with {len(found)} sizes, predicted were {len(expected)}"
