"""The parts of a model that hold weights, each alone: seen in one forward pass, made again in any size.

A leaf is made by copying its module with random weights of the shapes that the Space predicts, and it is called as
the model calls it, so that the same kernels run as in a model that was really cut.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm, conv, instancenorm
from torch.utils import _pytree as pytree

from secateur.cut.attributes import solve
from secateur.load.modeling_secateur import SizedAttention
from secateur.space import Parameter, Polynomial, Reader, Space, evaluate
from secateur.space.provenance import Attribute, attributes_in, holders, read, write
from secateur.space.types import SizeLiteral

_NONE: Polynomial = {(): 0}
_ONE: Polynomial = {(): 1}
_LAYER_NUMBERS = ("layer_idx", "layer_index", "layer_id")
_CHANNELS_SECOND = (batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Leaf:
    """A part of the model whose time is looked up by its shapes.

    Attributes:
        module: Path in the dense model.
        block: The droppable block that takes it along: a sub-layer rather than its layer; None where none does.
        axes: Names of the axes that its time depends on.
    """

    module: str
    block: str | None
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Floats:
    """A floating-point tensor of a call; its values do not matter."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    given: Any
    """(args, kwargs), with `Floats` in the place of floating-point tensors."""
    elements: int
    """Numbers that it returned."""


