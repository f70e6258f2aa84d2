"""Find the config of the stock class that describes a cut, for any class: by what its constructor makes of a config."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from secateur.choose.cost import gone_parameters, lengths
from secateur.choose.plan import Plan
from secateur.cut.attributes import solve
from secateur.cut.config import build_config, config_of, cut_config, cut_lists, with_head_dim
from secateur.errors import SecateurError
from secateur.space import Polynomial, Space, evaluate
from secateur.space.provenance import Attribute, Expression, Operation, attributes_in, made_sizes

Made = Mapping[str, tuple[Expression, ...]]
_MOST_COUNTS = 6
"""Numbers of a config that could be the number of layers: more are not tried together."""


def shapes_of(kind: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters that a class has with a config; None where it rejects it."""
    try:
        with torch.device("meta"):
            return {name: tuple(p.shape) for name, p in kind(config).named_parameters()}
    except Exception:  # noqa: BLE001 - the modules check sizes each in their own way
        return None


def configs_for(model: Any, plan: Plan, space: Space, made: Made | None = None) -> Iterator[Any]:
    """Configs that may describe the cut, the likeliest first; `made` are the model's `made_sizes`, where known.

    The usual names of sizes are tried first. Where they do not fit, the class is built once with a config whose
    numbers are tagged: what sizes its parameters have, as expressions in the config, gives equations for the cut.
    """
    try:
        usual = cut_config(model.config, space, plan)
    except SecateurError:
        usual = None  # the class rejects these sizes
    if usual is not None:
        yield usual
    if any(b.name in plan.dropped and b.kind != "layers" for b in space.blocks):
        return
    config = with_head_dim(model.config)
    try:
        made = made_sizes(type(model), copy.deepcopy(config)) if made is None else made
    except Exception:  # noqa: BLE001 - some constructors do what tagged numbers cannot
        return
    values = _solved(config, made, plan, space)
    if values is None:
        return
    gone = {stack: out for stack, out in space.gone_layers(plan.dropped).items() if any(out)}
    lists = [(config_of(model, stack), out) for stack, out in gone.items()]
    for counts in _layer_counts(config, plan, space):
        try:
            yield _rebuilt(config, {**values, **counts}, lists)
        except SecateurError:
            continue


def _solved(config: Any, made: Made, plan: Plan, space: Space) -> dict[Attribute, int] | None:
    """The numbers of the config that give every parameter its predicted shape; None where they contradict."""
    at, whole, gone = lengths(space, plan), lengths(space, Plan()), gone_parameters(space, plan)
    equations: list[tuple[Expression, int, Polynomial]] = []
    for name, sizes in made.items():
        parameter = space.parameters.get(name)
        if parameter is None or name in gone or len(sizes) != len(parameter.dims):
            continue
        equations += [(e, int(evaluate(d, at)), d) for e, d in zip(sizes, parameter.dims, strict=True)]
    old = {a: _number(config, a) for expression, *_ in equations for a in attributes_in(expression)}
    new: dict[Attribute, int] = {}
    for expression, size, _ in equations:
        if isinstance(expression, Attribute) and new.setdefault(expression, size) != size:
            return None
    for expression, size, term in equations:
        if isinstance(expression, Operation):
            solve(expression, size, term, old, new, whole)
    return {attribute: size for attribute, size in new.items() if size != old[attribute]}


def _number(config: Any, attribute: Attribute) -> int:
    holder = config
    for part in attribute.owner.split(".")[1:]:
        holder = getattr(holder, part)
    value = vars(holder)[attribute.name]
    return int(value if attribute.item is None else value[attribute.item])


def _layer_counts(config: Any, plan: Plan, space: Space) -> Iterator[dict[Attribute, int]]:
    """Which numbers of the config may count the layers of the stacks that lose some."""
    stacks = space.gone_layers(plan.dropped).values()
    changed = {len(gone): len(gone) - sum(gone) for gone in stacks if any(gone)}
    if not changed:
        yield {}
        return
    found: list[tuple[Attribute, int]] = []
    for path, values in _parts("config", config):
        for key, value in values.items():
            entries = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
            for item, number in entries:
                if type(number) is int and number in changed and ("layer" in key or "depth" in key or "block" in key):
                    found.append((Attribute(path, key, item, True), changed[number]))
    for count in range(1, min(len(found), _MOST_COUNTS) + 1):
        for some in combinations(found[:_MOST_COUNTS], count):
            yield dict(some)


def _parts(path: str, config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, vars(config)
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _parts(f"{path}.{key}", value)


def _rebuilt(config: Any, values: Mapping[Attribute, int], lists: Sequence[tuple[str, list[bool]]]) -> Any:
    whole = copy.deepcopy(config).to_dict()
    for attribute, number in values.items():
        part = whole
        for key in attribute.owner.split(".")[1:]:
            part = part[key]
        if attribute.item is None:
            part[attribute.name] = number
        else:
            entries = list(part[attribute.name])
            entries[attribute.item] = number
            part[attribute.name] = entries
    for path, gone in lists:
        part = whole
        for key in path.split(".")[1:]:
            part = part[key]
        part.update(cut_lists(part, gone))
    whole.pop("transformers_version", None)
    return build_config(config, whole)
