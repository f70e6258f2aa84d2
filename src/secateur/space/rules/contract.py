"""Rules of contractions: linear layers, matrix products, einsum, attention, experts."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from secateur.space.dims import Term, Var, add_role, freeze, product, resolve, size_of, unify
from secateur.space.flow import Attention, Flow, Value, Work, module_of, op_name, shape_of
from secateur.space.rules.base import axis_of, behind, need_zeros, note_read, one, where


def linear(flow: Flow, node: fx.Node, x: Value, weight: Value, bias: Value | None = None) -> Value:
    """``x @ weight.T + bias``."""
    unify(x.dims[-1], weight.dims[1], f"{where(node)}: its input cannot be cut")
    if bias is not None:
        unify(bias.dims[0], weight.dims[0], f"{where(node)}: its bias cannot be cut")
    note_read(flow, node, weight, 1, 0)
    result = Value((*x.dims[:-1], resolve(weight.dims[0])))
    flow.work.append(Work(module_of(node), (*result.dims, resolve(weight.dims[1]))))
    return result


def addmm(flow: Flow, node: fx.Node, bias: Value, x: Value, weight: Value, **_: Any) -> Value:
    """``bias + x @ weight``: Conv1D of Hugging Face keeps its weight as [in, out]."""
    result = matmul(flow, node, x, weight)
    unify(bias.dims[-1], result.dims[-1], f"{where(node)}: its bias cannot be cut")
    return result


def baddbmm(flow: Flow, node: fx.Node, bias: Value, a: Value, b: Value, **_: Any) -> Value:
    """``bias + a @ b``; what is added broadcasts."""
    result = matmul(flow, node, a, b)
    for own, other in zip(reversed(result.dims), reversed(bias.dims), strict=False):
        if size_of(other) == size_of(own):
            unify(own, other, f"{where(node)}: what is added cannot be cut alike")
    return Value(tuple(resolve(d) for d in result.dims))


def matmul(flow: Flow, node: fx.Node, a: Value, b: Value) -> Value:
    """Batched matrix product: the contracted dimensions are equal, and so are the batch dimensions."""
    left, right = a, b
    if len(a.dims) == 1:
        left = Value((one(node), *a.dims), None if a.source is None else (a.source[0], (None, *a.source[1])))
    if len(b.dims) == 1:
        right = Value((*b.dims, one(node)), None if b.source is None else (b.source[0], (*b.source[1], None)))
    reason = f"{where(node)}: its two sides cannot be cut alike"
    unify(left.dims[-1], right.dims[-2], reason)
    if right.source is not None:
        note_read(flow, node, right, len(right.dims) - 2, len(right.dims) - 1)
    elif left.source is not None:
        note_read(flow, node, left, len(left.dims) - 1, len(left.dims) - 2)
    else:
        # Two activations: attention. The scores contract the head dimension, the mix keeps it.
        for dim in (left.dims[-1], right.dims[-2], right.dims[-1]):
            add_role(dim, "head_dim")
        need_zeros(node, left.dims[-1], left, right)
        _note_attention(flow, node, left, right)
    batch: list[Term] = []
    rank = max(len(left.dims), len(right.dims))
    for i in range(rank - 2):
        pair = [v.dims[i - rank + len(v.dims)] for v in (left, right) if i - rank + len(v.dims) >= 0]
        wide = [d for d in pair if size_of(d) != 1]
        for other in wide[1:]:
            unify(wide[0], other, f"{where(node)}: its batch dimensions cannot be cut alike")
        batch.append(resolve(wide[0]) if wide else one(node))
    dims = (*batch, resolve(left.dims[-2]), resolve(right.dims[-1]))
    flow.work.append(Work(module_of(node), (*dims, resolve(left.dims[-1]))))
    if len(a.dims) == 1:
        dims = (*dims[:-2], dims[-1])
    return Value(dims[:-1] if len(b.dims) == 1 else dims)


def outer(_: Flow, __: fx.Node, a: Value, b: Value) -> Value:
    """Every unit with every unit."""
    return Value((*a.dims, *b.dims))


def bilinear(flow: Flow, node: fx.Node, a: Value, b: Value, weight: Value, bias: Value | None = None) -> Value:
    """``a @ weight[o] @ b`` for each o."""
    reason = f"{where(node)}: its inputs cannot be cut"
    unify(a.dims[-1], weight.dims[1], reason)
    unify(b.dims[-1], weight.dims[2], reason)
    if bias is not None:
        unify(bias.dims[0], weight.dims[0], f"{where(node)}: its bias cannot be cut")
    for in_dim in (1, 2):
        note_read(flow, node, weight, in_dim, 0)
    flow.work.append(Work(module_of(node), (*a.dims[:-1], *weight.dims)))
    return Value((*a.dims[:-1], resolve(weight.dims[0])))


def einsum(flow: Flow, node: fx.Node, equation: str, operands: Sequence[Value], *_: Any, **__: Any) -> Value:
    """Each letter is one dimension; letters that the result lacks are contracted."""
    inputs, output = _letters(equation, [len(v.dims) for v in operands], len(shape_of(node.meta["val"])))
    terms: dict[str, Term] = {}
    for letters, value in zip(inputs, operands, strict=True):
        for letter, dim in zip(letters, value.dims, strict=True):
            if letter not in terms or size_of(terms[letter]) == 1:
                terms[letter] = dim
            elif size_of(dim) != 1:
                unify(terms[letter], dim, f"{where(node)}: {letter} cannot be cut alike in its operands")
    weights = [(letters, value) for letters, value in zip(inputs, operands, strict=True) if value.source is not None]
    contracted = [letter for letter in terms if letter not in output]
    for letters, weight in weights:
        others = {x for seen, value in zip(inputs, operands, strict=True) if value is not weight for x in seen}
        made = [i for i, letter in enumerate(letters) if letter in output and letter not in others]
        for i in (i for i, letter in enumerate(letters) if letter in contracted):
            note_read(flow, node, weight, i, made[0] if made else None)
    if not weights and len(operands) > 1:
        for letter in contracted:
            add_role(terms[letter], "contracted")
            need_zeros(node, terms[letter], *operands)
    if len(operands) > 1:
        flow.work.append(Work(module_of(node), tuple(map(resolve, terms.values()))))
    return Value(tuple(resolve(terms[letter]) for letter in output))


def _letters(equation: str, ranks: Sequence[int], result: int) -> tuple[list[list[str]], list[str]]:
    """Letters of the inputs and of the result; those that an ellipsis stands for are numbered from the right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    sides = left.split(",")
    if not arrow:
        plain = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(plain) if plain.count(c) == 1))

    def spell(text: str, rank: int) -> list[str]:
        if "..." not in text:
            return list(text)
        before, _, after = text.partition("...")
        hidden = rank - len(before) - len(after)
        return [*before, *(f"...{i}" for i in reversed(range(hidden))), *after]

    return [spell(side, rank) for side, rank in zip(sides, ranks, strict=True)], spell(right, result)


