"""Discover the Space of a model: trace it, solve the dimension equations, name what is left free."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.space import flow as flows
from secateur.space.blocks import Layer, find_blocks
from secateur.space.dims import Prod, Term, Var, leaves, product, resolve
from secateur.space.flow import Flow
from secateur.space.kinds import Kinds, Place, slice_of
from secateur.space.provenance import Recorder
from secateur.space.scales import find_constants, find_scales, norm_weights
from secateur.space.trace import Inputs, batch_of, export
from secateur.space.types import (
    Axis,
    Frozen,
    KVCache,
    Norm,
    Parameter,
    Polynomial,
    Reader,
    Router,
    SizeLiteral,
    Space,
    Work,
)


def discover(model: nn.Module, inputs: Inputs = None, *, sources: bool = True) -> Space:
    """Find every axis of a model that can be cut.

    Args:
        model: the model; meta tensors will do, since no weight is read.
        inputs: arguments for one forward pass: a tensor, a tuple, or a mapping of keyword arguments; None for a
            Hugging Face model.
        sources: find out which attributes the whole numbers in the graph come from: to cut the model, that is needed.

    Returns:
        The Space: axes, blocks, readers, costs, and what is frozen and why.

    Raises:
        SecateurError: when the model cannot be traced.
    """
    names = _tied_names(model.named_parameters(remove_duplicate=False))
    names |= _tied_names(model.named_buffers(remove_duplicate=False))
    canonical = {alias: name for name, aliases in names.items() for alias in (name, *aliases)}
    program, recorder = export(model, inputs, sources=sources)
    try:
        flow = flows.run(program, canonical)
    except RuntimeError as error:
        if type(error).__name__ != "GuardOnDataDependentSymNode":
            raise
        raise SecateurError(
            f"{type(model).__name__}: a tensor's shape depends on the values of another: give it a fixed size while "
            "torch.compiler.is_exporting()"
        ) from error
    layers = find_blocks(flow, model)
    buffers = dict(program.graph_signature.inputs_to_buffers)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    space = _Namer(flow, layers, tensors, names, buffers, recorder).space()
    return replace(space, batch=batch_of(model, inputs))


def _tied_names(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple[str, ...]]:
    """First name of each tensor -> its other names."""
    by_id: dict[int, list[str]] = defaultdict(list)
    for name, tensor in tensors:
        by_id[id(tensor)].append(name)
    return {names[0]: tuple(names[1:]) for names in by_id.values()}


class _Namer:
    """Turns solved variables into named axes."""

    def __init__(
        self,
        flow: Flow,
        layers: Sequence[Layer],
        tensors: Mapping[str, torch.Tensor],
        tied: Mapping[str, tuple[str, ...]],
        buffers: dict[str, str],
        recorder: Recorder,
    ) -> None:
        self.buffers, self.recorder = buffers, recorder
        self.flow, self.layers, self.tensors, self.tied = flow, layers, tensors, tied
        found = [block for layer in layers for block in layer.blocks]
        self.blocks = [replace(block, output=recorder.outputs.get(block.name)) for block in found]
        self.kinds = Kinds(flow, layers)
        self.axes: dict[int, Axis] = {}
        for key, var in self.kinds.vars.items():
            stored = any(place.tensor in flow.parameters for place in self.kinds.places[key])
            if var.frozen is None and var.size > 1 and stored:
                self.axes[key] = self._axis(var)
        self._tell_apart()

    def space(self) -> Space:
        """Everything, in the order of the forward pass."""
        order = {name: i for i, name in enumerate([*self.flow.parameters, *self.flow.buffers])}
        axes = sorted(self.axes.values(), key=lambda a: (order[a.slices[0].parameter], a.parent is not None))
        parameters = {name: self._parameter(name) for name in self.flow.parameters}
        stored = [name for name, tensor in self.tensors.items() if isinstance(tensor, nn.Parameter)]
        untouched = [name for name in stored if name not in parameters]
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
            literals=tuple(self._literals()),
            constants=tuple(find_constants(self.flow)),
            scales=tuple(find_scales(self.flow, self.buffers)),
            buffers={name: self._parameter(name) for name in self.flow.buffers if self._touched(name)},
            stacks={layer.stack: layer.count for layer in self.layers},
            work=tuple(self._work()),
            routers=tuple(self._routers()),
            idle_parameters=tuple(untouched),
        )

    def _axis(self, var: Var) -> Axis:
        group, places = self.kinds.groups[id(var)], self.kinds.places[id(var)]
        kind = self.kinds.of(var)
        groups = 1 if group is None else group.size
        slices = tuple(slice_of(var, group, place) for place in places)
        block = self._block_of(places)
        residual = kind in ("hidden", "channels") and id(var) in self.kinds.residuals
        owner = self._stack_of(var) if residual else self.kinds.owner(places)
        name = f"{owner}.{kind}".lstrip(".")
        return Axis(name, kind, var.size * groups, slices, groups, block=block, minimum=self.kinds.minimum(var))

    def _stack_of(self, var: Var) -> str:
        """What to call a residual stream: nothing where there is one, else the path of its first stack."""
        streams: dict[int, str] = {}
        for layer in self.layers:
            for leaf in leaves(layer.residual):
                streams.setdefault(id(leaf), layer.stack)
        live = [key for key in streams if key in self.kinds.residuals]
        return "" if len(live) == 1 else streams[id(var)].rpartition(".")[0] or streams[id(var)]

    def _block_of(self, places: Sequence[Place]) -> str | None:
        found = {self._layer_of(place.tensor) for place in places}
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
                group = self.kinds.groups[key]
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
        value = self.flow.parameters.get(name) or self.flow.buffers[name]
        dims = tuple(self._size(term) for term in value.dims)
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

    def _literals(self) -> Iterator[SizeLiteral]:
        for x in self.flow.literals:
            source = self.recorder.source(x.node, x.numbers, x.place, x.named)
            yield SizeLiteral(x.module, x.value, self._size(x.term), source)

    def _touched(self, name: str) -> bool:
        return any(id(leaf) in self.axes for term in self.flow.buffers[name].dims for leaf in leaves(term))

    def _work(self) -> Iterator[Work]:
        for work in self.flow.work:
            size = _times([self._size(term) for term in work.terms])
            macs = {names: count * work.factor for names, count in size.items()}
            yield Work(work.module, self._layer_of(f"{work.module}."), macs)

    def _routers(self) -> Iterator[Router]:
        for node, term in self.flow.routed:
            weight = self.flow.value(node.args[1])
            for leaf in leaves(term):
                if id(leaf) in self.axes and weight.source is not None:
                    active = self.kinds.active(leaf)
                    yield Router(flows.module_of(node), self.axes[id(leaf)].name, weight.source[0], active)

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
