"""What each ATen operator says about the dimensions of its operands.

A rule takes the flow, the node and the node's arguments (tensors as `Value`) and returns the result's `Value`.
It is called only where some operand can still be cut. To support an operator, write its rule and add one line to
`RULES`; an operator without a rule freezes what it touches.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from secateur.space.dims import (
    Term,
    Var,
    add_role,
    align,
    concat,
    freeze,
    is_live,
    narrow,
    product,
    resolve,
    size_of,
    unify,
)
from secateur.space.flow import Attention, Flow, Literal, Read, Value, module_of, op_name, shape_of

Rule = Callable[..., Any]


def _where(node: fx.Node) -> str:
    return f"{op_name(node)} in {module_of(node) or 'the root module'}"


def _one(node: fx.Node) -> Var:
    return Var(1, frozen=f"one unit, {_where(node)}")


def _dim(index: int, rank: int) -> int:
    return index % rank if rank else 0


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
                unify(known, dim, f"{_where(node)}: combined with something that cannot be cut alike")
    return Value(tuple(resolve(d) if d is not None else _one(node) for d in dims))


def same(_: Flow, __: fx.Node, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Casts, copies, dropout, zeros_like: the dimensions stay."""
    return x


def linear(flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x @ weight.T + bias``."""
    unify(x.dims[-1], weight.dims[1], f"{_where(node)}: its input cannot be cut")
    if bias is not None:
        unify(bias.dims[0], weight.dims[0], f"{_where(node)}: its bias cannot be cut")
    _note_read(flow, node, weight, 1, 0)
    return Value((*x.dims[:-1], resolve(weight.dims[0])))


def addmm(flow: Flow, node: fx.Node, bias: Value, x: Value, weight: Value, **_: Any) -> Value:
    """``bias + x @ weight``: Conv1D of Hugging Face keeps its weight as [in, out]."""
    result = matmul(flow, node, x, weight)
    unify(bias.dims[-1], result.dims[-1], f"{_where(node)}: its bias cannot be cut")
    return result


def _note_read(flow: Flow, node: fx.Node, weight: Value, in_dim: int, out_dim: int | None) -> None:
    if weight.source is None:
        return
    name, behind = weight.source
    stored_in = behind[in_dim]
    if stored_in is not None:
        flow.reads.append(Read(name, stored_in, None if out_dim is None else behind[out_dim], module_of(node)))


def matmul(flow: Flow, node: fx.Node, a: Value, b: Value) -> Value:
    """Batched matrix product: the contracted dimensions are equal, and so are the batch dimensions."""
    if len(a.dims) < 2 or len(b.dims) < 2:
        for dim in (*a.dims, *b.dims):
            freeze(dim, f"{_where(node)}: a vector product")
        return _const(node)
    unify(a.dims[-1], b.dims[-2], f"{_where(node)}: its two sides cannot be cut alike")
    if b.source is not None:
        _note_read(flow, node, b, len(b.dims) - 2, len(b.dims) - 1)
    elif a.source is None:
        # Two activations: attention. The scores contract the head dimension, the mix keeps it.
        for dim in (a.dims[-1], b.dims[-2], b.dims[-1]):
            add_role(dim, "head_dim")
        _note_attention(flow, node, a, b)
    batch: list[Term] = []
    rank = max(len(a.dims), len(b.dims))
    for i in range(rank - 2):
        pair = [v.dims[i - rank + len(v.dims)] for v in (a, b) if i - rank + len(v.dims) >= 0]
        wide = [d for d in pair if size_of(d) != 1]
        for other in wide[1:]:
            unify(wide[0], other, f"{_where(node)}: its batch dimensions cannot be cut alike")
        batch.append(resolve(wide[0]) if wide else _one(node))
    return Value((*batch, resolve(a.dims[-2]), resolve(b.dims[-1])))


def attention(
    flow: Flow, node: fx.Node, query: Value, key: Value, value: Value, mask: Value | None = None, *_: Any, **kw: Any
) -> Value:
    """Scaled dot-product attention: [..., heads, positions, head_dim]."""
    mask = kw.get("attn_mask", mask)
    where = _where(node)
    if size_of(query.dims[-3]) != size_of(key.dims[-3]):
        # enable_gqa: each group of the keys serves the same number of query heads.
        tile = Var(size_of(query.dims[-3]) // size_of(key.dims[-3]), tile=True)
        grouped = product([key.dims[-3], tile])
        unify(query.dims[-3], grouped, f"{where}: heads")
        unify(key.dims[-3], value.dims[-3], f"{where}: heads")
    else:
        unify(query.dims[-3], key.dims[-3], f"{where}: heads")
        unify(query.dims[-3], value.dims[-3], f"{where}: heads")
    unify(query.dims[-1], key.dims[-1], f"{where}: head dimension")
    _join_head_dims(query.dims[-1], value.dims[-1])
    if kw.get("scale") is None:
        freeze(query.dims[-1], f"{where}: its scale follows the head dimension")
    heads = query.dims[-3]
    if mask is not None and len(mask.dims) >= 3 and size_of(mask.dims[-3]) != 1:
        unify(heads, mask.dims[-3], f"{where}: a mask for each head")
    add_role(heads, "heads")
    add_role(query.dims[-1], "head_dim")
    add_role(value.dims[-1], "head_dim")
    flow.attentions.append(Attention(module_of(node), heads, key.dims[-1], value.dims[-1]))
    return Value((*[resolve(d) for d in query.dims[:-1]], resolve(value.dims[-1])))


def _join_head_dims(key: Term, value: Term) -> None:
    """Mathematics would let values be narrower than keys, but model code reads one head_dim for both."""
    if size_of(key) == size_of(value):
        unify(key, value, "keys and values have one head dimension")


def softmax(_: Flow, node: fx.Node, x: Value, dim: int, *__: Any, **___: Any) -> Value:
    """Softmax couples all units of its dimension; in [batch, heads, queries, keys] the heads are free."""
    freeze(x.dims[_dim(dim, len(x.dims))], f"{_where(node)}: every unit depends on every other")
    if len(x.dims) == 4:
        add_role(x.dims[1], "heads")
    return x


def _behind(node: fx.Node, wanted: Sequence[str]) -> fx.Node | None:
    """The operator of a wanted name whose result, scaled, masked or cast, is the node's first argument."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if op_name(node) in wanted:
            return node
        if op_name(node) not in _PASSING:
            return None
    return None


def _note_attention(flow: Flow, node: fx.Node, probabilities: Value, value: Value) -> None:
    """Attention written out: softmax(query @ key.T) @ value."""
    softmax_node = _behind(node, ("aten.softmax", "aten._softmax"))
    scores = softmax_node and _behind(softmax_node, ("aten.matmul", "aten.bmm"))
    if scores is not None and len(probabilities.dims) == 4:
        key = flow.value(scores.args[1])
        _join_head_dims(key.dims[-2], value.dims[-1])
        flow.attentions.append(Attention(module_of(node), probabilities.dims[1], key.dims[-2], value.dims[-1]))


def layer_norm(
    flow: Flow, node: fx.Node, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    *_: Any,
) -> Value:  # fmt: skip
    """Layer and RMS norm over the last dimensions; parameters go with what is normalised."""
    if len(shape) != 1:
        for dim in x.dims[-len(shape) :]:
            freeze(dim, f"{_where(node)}: normalises several dimensions at once")
        return x
    for parameter in (weight, bias):
        if isinstance(parameter, Value):
            unify(x.dims[-1], parameter.dims[0], f"{_where(node)}: its parameters cannot be cut")
    flow.norms.append((module_of(node), x.dims[-1]))
    return Value(tuple(resolve(d) for d in x.dims))


def reduce_mean(flow: Flow, node: fx.Node, x: Value, dim: Any = None, *_: Any, **__: Any) -> Value:
    """A mean over a live dimension is a normalisation's statistic: cutting the axis changes it."""
    axes = range(len(x.dims)) if dim is None else [dim] if isinstance(dim, int) else dim
    reduced = {_dim(i, len(x.dims)) for i in axes}
    for i in reduced:
        if is_live(x.dims[i]):
            flow.norms.append((module_of(node), x.dims[i]))
    kept = len(shape_of(node.meta["val"])) == len(x.dims)
    return Value(tuple(_one(node) if i in reduced else d for i, d in enumerate(x.dims) if kept or i not in reduced))


def view(flow: Flow, node: fx.Node, x: Value, *_: Any) -> Value:
    """Reshape: left-to-right matching of products splits or merges dimensions."""
    shape = shape_of(node.meta["val"])
    if shape == tuple(size_of(d) for d in x.dims):
        dims: tuple[Term, ...] = x.dims
    else:
        fresh = tuple(Var(n) if n != 1 else _one(node) for n in shape)
        align(x.dims, fresh, f"{_where(node)}: mixes dimensions that do not line up")
        dims = tuple(resolve(d) for d in fresh)
    target = node.args[1] if len(node.args) > 1 else ()
    if op_name(node) in ("aten.view", "aten.reshape", "aten._unsafe_view", "aten.expand") and isinstance(target, list):
        _note_literals(flow, node, target, dims)
    return Value(dims)


def _note_literals(flow: Flow, node: fx.Node, numbers: Sequence[Any], terms: Sequence[Term]) -> None:
    for number, term in zip(numbers, terms, strict=True):
        if isinstance(number, int) and number > 1:
            flow.literals.append(Literal(module_of(node), number, term))


def permute(_: Flow, __: fx.Node, x: Value, order: Sequence[int]) -> Value:
    """Dimensions in another order."""
    return _pick(x, [_dim(i, len(x.dims)) for i in order])


def transpose(_: Flow, __: fx.Node, x: Value, a: int = 0, b: int = 1) -> Value:
    """Two dimensions change places (``t`` too)."""
    order = list(range(len(x.dims)))
    if order:
        a, b = _dim(a, len(order)), _dim(b, len(order))
        order[a], order[b] = order[b], order[a]
    return _pick(x, order)


def _pick(x: Value, order: Sequence[int]) -> Value:
    source = None
    if x.source is not None:
        source = x.source[0], tuple(x.source[1][i] for i in order)
    return Value(tuple(x.dims[i] for i in order), source)


def unsqueeze(_: Flow, node: fx.Node, x: Value, dim: int) -> Value:
    """A dimension of one unit comes in."""
    axis = _dim(dim, len(x.dims) + 1)
    return Value((*x.dims[:axis], _one(node), *x.dims[axis:]))


def squeeze(_: Flow, node: fx.Node, x: Value, *__: Any) -> Value:
    """Dimensions of one unit go."""
    shape = shape_of(node.meta["val"])
    kept = [d for d in x.dims if size_of(d) != 1]
    return Value(tuple(_one(node) if n == 1 else kept.pop(0) for n in shape))


def expand(flow: Flow, node: fx.Node, x: Value, sizes: Sequence[Any], **_: Any) -> Value:
    """A dimension of one unit is repeated: its copies may be cut freely, as far as this tensor goes."""
    shape = shape_of(node.meta["val"])
    offset = len(shape) - len(x.dims)
    dims: list[Term] = []
    for i, n in enumerate(shape):
        dim = x.dims[i - offset] if i >= offset else None
        dims.append(dim if dim is not None and size_of(dim) == n else Var(n, tile=True))
    _note_literals(flow, node, list(sizes), dims)
    return Value(tuple(dims))


def repeat_interleave(flow: Flow, node: fx.Node, x: Value, repeats: Any, dim: int | None = None, **__: Any) -> Value:
    """Each unit `repeats` times in a row."""
    if dim is None or not isinstance(repeats, int):
        return unknown(flow, node, x)
    axis = _dim(dim, len(x.dims))
    tile = Var(repeats, tile=True)
    _note_literals(flow, node, [repeats], [tile])
    return Value((*x.dims[:axis], product([x.dims[axis], tile]), *x.dims[axis + 1 :]))


def repeat(flow: Flow, node: fx.Node, x: Value, repeats: Sequence[int]) -> Value:
    """The whole dimension `repeats` times in a row."""
    offset = len(repeats) - len(x.dims)
    tiles = [Var(n, tile=True) for n in repeats]
    _note_literals(flow, node, repeats, tiles)
    inner = [[x.dims[i - offset]] if i >= offset else [] for i in range(len(repeats))]
    return Value(tuple(product([tile, *rest]) for tile, rest in zip(tiles, inner, strict=True)))


def cat(_: Flow, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    """Segments one after the other; the other dimensions are equal."""
    axis = _dim(dim, len(tensors[0].dims))
    first = tensors[0]
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(first.dims, other.dims, strict=True)):
            if i != axis:
                unify(a, b, f"{_where(node)}: concatenated with something that cannot be cut alike")
    joined = concat([t.dims[axis] for t in tensors])
    return Value(tuple(joined if i == axis else resolve(d) for i, d in enumerate(first.dims)))


def stack(_: Flow, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> Value:
    """A new dimension, frozen; the others are equal."""
    first = tensors[0]
    for other in tensors[1:]:
        for a, b in zip(first.dims, other.dims, strict=True):
            unify(a, b, f"{_where(node)}: stacked with something that cannot be cut alike")
    axis = _dim(dim, len(first.dims) + 1)
    new = Var(len(tensors), frozen=f"{_where(node)}: a stack")
    return Value((*first.dims[:axis], new, *first.dims[axis:]))


def slice_(flow: Flow, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """``x[start:end]``: a segment; with a step, frozen."""
    axis = _dim(dim, len(x.dims))
    old, new = size_of(x.dims[axis]), shape_of(node.meta["val"])[axis]
    if step != 1:
        freeze(x.dims[axis], f"{_where(node)}: every {step}th unit")
        part: Term = Var(new, frozen=f"{_where(node)}: every {step}th unit")
    else:
        first = start if isinstance(start, int) else 0
        first = max(first + old, 0) if first < 0 else min(first, old)
        part = narrow(x.dims[axis], first, first + new, f"{_where(node)}: a slice across its units")
        ends = [n for n in (start, end) if isinstance(n, int) and 0 < n < old]
        _note_literals(flow, node, ends, [narrow(x.dims[axis], 0, n, _where(node)) for n in ends])
    return Value((*x.dims[:axis], part, *x.dims[axis + 1 :]))


def split_(flow: Flow, node: fx.Node, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    """``split``, ``chunk``, ``split_with_sizes``: segments."""
    axis = _dim(dim, len(x.dims))
    parts: list[Value] = []
    start = 0
    for piece in node.meta["val"]:
        width = shape_of(piece)[axis]
        term = narrow(x.dims[axis], start, start + width, f"{_where(node)}: a split across its units")
        parts.append(Value((*x.dims[:axis], term, *x.dims[axis + 1 :])))
        start += width
    if op_name(node) == "aten.split":
        numbers = [sizes] * len(parts)
    elif op_name(node) == "aten.split_with_sizes":
        numbers = list(sizes)
    else:
        return parts
    _note_literals(flow, node, numbers, [p.dims[axis] for p in parts])
    return parts


def unbind(_: Flow, node: fx.Node, x: Value, dim: int = 0) -> list[Value]:
    """One tensor for each unit: frozen."""
    axis = _dim(dim, len(x.dims))
    freeze(x.dims[axis], f"{_where(node)}: its units are taken apart")
    rest = (*x.dims[:axis], *x.dims[axis + 1 :])
    return [Value(rest) for _unit in node.meta["val"]]


def select(_: Flow, node: fx.Node, x: Value, dim: int, __: Any) -> Value:
    """``x[:, i]``: the dimension that is indexed by number is frozen."""
    axis = _dim(dim, len(x.dims))
    freeze(x.dims[axis], f"{_where(node)}: one of its units is picked by number")
    return Value((*x.dims[:axis], *x.dims[axis + 1 :]))


def embedding(_: Flow, node: fx.Node, table: Value, indices: Value, *__: Any) -> Value:
    """A look-up: the indexed dimension is frozen, the rest passes."""
    freeze(table.dims[0], f"{_where(node)}: looked up by number")
    return Value((*indices.dims, *table.dims[1:]))


def unknown(_: Flow, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Freeze everything, and say so."""
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, list) else [value]:
            for dim in item.dims if isinstance(item, Value) else ():
                freeze(dim, f"{_where(node)}: cannot be followed with these arguments")
    return _const(node)


def _const(node: fx.Node) -> Value:
    return Value(tuple(Var(n, frozen=f"made by {_where(node)}") for n in shape_of(node.meta["val"])))


_ELEMENTWISE = """
add sub mul div true_divide rsub pow neg abs exp log sqrt rsqrt square reciprocal sin cos tan tanh sigmoid relu relu6
gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid softplus logsigmoid erf sign clamp clamp_min
clamp_max maximum minimum where masked_fill eq ne lt le gt ge logical_and logical_or logical_not bitwise_and
bitwise_or bitwise_not __and__ __or__ floor ceil round nan_to_num lerp addcmul expm1 log1p rectify threshold
""".split()
_SAME = """
to _to_copy type_as contiguous clone detach detach_ alias dropout dropout_ feature_dropout alias_copy lift_fresh_copy
float half bfloat16 double requires_grad_ zeros_like ones_like full_like empty_like
""".split()
_PASSING = frozenset(f"aten.{name}" for name in (*_ELEMENTWISE, *_SAME))

RULES: dict[str, Rule] = {
    **dict.fromkeys((f"aten.{name}" for name in _ELEMENTWISE), elementwise),
    **dict.fromkeys((f"aten.{name}" for name in _SAME), same),
    **dict.fromkeys(("aten.view", "aten.reshape", "aten._unsafe_view", "aten.flatten", "aten.unflatten"), view),
    **dict.fromkeys(("aten.split", "aten.split_with_sizes", "aten.chunk"), split_),
    **dict.fromkeys(("aten.transpose", "aten.t", "aten.numpy_T"), transpose),
    **dict.fromkeys(("aten.matmul", "aten.mm", "aten.bmm"), matmul),
    "aten.linear": linear,
    "aten.addmm": addmm,
    "aten.scaled_dot_product_attention": attention,
    "aten.softmax": softmax,
    "aten._softmax": softmax,
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": layer_norm,
    "aten.mean": reduce_mean,
    "aten.permute": permute,
    "aten.unsqueeze": unsqueeze,
    "aten.squeeze": squeeze,
    "aten.expand": expand,
    "aten.repeat": repeat,
    "aten.repeat_interleave": repeat_interleave,
    "aten.cat": cat,
    "aten.stack": stack,
    "aten.slice": slice_,
    "aten.unbind": unbind,
    "aten.select": select,
    "aten.embedding": embedding,
}
