"""Numbers in the graph that a cut must respect: scalar factors, norm weights with an offset, float literals."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import fx

from secateur.space.flow import Flow, Value, module_of, op_name
from secateur.space.rules.base import ELEMENTWISE
from secateur.space.types import Constant, Scale

# Operators whose whole numbers say what they compute, and are no sizes, positions or dimensions.
_NUMBERED = frozenset(
    f"aten.{name}"
    for name in f"""{ELEMENTWISE} conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d
    max_pool2d avg_pool1d avg_pool2d max_pool2d_with_indices pad constant_pad_nd pixel_shuffle pixel_unshuffle im2col
    layer_norm group_norm""".split()
)
_CASTS = ("aten.to", "aten._to_copy", "aten.float", "aten.type_as", "aten.alias")


def _uncast(node: object) -> object:
    while isinstance(node, fx.Node) and op_name(node) in _CASTS:
        node = node.args[0]
    return node


def find_scales(flow: Flow, buffers: dict[str, str]) -> Iterator[Scale]:
    """Embeddings whose result is multiplied with a scalar buffer; `buffers` maps graph names to module names."""
    for node in flow.order:
        if op_name(node) != "aten.mul":
            continue
        operands = [_uncast(a) for a in node.args]
        tables = [o for o in operands if isinstance(o, fx.Node) and op_name(o) == "aten.embedding"]
        scalars = [o for o in operands if isinstance(o, fx.Node) and o.op == "placeholder" and o.name in buffers]
        if tables and scalars:
            source = flow.nodes[tables[0].args[0]]  # type: ignore[index]
            if isinstance(source, Value) and source.source is not None:
                yield Scale(buffers[scalars[0].name], source.source[0])


def norm_weights(flow: Flow) -> dict[str, tuple[str, float]]:
    """For each norm's module: the parameter that scales its result, and what is added to it first."""
    modules = {module for module, _ in flow.norms}
    found: dict[str, tuple[str, float]] = {}
    for node in flow.order:
        module = module_of(node)
        if module not in modules or module in found:
            continue
        if op_name(node) in ("aten.layer_norm", "aten.rms_norm"):
            operands, offset = node.args[2:3], 0.0
        elif op_name(node) in ("aten.mul", "aten.add"):
            numbers = [float(a) for a in node.args if isinstance(a, int | float)]
            operands, offset = node.args, numbers[0] if numbers and op_name(node) == "aten.add" else 0.0
        else:
            continue
        for value in (flow.value(_uncast(operand)) for operand in operands):
            if isinstance(value, Value) and value.source is not None:
                found[module] = value.source[0], offset
    return found


def find_constants(flow: Flow) -> Iterator[Constant]:
    """Operators with numbers that are no sizes (scales, strides, paddings, exponents), in graph order."""
    sizes: dict[str, list[int]] = defaultdict(list)
    for literal in flow.literals:
        sizes[literal.node].append(literal.value)
    for node in flow.order:
        if op_name(node) == "aten.scalar_tensor":  # how a scalar reaches `where` depends on the device
            continue
        counted = (int, float) if op_name(node).rstrip("_") in _NUMBERED else (float,)
        numbers = [n for n in _numbers((*node.args, *node.kwargs.values())) if isinstance(n, counted)]
        if op_name(node).startswith("aten.conv"):  # defaults at the end are left out of the graph
            numbers = [n for n in numbers if n not in (0, 1)]
        for size in sizes[node.name]:
            if size in numbers:
                numbers.remove(size)
        numbers += _constant_operands(flow, node)
        if numbers:
            yield Constant(module_of(node), op_name(node), tuple(map(float, numbers)))


def _constant_operands(flow: Flow, node: fx.Node) -> list[float]:
    """Single fractions that the code made a tensor of (``torch.tensor(head_dim * factor)``)."""
    tensors = [flow.constants[a] for a in node.all_input_nodes if a in flow.constants]
    single = [t for t in tensors if t.numel() == 1 and t.is_floating_point() and not t.is_meta]
    return [float(t.reshape(())) for t in single]


def _numbers(values: Any) -> Iterator[int | float]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield value
