"""Rules of look-ups, selections and reductions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from secateur.space.dims import Term, add_role, freeze, is_live, narrow, resolve, size_of, unify
from secateur.space.flow import Flow, Value, module_of, op_name, shape_of
from secateur.space.rules.base import axis_of, const, fixed, freeze_all, need_zeros, one, unknown, where
from secateur.space.rules.shape import elementwise

# --- look-ups ---


def embedding(_: Flow, node: fx.Node, table: Value, indices: Value, *__: Any) -> Value:
    """A look-up: the indexed dimension is frozen, the rest passes."""
    freeze(table.dims[0], f"{where(node)}: looked up by number")
    return Value((*indices.dims, *table.dims[1:]))


def embedding_bag(_: Flow, node: fx.Node, table: Value, *__: Any) -> Any:
    """A look-up whose results are summed."""
    freeze(table.dims[0], f"{where(node)}: looked up by number")
    first, *rest = const(node)
    return [Value((first.dims[0], table.dims[1])), *rest]


def index(flow: Flow, node: fx.Node, x: Value, indices: Sequence[Value | None], *_: Any) -> Value:
    """``x[i, :, j]``: dimensions that are indexed are frozen (but experts may be), the others pass."""
    shape = shape_of(node.meta["val"])
    if any(i is not None and _is_mask(node, n) for n, i in enumerate(indices)):
        return unknown(flow, node, x)
    taken = [n for n, i in enumerate(indices) if i is not None]
    if len(taken) == 1 and (found := _literal_run(flow, node, taken[0])) is not None:
        part = narrow(x.dims[taken[0]], found[0], found[1], f"{where(node)}: a part across its units")
        return Value((*x.dims[: taken[0]], part, *x.dims[taken[0] + 1 :]))
    for n in taken:
        look_up(flow, node, x.dims[n], indices[n])
    count = len(shape) - (len(x.dims) - len(taken))
    selected = tuple(fixed(node, n) for n in _broadcast_shape([v for v in indices if v is not None]))
    if len(selected) != count:
        return unknown(flow, node, x)
    place = taken[0] if taken == list(range(taken[0], taken[0] + len(taken))) else 0
    rest = [d for n, d in enumerate(x.dims) if n not in taken]
    return Value((*rest[:place], *selected, *rest[place:]))


def look_up(flow: Flow, node: fx.Node, term: Term, numbers: Value | None) -> None:
    """A dimension is indexed by number: it stays whole, unless the numbers are a router's choice of its units."""
    flow.hold(term, f"{where(node)}: looked up by number")
    if numbers is not None and numbers.numbers is not None:
        unify(term, numbers.numbers, f"{where(node)}: chosen among others")


def _literal_run(flow: Flow, node: fx.Node, place: int) -> tuple[int, int] | None:
    """(start, stop) where the index is written out in the code and names neighbours in order (``x[:, [-2]]``)."""
    given = node.args[1][place]  # type: ignore[index]
    if not isinstance(given, fx.Node):
        return None
    source = given
    while op_name(source) in ("aten.to", "aten.lift_fresh_copy", "aten.clone", "aten.detach") and source.args:
        source = source.args[0]  # type: ignore[assignment]
    tensor = flow.constants.get(source)
    if tensor is None or tensor.dim() != 1 or tensor.is_meta:
        return None
    size = shape_of(node.args[0].meta["val"])[place]  # type: ignore[union-attr]
    numbers = [int(n) % size for n in tensor.tolist()]
    return (numbers[0], numbers[-1] + 1) if numbers == list(range(numbers[0], numbers[-1] + 1)) else None


def _is_mask(node: fx.Node, number: int) -> bool:
    given = node.args[1][number]  # type: ignore[index]
    return isinstance(given, fx.Node) and given.meta["val"].dtype in (torch.bool, torch.uint8)


def _broadcast_shape(values: Sequence[Value]) -> list[int]:
    rank = max(len(v.dims) for v in values)
    sizes = [[1] * (rank - len(v.dims)) + [size_of(d) for d in v.dims] for v in values]
    return [max(column) for column in zip(*sizes, strict=True)]


