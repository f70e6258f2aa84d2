"""Rules of what moves, joins and splits dimensions, or leaves them as they are."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from secateur.space.dims import (
    Term,
    Var,
    align,
    concat,
    freeze,
    narrow,
    product,
    resolve,
    size_of,
    unify,
)
from secateur.space.flow import Flow, Value, op_name, shape_of
from secateur.space.rules.base import axis_of, one, unknown, where


def elementwise(_: Flow, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Add, mul, where...: dimensions are equal; a dimension of one unit broadcasts freely."""
    shape = shape_of(node.meta["val"])
    dims: list[Term | None] = [None] * len(shape)
    for value in (a for a in (*args, *kwargs.values()) if isinstance(a, Value)):
        offset = len(shape) - len(value.dims)
        for i, dim in enumerate(value.dims):
            if size_of(dim) == 1 and shape[offset + i] != 1:
                continue
            known = dims[offset + i]
            if known is None:
                dims[offset + i] = dim
            else:
                unify(known, dim, f"{where(node)}: combined with something that cannot be cut alike")
    return Value(tuple(resolve(d) if d is not None else one(node) for d in dims))


def same(_: Flow, __: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Casts, copies, dropout, zeros_like: the dimensions stay."""
    return x


def view(flow: Flow, node: fx.Node, x: Value, *_: Any) -> Value:
    """Reshape: left-to-right matching of products splits or merges dimensions."""
    shape = shape_of(node.meta["val"])
    if shape == tuple(size_of(d) for d in x.dims):
        dims: tuple[Term, ...] = x.dims
    else:
        fresh = tuple(Var(n) if n != 1 else one(node) for n in shape)
        align(x.dims, fresh, f"{where(node)}: mixes dimensions that do not line up")
        dims = tuple(resolve(d) for d in fresh)
    target = node.args[1] if len(node.args) > 1 else ()
    if op_name(node) in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand") and isinstance(target, list):
        flow.note_literals(node, target, dims)
    if op_name(node) == "aten.unflatten" and isinstance(node.args[2], list | tuple):
        axis, count = axis_of(int(str(node.args[1])), len(x.dims)), len(node.args[2])
        flow.note_literals(node, node.args[2], dims[axis : axis + count])
    return Value(dims)


def permute(_: Flow, __: fx.Node, x: Value, order: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return _pick(x, [axis_of(i, len(x.dims)) for i in order])


def transpose(_: Flow, __: fx.Node, x: Value, a: int = 0, b: int = 1) -> Value:
    """Two dimensions change places (``t`` too)."""
    order = list(range(len(x.dims)))
    if order:
        a, b = axis_of(a, len(order)), axis_of(b, len(order))
        order[a], order[b] = order[b], order[a]
    return _pick(x, order)


def _pick(x: Value, order: Sequence[int]) -> Value:
    source = None
    if x.source is not None:
        source = x.source[0], tuple(x.source[1][i] for i in order)
    return Value(tuple(x.dims[i] for i in order), source)


def unsqueeze(_: Flow, node: fx.Node, x: Value, dim: int) -> Value:
    """A dimension of one unit comes in."""
    axis = axis_of(dim, len(x.dims) + 1)
    source = x.source and (x.source[0], (*x.source[1][:axis], None, *x.source[1][axis:]))
    return Value((*x.dims[:axis], one(node), *x.dims[axis:]), source)


def squeeze(_: Flow, node: fx.Node, x: Value, *__: Any) -> Value:
    """Dimensions of one unit go."""
    shape = shape_of(node.meta["val"])
    kept: list[int] = []
    for i, dim in enumerate(x.dims):
        rest = [size_of(d) for d in x.dims[i + 1 :]]
        if (
            len(kept) < len(shape)
            and size_of(dim) == shape[len(kept)]
            and (size_of(dim) != 1 or _fits(rest, shape[len(kept) + 1 :]))
        ):
            kept.append(i)
    source = x.source and (x.source[0], tuple(x.source[1][i] for i in kept))
    return Value(tuple(x.dims[i] for i in kept), source)


def _fits(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether dropping ones makes `shape` of `sizes`."""
    return [n for n in sizes if n != 1] == [n for n in shape if n != 1] and len(sizes) >= len(shape)


def expand(flow: Flow, node: fx.Node, x: Value, sizes: Sequence[Any] | Value, **_: Any) -> Value:
    """A dimension of one unit is repeated: its copies may be cut freely, as far as this tensor goes."""
    shape = shape_of(node.meta["val"])
    offset = len(shape) - len(x.dims)
    dims: list[Term] = []
    for i, n in enumerate(shape):
        dim = x.dims[i - offset] if i >= offset else None
        dims.append(dim if dim is not None and size_of(dim) == n else Var(n, tile=True))
    if not isinstance(sizes, Value):  # expand_as takes its sizes from a tensor
        flow.note_literals(node, list(sizes), dims)
    return Value(tuple(dims))


def repeat_interleave(flow: Flow, node: fx.Node, x: Value, repeats: Any, dim: int | None = None, **__: Any) -> Value:
    """Each unit `repeats` times in a row."""
    if dim is None or not isinstance(repeats, int):
        return unknown(flow, node, x)
    axis = axis_of(dim, len(x.dims))
    tile = Var(repeats, tile=True)
    flow.note_literals(node, [repeats], [tile])
    return Value((*x.dims[:axis], product([x.dims[axis], tile]), *x.dims[axis + 1 :]))


def repeat(flow: Flow, node: fx.Node, x: Value, repeats: Sequence[int]) -> Value:
    """The whole dimension `repeats` times in a row."""
    repeats = [1] * (len(x.dims) - len(repeats)) + list(repeats)
    offset = len(repeats) - len(x.dims)
    tiles = [Var(n, tile=True) for n in repeats]
    flow.note_literals(node, repeats, tiles)
    inner = [[x.dims[i - offset]] if i >= offset else [] for i in range(len(repeats))]
    return Value(tuple(product([tile, *rest]) for tile, rest in zip(tiles, inner, strict=True)))


def cat(_: Flow, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Segments one after the other; the other dimensions are equal."""
    tensors = [t for t in tensors if [size_of(d) for d in t.dims] != [0]] or tensors[:1]  # empty ones of any rank pass
    axis = axis_of(dim, len(tensors[0].dims))
    first = tensors[0]
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(first.dims, other.dims, strict=True)):
            if i != axis:
                unify(a, b, f"{where(node)}: concatenated with something that cannot be cut alike")
    joined = concat([t.dims[axis] for t in tensors])
    return Value(tuple(joined if i == axis else resolve(d) for i, d in enumerate(first.dims)))


def stack(_: Flow, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    """A new dimension, frozen; the others are equal."""
    first = tensors[0]
    for other in tensors[1:]:
        for a, b in zip(first.dims, other.dims, strict=True):
            unify(a, b, f"{where(node)}: stacked with something that cannot be cut alike")
    axis = axis_of(dim, len(first.dims) + 1)
    new = Var(len(tensors), frozen=f"{where(node)}: a stack")
    return Value((*first.dims[:axis], new, *first.dims[axis:]))


def slice_(flow: Flow, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``x[start:end]``: a segment; with a step, frozen."""
    axis = axis_of(dim, len(x.dims))
    old, new = size_of(x.dims[axis]), shape_of(node.meta["val"])[axis]
    if step != 1:
        reason = f"{where(node)}: every {step}th unit"
        part: Term = Var(new)
        if old % step == 0 and new == old // step:  # interleaved: [n, step]
            align([x.dims[axis]], [part, Var(step, frozen=reason)], reason)
            part = resolve(part)
        else:
            freeze(x.dims[axis], reason)
            freeze(part, reason)
    else:
        first = start if isinstance(start, int) else 0
        first = max(first + old, 0) if first < 0 else min(first, old)
        part = narrow(x.dims[axis], first, first + new, f"{where(node)}: a slice across its units")
        ends = [n for n in (start, end) if isinstance(n, int) and 0 < n < old]
        flow.note_literals(node, ends, [narrow(x.dims[axis], 0, n, where(node)) for n in ends])
    return Value((*x.dims[:axis], part, *x.dims[axis + 1 :]))


def split_(flow: Flow, node: fx.Node, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    """``split``, ``chunk``, ``split_with_sizes``: segments."""
    axis = axis_of(dim, len(x.dims))
    parts: list[Value] = []
    start = 0
    for piece in node.meta["val"]:
        width = shape_of(piece)[axis]
        term = narrow(x.dims[axis], start, start + width, f"{where(node)}: a split across its units")
        parts.append(Value((*x.dims[:axis], term, *x.dims[axis + 1 :])))
        start += width
    if op_name(node) != "aten.split_with_sizes":  # code asks for equal parts, and would get others than before
        for part in parts[1:]:
            unify(parts[0].dims[axis], part.dims[axis], f"{where(node)}: its parts cannot be cut alike")
        parts = [Value((*p.dims[:axis], resolve(p.dims[axis]), *p.dims[axis + 1 :])) for p in parts]
    if op_name(node) == "aten.split":
        numbers = [sizes] * len(parts)
    elif op_name(node) == "aten.split_with_sizes":
        numbers = list(sizes)
    else:
        return parts
    flow.note_literals(node, numbers, [p.dims[axis] for p in parts])
    return parts


def unbind(_: Flow, node: fx.Node, x: Value, dim: int = 0) -> list[Value]:
    """One tensor for each unit: frozen."""
    axis = axis_of(dim, len(x.dims))
    freeze(x.dims[axis], f"{where(node)}: its units are taken apart")
    rest = (*x.dims[:axis], *x.dims[axis + 1 :])
    return [Value(rest) for _unit in node.meta["val"]]


def select(_: Flow, node: fx.Node, x: Value, dim: int, __: Any) -> Value:
    """``x[:, i]``: the dimension that is indexed by number is frozen."""
    axis = axis_of(dim, len(x.dims))
    freeze(x.dims[axis], f"{where(node)}: one of its units is picked by number")
    return Value((*x.dims[:axis], *x.dims[axis + 1 :]))


def movedim(_: Flow, node: fx.Node, x: Value, source: Any, target: Any) -> Value:
    """Some dimensions go elsewhere, the others keep their order."""
    rank = len(x.dims)
    moved = [axis_of(i, rank) for i in ([source] if isinstance(source, int) else source)]
    places = [axis_of(i, rank) for i in ([target] if isinstance(target, int) else target)]
    rest = iter(i for i in range(rank) if i not in moved)
    return _pick(x, [moved[places.index(i)] if i in places else next(rest) for i in range(rank)])


def roll(_: Flow, node: fx.Node, x: Value, *args: Any) -> Value:
    """Units of the dimensions named change places."""
    named = (
        args[1] if op_name(node) == "aten.roll" and len(args) > 1 else args[0] if op_name(node) == "aten.flip" else []
    )
    for i in named or range(len(x.dims)):
        freeze(x.dims[axis_of(i, len(x.dims))], f"{where(node)}: its units change places")
    return x


def triangle(_: Flow, node: fx.Node, x: Value, *__: Any) -> Value:
    """Part of the last two dimensions becomes zeros, by position."""
    for dim in x.dims[-2:]:
        freeze(dim, f"{where(node)}: depends on the position")
    return x


def copy_(flow: Flow, node: fx.Node, target: Value, source: Value, *_: Any) -> Value:
    """`source` is written into `target`."""
    elementwise(flow, node, target, source)
    return Value(tuple(resolve(d) for d in target.dims))


def fill_diagonal(_: Flow, node: fx.Node, x: Value, *__: Any) -> Value:
    """Depends on the position in every dimension."""
    for dim in x.dims:
        freeze(dim, f"{where(node)}: depends on the position")
    return x
