"""Find what can be dropped whole: the layers of a stack, and the attention and MLP sub-layers inside each."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from secateur.space.dims import Term, is_live, resolve
from secateur.space.flow import Flow, Value, module_of, op_name
from secateur.space.types import Block

_CONTRACTIONS = ("aten.linear", "aten.addmm", "aten.mm", "aten.matmul", "aten.bmm")
# What one position does with others: attention, or what stands in its place in a state-space layer.
_MIXING = ("aten.scaled_dot_product_attention", "aten.softmax", "aten._softmax", "aten.conv1d", "aten.cumsum")
_PASSING = ("aten.dropout", "aten.to", "aten.alias", "aten.contiguous", "aten.clone", "aten.type_as", "aten.mul")


@dataclass(frozen=True)
class Layer:
    """One layer of a stack: its droppable parts and the dimension of the residual stream."""

    name: str
    stack: str
    count: int
    """Layers of the stack."""
    residual: Term
    blocks: tuple[Block, ...]


def find_blocks(flow: Flow, model: nn.Module) -> list[Layer]:
    """Layers whose output has the dimensions of their input, so that dropping one leaves a valid model."""
    graph = _Graph(flow, model)
    layers: list[Layer] = []
    for stack, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        inside_another = any(f"{stack}.".startswith(f"{layer.name}.") for layer in layers)
        if not inside_another:
            layers.extend(_layers_of(graph, stack, len(module)))
    return layers


class _Graph:
    """Who feeds whom, by module."""

    def __init__(self, flow: Flow, model: nn.Module) -> None:
        self.flow = flow
        self.parameters = [name for name, _ in model.named_parameters()]
        modules = model.named_modules()
        self.children = {name: [f"{name}.{child}" for child, _ in module.named_children()] for name, module in modules}
        self.norms = {module for module, _ in flow.norms}
        self.routed = {node for node, _ in flow.routed}
        self.inside: dict[str, list[fx.Node]] = defaultdict(list)
        for node in flow.order:
            stack = node.meta.get("nn_module_stack") or {}
            for path in dict.fromkeys(str(entry[0]) for entry in stack.values()):
                self.inside[path].append(node)
        self.used = set(flow.order)
        self.names: dict[str, str] = {}
        for node in flow.nodes:
            value = flow.nodes[node]
            if node.op == "placeholder" and isinstance(value, Value) and value.source is not None:
                self.names[node.name] = value.source[0]

    def live(self, node: fx.Node) -> bool:
        """Whether the node's result carries something that can be cut (so not a mask, not a rotary table)."""
        value = self.flow.nodes.get(node)
        return isinstance(value, Value) and any(is_live(d) for d in value.dims)

    def results(self, path: str) -> list[fx.Node]:
        """Nodes of a module whose result is used outside of it."""
        nodes = self.inside[path]
        own = set(nodes)
        return [n for n in nodes if self.live(n) and any(user not in own for user in self.users(n))]

    def users(self, node: fx.Node) -> set[fx.Node]:
        """Nodes that use a result for more than its shape."""
        return self.used.intersection(node.users) | {user for user in node.users if user.op == "output"}

    def operands(self, path: str) -> list[fx.Node]:
        """Nodes outside of a module that feed it, parameters left out."""
        own = set(self.inside[path])
        feeding = dict.fromkeys(a for n in self.inside[path] for a in n.all_input_nodes if a not in own)
        return [a for a in feeding if self.live(a) and a.name not in self.names]

    def dims(self, node: fx.Node) -> tuple[Term, ...]:
        """Solved dimensions of a node's result."""
        return tuple(resolve(d) for d in self.flow.nodes[node].dims)

    def parameters_only_for(self, sink: fx.Node, user: fx.Node, layer: str, result: fx.Node) -> frozenset[str]:
        """Parameters of a layer that no longer reach its `result` when `user` gets zeros in the place of `sink`."""
        within = set(self.inside[layer])
        needed: set[fx.Node] = {result}
        waiting = [result]
        while waiting:
            node = waiting.pop()
            for operand in node.all_input_nodes:
                if operand not in needed and not (node is user and operand is sink):
                    needed.add(operand)
                    if operand in within:
                        waiting.append(operand)
        used = {operand for node in within for operand in node.all_input_nodes if operand.name in self.names}
        return frozenset(self.names[n.name] for n in used) - {self.names[n.name] for n in used & needed}


def _layers_of(graph: _Graph, stack: str, count: int) -> Iterator[Layer]:
    paths = [f"{stack}.{i}" for i in range(count)]
    ends = _chain(graph, paths)
    for index, (path, end) in enumerate(zip(paths, ends or (), strict=False)):
        own = frozenset(name for name in graph.parameters if name.startswith(f"{path}."))
        whole = (Block(path, "layers", index, stack, own),) if len(graph.results(path)) == 1 else ()
        parts = tuple(_sublayers(graph, path, index, stack, end))
        stream = [dim for dim in graph.dims(end) if is_live(dim)]  # the last dimension, or the channels of an image
        yield Layer(path, stack, count, stream[-1], (*whole, *parts))


def _chain(graph: _Graph, paths: list[str]) -> list[fx.Node] | None:
    """The result of each layer that the next one takes on; None where they are no such chain.

    A layer may take more than that (encoder states) and give more (a position bias that others use, so it must stay).
    """
    ends: list[fx.Node] = []
    for number, path in enumerate(paths):
        operands, results = graph.operands(path), graph.results(path)
        following = set(graph.inside[paths[number + 1]]) if number + 1 < len(paths) else None
        before = [operand for operand in operands if not ends or operand is ends[-1]]
        found = [r for r in results if any(graph.dims(r) == graph.dims(o) for o in before)]
        if following is not None:
            found = [r for r in found if following & graph.users(r)]
        if len(found) != 1:
            return None
        if following is not None and not following >= graph.users(found[0]):
            return None  # collected: one fewer would be missed
        ends.append(found[0])
    return ends


def _sublayers(graph: _Graph, path: str, index: int, stack: str, result: fx.Node) -> Iterator[Block]:
    for child in graph.children[path]:
        nodes = graph.inside[child]
        routed = graph.routed.intersection(nodes)
        if not routed and not any(op_name(n) in _CONTRACTIONS for n in nodes):
            continue
        outputs = graph.results(child)
        if len(outputs) != 1 or graph.dims(outputs[0]) != graph.dims(result):
            continue
        edge = _residual_add(graph, outputs[0])
        if edge is None:
            continue
        mixes = any(op_name(n) in _MIXING for n in nodes) and not routed
        gone = graph.parameters_only_for(*edge, path, result)
        gone = frozenset(n for n in gone if n.rpartition(".")[0] != path)  # the layer's own code reads these
        idle = tuple(dict.fromkeys(n.rpartition(".")[0] for n in sorted(gone) if not n.startswith(f"{child}.")))
        yield Block(child, "attention" if mixes else "mlp", index, stack, gone, idle)


def _residual_add(graph: _Graph, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(operand, add) where a sub-layer's result, normalised or dropped out on the way, joins the residual stream."""
    passed: set[fx.Node] = set()
    while node not in passed:  # what a norm in several places gives may lead back to it
        passed.add(node)
        users = [u for u in node.users if graph.live(u)]
        norm = next((m for m in map(module_of, users) if m in graph.norms), None)
        if norm is not None and graph.results(norm):
            node = graph.results(norm)[0]
        elif len(users) == 1 and op_name(users[0]) in _PASSING:
            node = users[0]
        elif len(users) == 1 and op_name(users[0]) in ("aten.add", "aten.add_"):
            return node, users[0]
    return None