def index_put(flow: Flow, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value, *_: Any) -> Value:
    """``x[i] = values``: as `index`, and the values go with what they are written to."""
    taken = [n for n, i in enumerate(indices) if i is not None]
    for n in taken:
        flow.hold(x.dims[n], f"{where(node)}: written to by number")
    if any(_is_mask(node, n) for n in taken) or len(taken) != 1 or taken[0] != 0:
        return unknown(flow, node, x, values)
    for own, other in zip(reversed(x.dims[1:]), reversed(values.dims), strict=False):
        if size_of(other) != 1:
            unify(own, other, f"{where(node)}: written to something that cannot be cut alike")
    return Value(tuple(resolve(d) for d in x.dims))


def index_select(flow: Flow, node: fx.Node, x: Value, dim: int, indices: Value) -> Value:
    """Units of one dimension, by number."""
    axis = axis_of(dim, len(x.dims))
    look_up(flow, node, x.dims[axis], indices)
    return Value((*x.dims[:axis], *indices.dims, *x.dims[axis + 1 :]))


def gather(flow: Flow, node: fx.Node, x: Value, dim: int, indices: Value, *_: Any, **__: Any) -> Value:
    """For each position, one unit of a dimension by number; the other dimensions are those of the indices."""
    axis = axis_of(dim, len(x.dims))
    dims: list[Term] = []
    for i, (own, other) in enumerate(zip(x.dims, indices.dims, strict=True)):
        if i == axis:
            look_up(flow, node, own, indices)
        elif size_of(own) == size_of(other):
            unify(own, other, f"{where(node)}: its indices cannot be cut alike")
        else:
            freeze(own, f"{where(node)}: taken in part")
        dims.append(resolve(other))
    return Value(tuple(dims))


def scatter(
    flow: Flow, node: fx.Node, x: Value, dim: int, indices: Value, source: Any = None, *_: Any, **__: Any
) -> Value:
    """Writes at positions of one dimension; the others are those of the indices."""
    axis = axis_of(dim, len(x.dims))
    flow.hold(x.dims[axis], f"{where(node)}: written to by number")
    for other in (v for v in (indices, source) if isinstance(v, Value)):
        for i, (a, b) in enumerate(zip(x.dims, other.dims, strict=True)):
            if i != axis and size_of(a) == size_of(b):
                unify(a, b, f"{where(node)}: written to something that cannot be cut alike")
            elif i != axis:
                freeze(a, f"{where(node)}: written to in part")
    return Value(tuple(resolve(d) for d in x.dims))


def index_add(flow: Flow, node: fx.Node, x: Value, dim: int, _: Value, source: Value, **__: Any) -> Value:
    """Rows are added at positions of one dimension; the others are equal."""
    axis = axis_of(dim, len(x.dims))
    freeze(x.dims[axis], f"{where(node)}: written to by number")
    for i, (a, b) in enumerate(zip(x.dims, source.dims, strict=True)):
        if i != axis:
            unify(a, b, f"{where(node)}: added to something that cannot be cut alike")
    return Value(tuple(resolve(d) for d in x.dims))


def masked_scatter(_: Flow, node: fx.Node, x: Value, mask: Value, source: Value) -> Value:
    """Fills positions in order. Whole rows, where the mask is the same along the last dimension."""
    last = mask.dims[-1]
    rows = size_of(last) == 1 or all(getattr(leaf, "tile", False) for leaf in [resolve(last)])
    if not rows or size_of(x.dims[-1]) != size_of(source.dims[-1]):
        freeze_all([*x.dims, *source.dims], f"{where(node)}: filled in an order that a cut would change")
        return Value(tuple(resolve(d) for d in x.dims))
    unify(x.dims[-1], source.dims[-1], f"{where(node)}: filled from something that cannot be cut alike")
    unify(x.dims[-1], last, where(node))
    freeze_all([*x.dims[:-1], *source.dims[:-1]], f"{where(node)}: filled in order")
    return Value(tuple(resolve(d) for d in x.dims))