def attention(
    flow: Flow, node: fx.Node, query: Value, key: Value, value: Value, mask: Value | None = None, *_: Any, **kw: Any
) -> Value:
    """Scaled dot-product attention: [..., heads, positions, head_dim]."""
    mask = kw.get("attn_mask", mask)
    here = where(node)
    if size_of(query.dims[-3]) != size_of(key.dims[-3]):
        # enable_gqa: each group of the keys serves the same number of query heads.
        tile = Var(size_of(query.dims[-3]) // size_of(key.dims[-3]), tile=True)
        grouped = product([key.dims[-3], tile])
        unify(query.dims[-3], grouped, f"{here}: heads")
        unify(key.dims[-3], value.dims[-3], f"{here}: heads")
    else:
        unify(query.dims[-3], key.dims[-3], f"{here}: heads")
        unify(query.dims[-3], value.dims[-3], f"{here}: heads")
    unify(query.dims[-1], key.dims[-1], f"{here}: head dimension")
    for dim in (key.dims[-2], value.dims[-2]):
        freeze(dim, f"{here}: every key depends on every other")
    _join_head_dims(query.dims[-1], value.dims[-1])
    if kw.get("scale") is None:
        freeze(query.dims[-1], f"{here}: its scale follows the head dimension")
    heads = query.dims[-3]
    if mask is not None and len(mask.dims) >= 3 and size_of(mask.dims[-3]) != 1:
        unify(heads, mask.dims[-3], f"{here}: a mask for each head")
    add_role(heads, "heads")
    add_role(query.dims[-1], "head_dim")
    add_role(value.dims[-1], "head_dim")
    flow.attentions.append(Attention(module_of(node), heads, key.dims[-1], value.dims[-1]))
    rows = (*(resolve(d) for d in query.dims[:-1]), resolve(key.dims[-2]))
    flow.work += [Work(module_of(node), (*rows, resolve(x.dims[-1]))) for x in (key, value)]
    return Value((*[resolve(d) for d in query.dims[:-1]], resolve(value.dims[-1])))


def _join_head_dims(key: Term, value: Term) -> None:
    """Mathematics would let values be narrower than keys, but model code reads one head_dim for both."""
    if size_of(key) == size_of(value):
        unify(key, value, "keys and values have one head dimension")


def softmax(flow: Flow, node: fx.Node, x: Value, dim: int, *__: Any, **___: Any) -> Value:
    """Softmax couples all units of its dimension; in [batch, heads, queries, keys] the heads are free."""
    axis = axis_of(dim, len(x.dims))
    flow.hold(x.dims[axis], f"{where(node)}: every unit depends on every other")
    if len(x.dims) >= 3 and axis == len(x.dims) - 1:
        add_role(x.dims[1] if len(x.dims) == 4 else x.dims[-3], "heads")
    return x


def experts(flow: Flow, node: fx.Node, x: Value, weight: Value, ends: Value, bias: Value | None = None) -> Value:
    """Rows of `x`, sorted by expert, times that expert's own matrix: weight [experts, in, out]."""
    unify(x.dims[-1], weight.dims[1], f"{where(node)}: its input cannot be cut")
    unify(weight.dims[0], ends.dims[0], f"{where(node)}: experts that cannot be cut")
    add_role(weight.dims[0], "experts")
    if bias is not None:
        unify(bias.dims[-1], weight.dims[2], f"{where(node)}: its bias cannot be cut")
    note_read(flow, node, weight, 1, 2)
    flow.routed.append((node, weight.dims[0]))
    flow.work.append(Work(module_of(node), (*x.dims[:-1], *(resolve(d) for d in weight.dims[1:]))))
    return Value((*x.dims[:-1], resolve(weight.dims[2])))


def _note_attention(flow: Flow, node: fx.Node, probabilities: Value, value: Value) -> None:
    """Attention written out: softmax(query @ key.T) @ value."""
    softmax_node = behind(node, ("aten.softmax", "aten._softmax"))
    scores = softmax_node and behind(softmax_node, ("aten.matmul", "aten.bmm", "aten.baddbmm"))
    if scores is not None and len(probabilities.dims) in (3, 4):
        key = flow.value(scores.args[2 if op_name(scores) == "aten.baddbmm" else 1])
        _join_head_dims(key.dims[-2], value.dims[-1])
        flow.attentions.append(Attention(module_of(node), probabilities.dims[-3], key.dims[-2], value.dims[-1]))
