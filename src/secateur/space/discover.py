"""Discover the Space of a model: trace it, solve the dimension equations, name what is left free."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from secateur.space import flow as flows
from secateur.space.blocks import Layer, find_blocks
from secateur.space.dims import Cat, Prod, Term, Var, leaves, product, resolve, size_of
from secateur.space.flow import Flow
from secateur.space.scales import find_constants, find_scales, norm_weights
from secateur.space.trace import export
from secateur.space.types import (
    Axis,
    Frozen,
    KVCache,
    Norm,
    Parameter,
    Polynomial,
    Reader,
    SizeLiteral,
    Slice,
    Space,
)


def discover(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Space:
    """Find every axis of a model that can be cut.

    Args:
        model: the model; meta tensors will do, since no weight is read.
        inputs: keyword arguments for one forward pass; None for a Hugging Face language model.

    Returns:
        The Space: axes, blocks, readers, costs, and what is frozen and why.

    Raises:
        SecateurError: when the model cannot be traced.
    """
    names = _tied_names(model)
    canonical = {alias: name for name, aliases in names.items() for alias in (name, *aliases)}
    program = export(model, inputs)
    flow = flows.run(program, canonical)
    layers = find_blocks(flow, model)
    buffers = dict(program.graph_signature.inputs_to_buffers)
    return _Namer(flow, layers, dict(model.named_parameters()), names, buffers).space()


def _tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """First name of each parameter -> its other names."""
    by_id: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].append(name)
    return {names[0]: tuple(names[1:]) for names in by_id.values()}


@dataclass(frozen=True)
class _Place:
    """One occurrence of a variable in a parameter's dimension."""

    parameter: str
    dim: int
    offset: int
    loops: tuple[tuple[Var, int], ...]
    """Enclosing outer factors (variable, stride), outermost first."""
    inner: int


def _places(parameter: str, dim: int, term: Term) -> Iterator[tuple[Var, _Place]]:
    def walk(term: Term, offset: int, loops: tuple[tuple[Var, int], ...], inner: int) -> Iterator[tuple[Var, _Place]]:
        if isinstance(term, Var):
            yield term, _Place(parameter, dim, offset, loops, inner)
        elif isinstance(term, Cat):
            for segment in term.segments:
                yield from walk(segment, offset, loops, inner)
                offset += size_of(segment) * inner
        else:
            rest = inner * size_of(term)
            for factor in term.factors:
                rest //= size_of(factor)
                yield from walk(factor, offset, loops, rest)
                if isinstance(factor, Var):
                    loops = (*loops, (factor, rest))

    yield from walk(resolve(term), 0, (), 1)


