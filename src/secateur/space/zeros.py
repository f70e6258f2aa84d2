"""Which operators make zeros of zeros: where they do not, a unit cannot be left out of a sum unnoticed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

UNCLEAN = frozenset(
    """exp exp2 log log2 log10 sigmoid hardsigmoid softplus logsigmoid log_sigmoid cos cosh rsqrt reciprocal softmax
    _softmax log_softmax logsumexp eq ne ge le logical_not bitwise_not where threshold fill special_erfc erfc maximum
    minimum full_like ones_like rand_like randn_like""".split()
)
PRODUCTS = frozenset("mul multiply matmul bmm mm einsum".split())
WEIGHTED = frozenset("linear addmm convolution conv1d conv2d conv3d".split())


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _clamps(low: float | None, high: float | None) -> bool:
    return (low is None or low <= 0) and (high is None or high >= 0)


def _argument(node: fx.Node, index: int) -> float | None:
    return _number(node.args[index]) if len(node.args) > index else None


_DEPENDS: Mapping[str, Callable[[fx.Node], bool]] = {
    "pow": lambda node: (_argument(node, 1) or 0) > 0,
    "clamp": lambda node: _clamps(_argument(node, 1), _argument(node, 2)),
    "clamp_min": lambda node: _clamps(_argument(node, 1), None),
    "clamp_max": lambda node: _clamps(None, _argument(node, 1)),
    "masked_fill": lambda node: _argument(node, 2) == 0,
    # Its parameters are cut alike; without them the mean is left.
    "layer_norm": lambda node: len(node.args) > 2 and node.args[2] is not None,
}


def keeps_zeros(operator: str, node: fx.Node, operands: Sequence[tuple[bool, bool]]) -> bool:
    """Whether the result is zero for units whose operands are.

    Args:
        operator: its ATen name.
        node: for its other arguments.
        operands: for each tensor, whether it keeps zeros itself, and whether it has units that could be cut.
    """
    name = operator.removeprefix("aten.").rstrip("_")
    live = [clean for clean, is_live in operands if is_live]
    if name in PRODUCTS:
        return any(live) or not live
    if name in ("div", "divide"):
        return live[0] if live else True
    if name in WEIGHTED or not all(live):
        return name in WEIGHTED
    if name in ("add", "sub", "rsub", "addcmul", "lerp"):
        numbers = [_number(a) for a in (*node.args[:2], *node.kwargs.values())]
        return not any(numbers) and len(live) == len(operands)
    return _DEPENDS[name](node) if name in _DEPENDS else name not in UNCLEAN
