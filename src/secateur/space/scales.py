"""Numbers in the graph that a cut must respect: scalar factors, norm weights with an offset, float literals."""

from collections.abc import Iterator

from torch import fx

from secateur.space.flow import Flow, Value, module_of, op_name
from secateur.space.types import Constant, Scale

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
    """Operators with floating-point literals, in graph order."""
    for node in flow.order:
        values = tuple(float(a) for a in (*node.args, *node.kwargs.values()) if isinstance(a, float))
        if values:
            yield Constant(module_of(node), op_name(node), values)