class _Namer:
    """Turns solved variables into named axes."""

    def __init__(
        self,
        flow: Flow,
        layers: Sequence[Layer],
        parameters: Mapping[str, nn.Parameter],
        tied: Mapping[str, tuple[str, ...]],
        buffers: dict[str, str],
    ) -> None:
        self.buffers = buffers
        self.flow, self.layers, self.tensors, self.tied = flow, layers, parameters, tied
        self.blocks = [block for layer in layers for block in layer.blocks]
        self.residuals = {id(leaf) for layer in layers for leaf in leaves(layer.residual) if leaf.frozen is None}
        self.places: dict[int, list[_Place]] = defaultdict(list)
        self.vars: dict[int, Var] = {}
        for name, value in flow.parameters.items():
            for dim, term in enumerate(value.dims):
                for var, place in _places(name, dim, term):
                    self.places[id(var)].append(place)
                    self.vars[id(var)] = var
        self.groups = {key: _group_of(var, self.places[key]) for key, var in self.vars.items()}
        self.counting = {id(g) for key, g in self.groups.items() if g is not None and self.vars[key].frozen is None}
        self.axes: dict[int, Axis] = {}
        for key, var in self.vars.items():
            if var.frozen is None and var.size > 1:
                self.axes[key] = self._axis(var, self.places[key])
        self._tell_apart()

    def space(self) -> Space:
        """Everything, in the order of the forward pass."""
        order = {name: i for i, name in enumerate(self.flow.parameters)}
        axes = sorted(self.axes.values(), key=lambda a: (order[a.slices[0].parameter], a.parent is not None))
        parameters = {name: self._parameter(name) for name in self.flow.parameters}
        untouched = [name for name in self.tensors if name not in parameters]
        for name in untouched:
            parameters[name] = self._plain_parameter(name)
        return Space(
            axes=tuple(axes),
            blocks=tuple(self.blocks),
            parameters=parameters,
            readers=tuple(Reader(r.module, r.parameter, r.in_dim, r.out_dim) for r in self.flow.reads),
            norms=tuple(self._norms()),
            caches=tuple(self._caches()),
            frozen=tuple(self._frozen()),
            literals=tuple(SizeLiteral(x.module, x.value, self._size(x.term)) for x in self.flow.literals),
            constants=tuple(find_constants(self.flow)),
            scales=tuple(find_scales(self.flow, self.buffers)),
            idle_parameters=tuple(untouched),
        )

    def _axis(self, var: Var, places: Sequence[_Place]) -> Axis:
        group = self.groups[id(var)]
        kind = self._kind(var, group)
        groups = 1 if group is None else group.size
        slices = tuple(_slice(var, group, place) for place in places)
        block = self._block_of(places)
        name = "hidden" if kind == "hidden" else f"{self._owner(places)}.{kind}"
        return Axis(name, kind, var.size * groups, slices, groups=groups, block=block)

    def _kind(self, var: Var, group: Var | None) -> str:
        if id(var) in self.residuals:
            return "hidden"
        if group is not None:
            return "heads"
        if "heads" in var.roles:
            return "kv_groups" if id(var) in self.counting else "heads"
        return "head_dim" if "head_dim" in var.roles else "ffn"

    def _owner(self, places: Sequence[_Place]) -> str:
        """The module that makes the units: the parent of the first projection that has them as outputs."""
        outputs = {(r.parameter, r.out_dim): r.module for r in self.flow.reads}
        made = [p for p in places if (p.parameter, p.dim) in outputs]
        module = outputs[made[0].parameter, made[0].dim] if made else places[0].parameter.rpartition(".")[0]
        return module.rpartition(".")[0] or module or "root"

    def _block_of(self, places: Sequence[_Place]) -> str | None:
        found = {self._layer_of(place.parameter) for place in places}
        return found.pop() if len(found) == 1 else None

    def _layer_of(self, path: str) -> str | None:
        return next((layer.name for layer in self.layers if path.startswith(f"{layer.name}.")), None)

    def _tell_apart(self) -> None:
        """Number axes of the same name, and connect grouped axes with the axis that counts their groups."""
        seen: dict[str, int] = defaultdict(int)
        for key, axis in self.axes.items():
            seen[axis.name] += 1
            if seen[axis.name] > 1:
                self.axes[key] = replace(axis, name=f"{axis.name}.{seen[axis.name]}")
        for key, axis in self.axes.items():
            if axis.groups > 1:
                group = self.groups[key]
                if group is not None and id(group) in self.axes:
                    self.axes[key] = replace(axis, parent=self.axes[id(group)].name)

    def _size(self, term: Term) -> Polynomial:
        term = resolve(term)
        if isinstance(term, Var):
            axis = self.axes.get(id(term))
            return {(): term.size} if axis is None else {(axis.name,): 1}
        parts = [self._size(part) for part in (term.factors if isinstance(term, Prod) else term.segments)]
        return _times(parts) if isinstance(term, Prod) else _plus(parts)

    def _parameter(self, name: str) -> Parameter:
        tensor = self.tensors[name]
        dims = tuple(self._size(term) for term in self.flow.parameters[name].dims)
        return Parameter(
            name, tuple(tensor.shape), tensor.dtype, _times(dims), dims, tuple(self.tied[name]), self._layer_of(name)
        )

    def _plain_parameter(self, name: str) -> Parameter:
        tensor = self.tensors[name]
        dims: tuple[Polynomial, ...] = tuple({(): n} for n in tensor.shape)
        return Parameter(
            name, tuple(tensor.shape), tensor.dtype, {(): tensor.numel()}, dims, tuple(self.tied[name]),
            self._layer_of(name),
        )  # fmt: skip

    def _norms(self) -> Iterator[Norm]:
        weights = norm_weights(self.flow)
        seen: set[tuple[str, str]] = set()  # a norm written out takes a mean and a variance
        for module, term in self.flow.norms:
            for leaf in leaves(term):
                if id(leaf) in self.axes and (module, self.axes[id(leaf)].name) not in seen:
                    seen.add((module, self.axes[id(leaf)].name))
                    yield Norm(module, self.axes[id(leaf)].name, *weights.get(module, (None, 0.0)))

    def _caches(self) -> Iterator[KVCache]:
        for attention in self.flow.attentions:
            stored = product([leaf for leaf in leaves(attention.heads) if not leaf.tile])
            size = _plus([self._size(product([stored, attention.key])), self._size(product([stored, attention.value]))])
            yield KVCache(attention.module, self._layer_of(f"{attention.module}."), size)

    def _frozen(self) -> Iterator[Frozen]:
        for name, value in self.flow.parameters.items():
            for dim, term in enumerate(value.dims):
                reasons = dict.fromkeys(leaf.frozen for leaf in leaves(term) if leaf.frozen and leaf.size > 1)
                for reason in reasons:
                    yield Frozen(name, dim, str(reason))


def _group_of(var: Var, places: Sequence[_Place]) -> Var | None:
    """The variable that `var` always stands directly inside of, where each of its units may choose for itself.

    Only query heads that share a key-value head are such: the tile of the keys says so.
    """
    if not var.tile or "heads" not in var.roles or not places:
        return None
    outers = {id(place.loops[-1][0]) if place.loops else None for place in places}
    adjacent = all(place.loops and place.loops[-1][1] == var.size * place.inner for place in places)
    return places[0].loops[-1][0] if len(outers) == 1 and adjacent else None


def _slice(var: Var, group: Var | None, place: _Place) -> Slice:
    units: tuple[tuple[int, int], ...] = ((var.size, place.inner),)
    loops = place.loops
    if group is not None:
        units = ((group.size, loops[-1][1]), *units)
        loops = loops[:-1]
    outer = tuple((loop.size, stride) for loop, stride in loops)
    return Slice(place.parameter, place.dim, place.offset, units, outer, place.inner)


def _times(parts: Sequence[Polynomial]) -> Polynomial:
    result: dict[tuple[str, ...], float] = {(): 1}
    for part in parts:
        step: dict[tuple[str, ...], float] = defaultdict(int)
        for a, x in result.items():
            for b, y in part.items():
                step[tuple(sorted(a + b))] += x * y
        result = dict(step)
    return result


def _plus(parts: Sequence[Polynomial]) -> Polynomial:
    result: dict[tuple[str, ...], float] = defaultdict(int)
    for part in parts:
        for names, coefficient in part.items():
            result[names] += coefficient
    return dict(result)