@dataclass(frozen=True)
class Operator:
    """A leaf, and all that is needed to make it again."""

    leaf: Leaf
    home: str | None
    """The innermost block whose module it lies in; of a norm before a sub-layer that is the layer."""
    module: nn.Module
    tensors: tuple[tuple[str, Parameter], ...]
    """Its parameters and buffers by their names in the module; the Space knows their shapes."""
    sizes: tuple[SizeLiteral, ...]
    columns: Polynomial
    """Length of the input's dimension that meets the weights."""
    rows: Polynomial
    """Length of the output's dimension that comes of them."""
    experts: Polynomial | None
    """How many there are of them, where it is a mixture."""
    heads: tuple[str, ...]
    """Those of its axes that count heads."""
    calls: tuple[Call, ...]
    whole: Mapping[str, int]
    """Lengths of all axes in the dense model."""

    def signature(self, at: Mapping[str, int]) -> str:
        """What its time depends on, in words: class, shapes and types of tensors and inputs, other attributes."""
        kind = type(self.module)
        named = kind.__name__ if kind.__module__.startswith("torch.nn.") else f"{kind.__module__}.{kind.__qualname__}"
        pairs = zip(self.tensors, self.shapes(at), strict=True)
        tensors = [f"{name}={_spelled(shape, parameter.dtype)}" for (name, parameter), shape in pairs]
        sizes = {n for _, parameter in self.tensors for n in parameter.shape}  # said by the shapes, so not said again
        followed = {a.name: str(value) for a, value in self.attributes(at).items() if a.item is None}
        others = {
            key: str(value)
            for key, value in sorted(vars(self.module).items())
            if key[0] != "_" and key not in ("training", *_LAYER_NUMBERS) and _plain(value) and value not in sizes
        }
        attributes = [f"{key}={value}" for key, value in {**others, **followed}.items()]
        calls = [" ".join(_words(self.given(call, at))) for call in self.calls]
        return " | ".join([named, " ".join(tensors), " ".join(attributes), *calls])

    def shapes(self, at: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Shapes of `tensors` at lengths of axes."""
        return [tuple(int(evaluate(dim, at)) for dim in parameter.dims) for _, parameter in self.tensors]

    def given(self, call: Call, at: Mapping[str, int]) -> Any:
        """The arguments of a call at these lengths, still without values."""
        old, new = (int(evaluate(self.columns, lengths)) for lengths in (self.whole, at))
        spatial = len(self.module.kernel_size) if isinstance(self.module, conv._ConvNd) else 0
        place = -spatial - 1 if not isinstance(self.module, _CHANNELS_SECOND) else 1

        def smaller(x: Any) -> Any:
            if not isinstance(x, Floats) or old not in x.shape:
                return x
            fits = -len(x.shape) <= place < len(x.shape) and x.shape[place] == old
            dim = place % len(x.shape) if fits else x.shape.index(old)
            return Floats((*x.shape[:dim], new, *x.shape[dim + 1 :]), x.dtype)

        return pytree.tree_map(smaller, call.given)

    def attributes(self, at: Mapping[str, int]) -> dict[Attribute, int]:
        """Whole numbers of its modules that the forward pass takes for sizes -> what they are at these lengths."""
        owners = {(path, is_config): holder for path, holder, is_config in holders(self.module)}
        start = self.leaf.module
        new: dict[Attribute, int] = {}
        later: list[SizeLiteral] = []
        for literal in self.sizes:
            if isinstance(literal.source, Attribute):
                new[literal.source] = int(evaluate(literal.size, at))
            elif literal.source is not None:
                later.append(literal)
        known = [a for x in later for a in attributes_in(x.source) if _owner(a, start) in owners]
        old = {a: read(owners[_owner(a, start)], a) for a in known if a.name in vars(owners[_owner(a, start)])}
        for literal in later:
            if all(a in old or a in new for a in attributes_in(literal.source)):
                solve(literal.source, int(evaluate(literal.size, at)), literal.size, old, new, self.whole)  # type: ignore[arg-type]
        return {a: value for a, value in new.items() if _owner(a, start) in owners}

    def make(self, at: Mapping[str, int], device: torch.device, generator: torch.Generator) -> nn.Module:
        """A copy in evaluation mode with random weights of the shapes at these lengths."""
        memo: dict[int, Any] = {}
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        for (name, _), shape in zip(self.tensors, self.shapes(at), strict=True):
            values = _random(shape, own[name].dtype, device, generator)
            memo[id(own[name])] = nn.Parameter(values, False) if isinstance(own[name], nn.Parameter) else values
        new = copy.deepcopy(self.module, memo)
        if isinstance(new, nn.MultiheadAttention):
            return (new if self.shapes(at) == self.shapes(self.whole) else self._sized(new, at)).eval()
        owners = {(path, is_config): holder for path, holder, is_config in holders(new)}
        for attribute, value in self.attributes(at).items():
            holder = owners[_owner(attribute, self.leaf.module)]
            if attribute.name in vars(holder):
                write(holder, attribute, value)
        return new.eval()

    def _sized(self, new: nn.MultiheadAttention, at: Mapping[str, int]) -> nn.Module:
        """nn.MultiheadAttention has one number for its input and its heads: a cut replaces its class."""
        sized = SizedAttention.of(new)
        for name in self.heads:
            sized.num_heads = sized.num_heads * at[name] // self.whole[name]
        return sized

    def arguments(self, call: Call, at: Mapping[str, int], device: torch.device, generator: torch.Generator) -> Any:
        """(args, kwargs) of a call with values; tokens are shared out evenly among experts."""
        count = int(evaluate(self.experts, at)) if self.experts is not None else None

        def filled(x: Any) -> Any:
            if isinstance(x, Floats):
                return _random(x.shape, x.dtype, device, generator)
            if count is not None and isinstance(x, torch.Tensor) and x.dtype in (torch.int64, torch.int32):
                return (torch.arange(x.numel(), device=x.device) % count).to(x.dtype).reshape(x.shape)
            return x

        return pytree.tree_map(filled, self.given(call, at))

    def weight_bytes(self, at: Mapping[str, int]) -> int:
        """Bytes of its tensors."""
        sizes = zip(self.tensors, self.shapes(at), strict=True)
        return sum(torch.Size(shape).numel() * parameter.dtype.itemsize for (_, parameter), shape in sizes)

    def elements(self, at: Mapping[str, int]) -> float:
        """Numbers that all calls together return."""
        dense = evaluate(self.rows, self.whole)
        return sum(call.elements for call in self.calls) * (evaluate(self.rows, at) / dense if dense else 1.0)


@dataclass
class Seen:
    """What one forward pass did, by module."""

    calls: dict[str, list[Call]]
    arguments: dict[str, tuple[Any, Any]]
    """Real arguments of the first call of each module that was asked for."""


@torch.no_grad()
def watch(model: nn.Module, run: Callable[[], Any], keep: Iterable[str] = ()) -> Seen:
    """Run the model once; note how its modules are called.

    Args:
        model: any module.
        run: one forward pass of it.
        keep: modules whose real arguments are kept.
    """
    seen, kept = Seen({}, {}), set(keep)

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)]
            elements = sum(x.numel() for x in tensors if x.is_floating_point())
            seen.calls.setdefault(path, []).append(Call(pytree.tree_map(_hollow, (args, kwargs)), elements))
            if path in kept:
                seen.arguments.setdefault(path, (args, kwargs))

        return note

    hooks = [m.register_forward_hook(hook(path), with_kwargs=True) for path, m in model.named_modules()]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def operators(model: nn.Module, space: Space, seen: Seen, whole: Mapping[str, int]) -> list[Operator]:
    """The leaves: modules that were called and hold parameters, none of which lies in a module that was called too."""
    modules = dict(model.named_modules())
    holding = [p for p in seen.calls if p and any(True for _ in modules[p].parameters())]
    inner = {above for path in holding for above in _above(path)}
    names = {id(t): n for n, t in [*model.named_buffers(), *model.named_parameters()]}
    found = []
    for path in holding:
        if path not in inner:
            found.append(_operator(path, modules[path], space, seen, names, whole))
    return found


def _operator(
    path: str, module: nn.Module, space: Space, seen: Seen, names: Mapping[int, str], whole: Mapping[str, int]
) -> Operator:
    own = [*module.named_parameters(), *module.named_buffers()]
    known = [(name, names.get(id(tensor), "")) for name, tensor in own]
    tensors = tuple((n, space.tensor(c)) for n, c in known if c in space.parameters or c in space.buffers)
    inside = f"{path}."
    readers = [r for r in space.readers if f"{r.module}.".startswith(inside) and r.parameter in space.parameters]
    sizes = tuple(x for x in space.literals if f"{x.module}.".startswith(inside) and x.source is not None)
    columns, rows = _ends(module, space, readers, tensors, sizes)
    router = next((r for r in space.routers if f"{r.module}.".startswith(inside)), None)
    experts: Polynomial | None = {(router.axis,): 1} if router is not None else None
    polynomials = [dim for _, parameter in tensors for dim in parameter.dims]
    used = {axis for p in (*polynomials, columns, rows, *(x.size for x in sizes)) for names_ in p for axis in names_}
    homes = [b.name for b in space.blocks if path.startswith(f"{b.name}.") or path == b.name]
    idle = [b.name for b in space.blocks if path in b.idle]
    home = max(homes, key=len, default=None)
    leaf = Leaf(path, idle[0] if idle else home, tuple(sorted(used)))
    heads = tuple(axis.name for axis in space.axes if axis.kind == "heads" and axis.name in used)
    calls = tuple(seen.calls[path])
    return Operator(leaf, home, module, tensors, sizes, columns, rows, experts, heads, calls, whole)


def _ends(
    module: nn.Module,
    space: Space,
    readers: Sequence[Reader],
    tensors: Sequence[tuple[str, Parameter]],
    sizes: Sequence[SizeLiteral],
) -> tuple[Polynomial, Polynomial]:
    """Lengths of what goes in and of what comes out."""
    if isinstance(module, conv._ConvNd):
        first, second, *_ = dict(tensors)["weight"].dims
        groups: Polynomial = {(): module.groups}
        for literal in sizes:
            if isinstance(literal.source, Attribute) and literal.source.name == "groups":
                groups = literal.size
        inner = _product(second, groups)
        return (first, inner) if module.transposed else (inner, first)
    if readers:
        first_of, last = (space.parameters[r.parameter].dims for r in (readers[0], readers[-1]))
        out = readers[-1].out_dim
        return first_of[readers[0].in_dim], _ONE if out is None else last[out]
    dims = (tensors[0][1].dims if tensors else ()) or (_ONE,)
    return (_NONE, dims[-1]) if isinstance(module, nn.Embedding) else (dims[0], dims[0])


def _product(a: Polynomial, b: Polynomial) -> Polynomial:
    found: dict[tuple[str, ...], float] = {}
    for x, m in a.items():
        for y, n in b.items():
            key = tuple(sorted(x + y))
            found[key] = found.get(key, 0) + m * n
    return found


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _owner(attribute: Attribute, start: str) -> tuple[str, bool]:
    """Where a leaf's own copy keeps it: paths of modules begin at the leaf, and it has its part of the config."""
    if attribute.is_config:
        return "config", True
    inside = attribute.owner == start or attribute.owner.startswith(f"{start}.")
    return (attribute.owner[len(start) + 1 :] if inside else "\0", False)


def _hollow(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return Floats(tuple(x.shape), x.dtype) if x.is_floating_point() else x.detach()
    return x


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Any:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    # Positive, as a running variance must be; small, so that nothing overflows in half precision.
    return torch.rand(shape, generator=generator, device=device).mul_(0.1).to(dtype)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(x, int | float | str | bool) for x in value)
    return isinstance(value, int | float | str | bool)


def _words(given: Any) -> Iterator[str]:
    for x in pytree.tree_leaves(given):
        if isinstance(x, Floats | torch.Tensor):
            yield _spelled(tuple(x.shape), x.dtype)


def _spelled(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, shape))}:{str(dtype).removeprefix('torch.')}"
