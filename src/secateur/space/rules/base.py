"""What the rules share."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from secateur.space.dims import Term, Var, freeze
from secateur.space.flow import Flow, Read, Value, module_of, op_name, shape_of

Rule = Callable[..., Any]

ELEMENTWISE = """
add sub mul div true_divide rsub pow neg abs exp exp2 log log2 log10 log1p expm1 sqrt rsqrt square reciprocal sin cos
tan tanh atan sinh cosh sigmoid relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardswish hardsigmoid
softplus softsign logsigmoid log_sigmoid hardshrink softshrink tanhshrink erf erfc sign clamp clamp_min clamp_max
maximum minimum fmax fmin where masked_fill eq ne lt le gt ge equal logical_and logical_or logical_not logical_xor
bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__ __xor__ __lshift__ __rshift__ floor ceil round trunc
frac nan_to_num lerp addcmul addcdiv rectify threshold floor_divide remainder fmod atan2 isnan isinf isfinite
logaddexp xlogy clip subtract multiply divide negative absolute greater less not_equal bernoulli special_erf
special_expm1
"""
SAME = """
to _to_copy type_as contiguous clone detach alias dropout feature_dropout alpha_dropout alias_copy lift_fresh_copy
float half bfloat16 double requires_grad zeros_like ones_like full_like empty_like rand_like randn_like fill zero
native_dropout feature_alpha_dropout detach_copy lift_fresh lift conj resolve_conj resolve_neg positive view_dtype
"""
PASSING = frozenset(f"aten.{name}" for name in (*ELEMENTWISE.split(), *SAME.split()))
"""Operators that work on each element by itself."""
_AROUND = ("aten.cat", "aten.slice", "aten.view", "aten.reshape", "aten._unsafe_view")
"""Operators that may stand between the scores of an attention and their softmax."""


def where(node: fx.Node) -> str:
    """Operator and module, as reasons name them."""
    return f"{op_name(node)} in {module_of(node) or 'the root module'}"


def one(node: fx.Node) -> Var:
    """A dimension of one unit."""
    return Var(1, frozen=f"one unit, {where(node)}")


def fixed(node: fx.Node, size: int) -> Var:
    """A dimension that the operator makes and nothing may cut."""
    return one(node) if size == 1 else Var(size, frozen=f"made by {where(node)}")


def const(node: fx.Node) -> Any:
    """The node's result, with dimensions that nothing may cut."""
    meta = node.meta["val"]
    if isinstance(meta, list | tuple):
        return [Value(tuple(fixed(node, n) for n in shape_of(m))) for m in meta]
    return Value(tuple(fixed(node, n) for n in shape_of(meta)))


def axis_of(index: int, rank: int) -> int:
    """A dimension's number, counted from the front."""
    return index % rank if rank else 0


def argument(node: fx.Node, name: str, index: int, default: Any) -> Any:
    """A Python argument of the node, given by place or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def freeze_all(terms: Sequence[Term], reason: str) -> None:
    """Forbid cuts of several dimensions."""
    for term in terms:
        freeze(term, reason)


def behind(node: fx.Node, wanted: Sequence[str]) -> fx.Node | None:
    """The operator of a wanted name whose result, scaled, masked or cast, is the node's first argument."""
    while node.args:
        first = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]  # sinks are concatenated
        if not isinstance(first, fx.Node):
            break
        node = first
        if op_name(node) in wanted:
            return node
        if op_name(node).rstrip("_") not in (*PASSING, *_AROUND):
            return None
    return None


def need_zeros(node: fx.Node, term: Term, *values: Value) -> None:
    """A sum over units without a weight: what is gone must have been zero, or the sum means something else."""
    if not any(value.clean for value in values):
        freeze(term, f"{where(node)}: summed without a weight, after an operator that makes something of zeros")


def note_read(flow: Flow, node: fx.Node, weight: Value, in_dim: int, out_dim: int | None) -> None:
    """The node contracts dimension `in_dim` of `weight`."""
    if weight.source is None:
        return
    name, behind = weight.source
    stored_in = behind[in_dim]
    if stored_in is not None:
        flow.reads.append(Read(name, stored_in, None if out_dim is None else behind[out_dim], module_of(node)))


def unknown(_: Flow, node: fx.Node, *args: Any, **kwargs: Any) -> Value:
    """Freeze everything, and say so."""
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Value):
                freeze_all(item.dims, f"{where(node)}: cannot be followed with these arguments")
    result: Value = const(node)
    return result
