"""The nouns of the Space: axes, slices, blocks, and who reads whom."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from secateur.space.provenance import Expression

Polynomial = Mapping[tuple[str, ...], float]
"""A cost as a sum of products of axis lengths: {(axis, axis...): coefficient}; () is the constant."""


@dataclass(frozen=True)
class Slice:
    """Where an axis lives in one tensor.

    Unit u is written in the mixed radix of `units`, a tuple of (count, stride), outermost first; it owns the rows
    ``offset + sum(digit * stride) + o + i`` for every o made by `outer` (count, stride) and every i < `inner`.
    """

    parameter: str
    dim: int
    offset: int
    units: tuple[tuple[int, int], ...]
    outer: tuple[tuple[int, int], ...]
    inner: int

    def rows(self) -> torch.Tensor:
        """Row numbers, int64 [size, rows per unit]."""
        units = _positions(self.units)
        within = _positions((*self.outer, (self.inner, 1)))
        return self.offset + units[:, None] + within[None, :]


def _positions(radix: tuple[tuple[int, int], ...]) -> torch.Tensor:
    total = torch.zeros(1, dtype=torch.int64)
    for count, stride in radix:
        total = (total[:, None] + torch.arange(count) * stride).flatten()
    return total


@dataclass(frozen=True)
class Axis:
    """One prunable dimension of the model."""

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    groups: int = 1
    """Units come in this many runs of equal length, and each run must keep the same number (heads of KV groups)."""
    parent: str | None = None
    """The axis that counts the groups, where that is one."""
    block: str | None = None
    """The block that it lies in; None where it runs through several."""
    minimum: int = 1
    """Units that must stay: the experts that a router chooses for each token."""

    @property
    def per_group(self) -> int:
        """Units in one group."""
        return self.size // self.groups


@dataclass(frozen=True)
class Block:
    """A part that can be dropped whole: a layer of the stack, or the attention or MLP sub-layer of one."""

    name: str
    kind: str
    index: int
    """Position of its layer in the stack."""
    stack: str
    """Path of the ModuleList."""
    parameters: frozenset[str]
    """Parameters that nothing else needs."""
    idle: tuple[str, ...] = ()
    """Modules outside of it (its norms) that do nothing once it is gone."""
    output: Any = None
    """Structure of what it returns: "tensor" for a tensor, None for anything else."""


@dataclass(frozen=True)
class Reader:
    """A module that multiplies its input with `parameter`, summing over dimension `in_dim`."""

    module: str
    parameter: str
    in_dim: int
    out_dim: int | None


@dataclass(frozen=True)
class Frozen:
    """A parameter dimension (or a part of one) that is never cut, and why."""

    parameter: str
    dim: int
    reason: str


@dataclass(frozen=True)
class Parameter:
    """Shape and cost of one parameter; tied names are all listed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: Polynomial
    """Number of elements as a polynomial in axis lengths."""
    dims: tuple[Polynomial, ...]
    """Length of each dimension as a polynomial in axis lengths."""
    aliases: tuple[str, ...]
    block: str | None


@dataclass(frozen=True)
class SizeLiteral:
    """An integer that Python code of `module` used for a size, and that size in terms of axes."""

    module: str
    value: int
    size: Polynomial
    source: Expression | None = None
    """The attributes that it came from; None where the code wrote it out, or took it from a shape."""


@dataclass(frozen=True)
class KVCache:
    """Elements that one attention keeps for each position, as a polynomial in axis lengths."""

    module: str
    block: str | None
    size: Polynomial


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one operator on the example inputs; of experts, for the rows that meet them."""

    module: str
    block: str | None
    macs: Polynomial


@dataclass(frozen=True)
class Router:
    """A mixture of experts: which of them each token meets, and where their results come out."""

    module: str
    axis: str
    parameter: str
    """The stacked weights [experts, ...] whose results are the experts' own."""
    active: int
    """Experts that each token meets."""


@dataclass(frozen=True)
class Norm:
    """A module that normalises over `axis`."""

    module: str
    axis: str
    weight: str | None = None
    """The parameter that scales its result."""
    weight_offset: float = 0.0
    """The result is scaled by (weight + this): 1 for Gemma."""


@dataclass(frozen=True)
class Scale:
    """A scalar buffer that multiplies what is looked up in an embedding (Gemma: the square root of hidden)."""

    buffer: str
    embedding: str


