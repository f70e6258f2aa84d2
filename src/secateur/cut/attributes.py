"""Which whole numbers of modules and configs have to change with a plan, and to what."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from secateur.choose.cost import gone_parameters, lengths
from secateur.choose.plan import Plan
from secateur.errors import SecateurError
from secateur.space import Polynomial, Space, evaluate
from secateur.space.provenance import (
    Attribute,
    Expression,
    Operation,
    attributes_in,
    holders,
    read,
    value_of,
)


def followed(model: nn.Module, plan: Plan, space: Space, without: Sequence[str] = ()) -> dict[Attribute, int]:
    """Attributes that the forward pass turns into sizes -> the number that each must have after the plan.

    Modules in `without` are left out: they take their sizes from their weights.

    Raises:
        SecateurError: where one attribute stands for sizes that the plan makes different.
    """
    at = lengths(space, plan)
    whole = lengths(space, Plan())
    owners = {(path, is_config): holder for path, holder, is_config in holders(model)}
    out = tuple(f"{name}." for name in (*plan.dropped, *without)) or ("\0",)
    literals = [x for x in space.literals if x.source is not None and not f"{x.module}.".startswith(out)]
    old = {a: read(owners[a.owner, a.is_config], a) for x in literals for a in attributes_in(x.source)}
    new: dict[Attribute, int] = {}
    said: dict[Attribute, str] = {}
    for literal in literals:
        if isinstance(literal.source, Attribute):
            size = int(evaluate(literal.size, at))
            if new.setdefault(literal.source, size) != size:
                raise SecateurError(
                    f"{_spelled(literal.source)} = {old[literal.source]} stands for a size of {new[literal.source]} in "
                    f"{said[literal.source]} after this plan, and for {size} in {literal.module}: cut both alike"
                )
            said.setdefault(literal.source, literal.module)
    for literal in literals:
        if isinstance(literal.source, Operation):
            size = int(evaluate(literal.size, at))
            solve(literal.source, size, literal.size, old, new, whole)
    return {attribute: size for attribute, size in new.items() if size != old[attribute]}


def _spelled(attribute: Attribute) -> str:
    return f"{attribute.owner}.{attribute.name}".lstrip(".")


def solve(
    expression: Operation,
    size: int,
    term: Polynomial,
    old: Mapping[Attribute, int],
    new: dict[Attribute, int],
    whole: Mapping[str, int],
) -> None:
    """Give the one attribute of an expression that is not known yet the number that makes the expression right."""
    if value_of(expression, {**old, **new}) == size:
        return
    axes = {whole[name] for names in term for name in names}
    unknown = [a for a in dict.fromkeys(attributes_in(expression)) if a not in new]
    for attribute in sorted(unknown, key=lambda a: old[a] not in axes):
        for candidate in _candidates(expression, size, old, new, attribute):
            if value_of(expression, {**old, **new, attribute: candidate}) == size:
                new[attribute] = candidate
                return


def _candidates(
    expression: Expression, size: int, old: Mapping[Attribute, int], new: Mapping[Attribute, int], wanted: Attribute
) -> Iterator[int]:
    """Numbers for `wanted` that could make the expression give `size`, one step of arithmetic at a time."""
    if isinstance(expression, Attribute):
        yield size
    elif isinstance(expression, Operation):
        known = {**old, **new}
        left, right = value_of(expression.left, known), value_of(expression.right, known)
        in_left = wanted in attributes_in(expression.left)
        other = right if in_left else left
        undone: dict[str, list[int]] = {
            "+": [size - other],
            "-": [size + other] if in_left else [other - size],
            "*": [size // other] if other else [],
            "//": [size * other] if in_left else [other // size] if size else [],
        }
        for part in undone[expression.sign]:
            yield from _candidates(expression.left if in_left else expression.right, part, old, new, wanted)


def look_alikes(model: nn.Module, plan: Plan, space: Space, without: Sequence[str] = ()) -> dict[Attribute, int]:
    """Numbers that equal a size of their module's own tensors, and can mean that one size only.

    Modules in `without` are left out.

    The forward pass may never turn them into a size (``in_features``, a check of the input), yet they describe it.
    """
    at, gone = lengths(space, plan), gone_parameters(space, plan)
    stored = {**space.parameters, **space.buffers}
    tensors = {alias: t.dims for name, t in stored.items() if name not in gone for alias in (name, *t.aliases)}
    near: dict[str, list[Polynomial]] = defaultdict(list)
    for name, dims in tensors.items():
        for path in _above(name):
            near[path] += dims
    for axis in space.axes:
        total: Polynomial = {(axis.name,): axis.groups} if axis.parent is None else {(axis.name, axis.parent): 1}
        for part in axis.slices:
            for path in _above(part.parameter):
                near[path] += [total, {(axis.name,): 1}]
    whole = lengths(space, Plan())
    found: dict[Attribute, int] = {}
    for path, holder, is_config in holders(model):
        if is_config or path not in near or path in without:
            continue
        meanings: dict[int, set[int]] = defaultdict(set)
        for size in near[path]:
            meanings[int(evaluate(size, whole))].add(int(evaluate(size, at)))
        for attribute, value in _numbers(path, holder):
            after = meanings.get(value, set())
            if len(after) == 1 and after != {value}:
                found[attribute] = after.pop()
    return found


def _above(tensor: str) -> Iterator[str]:
    """The module of a tensor, and those that it is in."""
    while tensor:
        tensor = tensor.rpartition(".")[0]
        yield tensor


def _numbers(path: str, holder: Any) -> Iterator[tuple[Attribute, int]]:
    for name, value in vars(holder).items():
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield Attribute(path, name), value