# --- order ---


def topk(flow: Flow, node: fx.Node, x: Value, k: int, dim: int = -1, *_: Any) -> list[Value]:
    """The k largest: every unit competes with every other (experts may go, but k must stay)."""
    axis = axis_of(dim, len(x.dims))
    flow.hold(x.dims[axis], f"{where(node)}: every unit competes with every other", k)
    picked = Value((*x.dims[:axis], fixed(node, k), *x.dims[axis + 1 :]))
    return [picked, replace(picked, numbers=x.dims[axis])]


def coupled(flow: Flow, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Any:
    """sort, argmax, max with indices, logsumexp...: the dimension named stays whole, the others pass."""
    if args and isinstance(args[0], Value):  # the larger of two tensors, element by element
        return elementwise(flow, node, x, *args)
    rank = len(x.dims)
    given = args[0] if args else kwargs.get("dim")
    if op_name(node) in ("aten.sort", "aten.argsort") and given is None:
        given = -1
    if isinstance(given, bool) and op_name(node) == "aten.sort":
        given = kwargs.get("dim", -1)
    axes = range(rank) if given is None else [given] if isinstance(given, int) else given
    reduced = {axis_of(i, rank) for i in axes}
    for i in reduced:
        flow.hold(x.dims[i], f"{where(node)}: every unit depends on every other")

    def result(meta: Any) -> Value:
        shape = shape_of(meta)
        if len(shape) == rank:
            return Value(tuple(d if i not in reduced else fixed(node, shape[i]) for i, d in enumerate(x.dims)))
        return Value(tuple(d for i, d in enumerate(x.dims) if i not in reduced))

    metas = node.meta["val"]
    return [result(m) for m in metas] if isinstance(metas, list | tuple) else result(metas)


def cumulate(flow: Flow, node: fx.Node, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """A running sum, over time in a state-space scan: what is summed for each head apart is a head of it."""
    axis = axis_of(dim, len(x.dims))
    flow.hold(x.dims[axis], f"{where(node)}: every unit depends on those before")
    for i, other in enumerate(x.dims):
        if i != axis and is_live(other):
            add_role(other, "ssm_heads")
    return x


# --- reductions ---


def mean(flow: Flow, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Any:
    """A mean over a live dimension is a normalisation's statistic: cutting the axis changes it."""
    axes = range(len(x.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    reduced = {axis_of(i, len(x.dims)) for i in axes}
    if sum(is_live(x.dims[i]) for i in reduced) > 1 and len(reduced) == len(x.dims):
        freeze_all(x.dims, f"{where(node)}: a statistic of the whole tensor")
    for i in reduced:
        need_zeros(node, x.dims[i], x)
        if is_live(x.dims[i]):
            flow.norms.append((module_of(node), x.dims[i]))
    return _without(node, x, reduced)


def total(flow: Flow, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Any:
    """A sum: what is gone adds nothing."""
    axes = range(len(x.dims)) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    for i in axes:
        need_zeros(node, x.dims[i], x)
    return _without(node, x, {axis_of(i, len(x.dims)) for i in axes})


def norm(flow: Flow, node: fx.Node, x: Value, _: Any = 2, dim: Any = None, *__: Any, **___: Any) -> Any:
    """A vector norm: what is gone adds nothing, but what divides by it sees another statistic."""
    return mean(flow, node, x, dim)


def variance(flow: Flow, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Any:
    """var, std, var_mean: a statistic of what is left."""
    return mean(flow, node, x, None if isinstance(dim, bool) else dim)


def _without(node: fx.Node, x: Value, reduced: set[int]) -> Any:
    meta = node.meta["val"]
    several = isinstance(meta, list | tuple)
    kept = len(shape_of(meta[0] if several else meta)) == len(x.dims)
    value = Value(tuple(one(node) if i in reduced else d for i, d in enumerate(x.dims) if kept or i not in reduced))
    return [value for _ in meta] if several else value