@dataclass(frozen=True)
class Constant:
    """Numbers of one operator in `module` that are no sizes: they must not change when axes are cut."""

    module: str
    operator: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Space:
    """All that can be cut of one model, and what depends on what."""

    axes: tuple[Axis, ...]
    blocks: tuple[Block, ...]
    parameters: Mapping[str, Parameter]
    readers: tuple[Reader, ...]
    norms: tuple[Norm, ...]
    caches: tuple[KVCache, ...]
    frozen: tuple[Frozen, ...]
    literals: tuple[SizeLiteral, ...]
    constants: tuple[Constant, ...]
    scales: tuple[Scale, ...]
    buffers: Mapping[str, Parameter] = field(default_factory=dict)
    """Buffers of the state that axes run through (the running statistics of batch norm)."""
    stacks: Mapping[str, int] = field(default_factory=dict)
    """Path of a list of layers -> how many it has, those that must stay among them."""
    work: tuple[Work, ...] = ()
    routers: tuple[Router, ...] = ()
    batch: int = 1
    """Samples in the example inputs."""
    idle_parameters: tuple[str, ...] = ()
    """Parameters that the traced forward pass never touched."""

    def axis(self, name: str) -> Axis:
        """The axis of that name; KeyError otherwise."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise KeyError(name)

    def tensor(self, name: str) -> Parameter:
        """The parameter or buffer of that name; KeyError otherwise."""
        return self.parameters[name] if name in self.parameters else self.buffers[name]

    def of_kind(self, kind: str) -> tuple[Axis, ...]:
        """All axes of a kind, in the order of the forward pass."""
        return tuple(axis for axis in self.axes if axis.kind == kind)

    def kinds(self) -> tuple[str, ...]:
        """Kinds of axes and blocks that this model has."""
        return tuple(dict.fromkeys([*(a.kind for a in self.axes), *(b.kind for b in self.blocks)]))

    def layers(self) -> tuple[Block, ...]:
        """The droppable layers, in order."""
        return tuple(block for block in self.blocks if block.kind == "layers")

    def fixed(self, gone: Mapping[str, Axis]) -> "Space":
        """The same where these axes are axes no more: their lengths are constants in every cost."""
        at = {name: float(axis.per_group) for name, axis in gone.items()}

        def fix(size: Polynomial) -> Polynomial:
            new: dict[tuple[str, ...], float] = {}
            for names, coefficient in size.items():
                rest = tuple(name for name in names if name not in at)
                new[rest] = new.get(rest, 0) + coefficient * prod(at[name] for name in names if name in at)
            return new

        def fix_tensor(tensor: Parameter) -> Parameter:
            return replace(tensor, size=fix(tensor.size), dims=tuple(map(fix, tensor.dims)))

        return replace(
            self,
            axes=tuple(axis for axis in self.axes if axis.name not in gone),
            parameters={name: fix_tensor(p) for name, p in self.parameters.items()},
            buffers={name: fix_tensor(p) for name, p in self.buffers.items()},
            norms=tuple(norm for norm in self.norms if norm.axis not in gone),
            caches=tuple(replace(cache, size=fix(cache.size)) for cache in self.caches),
            literals=tuple(replace(literal, size=fix(literal.size)) for literal in self.literals),
            work=tuple(replace(work, macs=fix(work.macs)) for work in self.work),
            routers=tuple(router for router in self.routers if router.axis not in gone),
        )

    def gone_layers(self, dropped: Sequence[str]) -> dict[str, list[bool]]:
        """For each list of layers: whether each is among the dropped blocks."""
        return {path: [f"{path}.{i}" in dropped for i in range(count)] for path, count in self.stacks.items()}

    def consumers(self, axis: Axis) -> Iterator[tuple[Reader, Slice]]:
        """Who reads the units of an axis: each contraction whose weight has the axis on its input dimension."""
        for reader in self.readers:
            for part in axis.slices:
                if (part.parameter, part.dim) == (reader.parameter, reader.in_dim):
                    yield reader, part


def evaluate(size: Polynomial, lengths: Mapping[str, float]) -> float:
    """Value of a polynomial at the given axis lengths (units in each group, for grouped axes)."""
    return sum(coefficient * prod(lengths[name] for name in names) for names, coefficient in size.items())
