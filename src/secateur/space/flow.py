"""Carry dimensions through an exported graph: one pass in graph order, one rule per ATen operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.space.dims import Term, Var, freeze, is_live

# Operators whose rule takes notes for others, and so runs even where nothing can be cut any more.
NOTED = frozenset(f"aten.{n}" for n in ("linear", "addmm", "mm", "matmul", "bmm", "embedding"))
NOTED |= {"aten.softmax", "aten.scaled_dot_product_attention"}
NOTED |= {"aten.expand", "aten.repeat", "aten.repeat_interleave"}  # one KV head: nothing but the copies can be cut


@dataclass(frozen=True)
class Value:
    """What is known of one tensor in the graph: its dimensions, and the parameter that it is a view of."""

    dims: tuple[Term, ...]
    source: tuple[str, tuple[int | None, ...]] | None = None
    """(parameter name, the parameter's dimension behind each dimension of this tensor)."""

    @property
    def live(self) -> bool:
        """Whether some dimension could still be cut."""
        return any(is_live(d) for d in self.dims)


@dataclass(frozen=True)
class Read:
    """A contraction: `module` multiplies its input with `parameter`, summing over dimension `in_dim` of it."""

    parameter: str
    in_dim: int
    out_dim: int | None
    module: str


@dataclass(frozen=True)
class Literal:
    """An integer in the graph that came out of Python code in `module` and stands for the size of `term`."""

    module: str
    value: int
    term: Term


@dataclass(frozen=True)
class Attention:
    """One attention: the terms of its heads and of the key's and value's last dimension, and where it happens."""

    module: str
    heads: Term
    key: Term
    value: Term


@dataclass
class Flow:
    """All that one pass over the graph finds out."""

    parameters: dict[str, Value] = field(default_factory=dict)
    nodes: dict[fx.Node, Any] = field(default_factory=dict)
    order: list[fx.Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    norms: list[tuple[str, Term]] = field(default_factory=list)
    """(module, normalised dimension), in graph order."""
    literals: list[Literal] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    learned: set[fx.Node] = field(default_factory=set)
    """Nodes that depend on a parameter (masks and rotary tables do not)."""

    def value(self, argument: Any) -> Any:
        """The `Value` of a graph argument; lists are mapped, other Python values pass."""
        if isinstance(argument, fx.Node):
            return self.nodes.get(argument)
        if isinstance(argument, list | tuple):
            return [self.value(item) for item in argument]
        return argument


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that ran this node ('' for the root)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1] if paths and not paths[-1].startswith("_empty_nn_module_stack") else ""


def shape_of(value: Any) -> tuple[int, ...]:
    """Concrete shape of a fake tensor."""
    return tuple(int(n) for n in value.shape)


def constant(meta: Any, reason: str) -> Any:
    """Dimensions that nothing may cut, for a node's fake result."""
    if isinstance(meta, torch.Tensor):
        return Value(tuple(Var(n, frozen=reason) for n in shape_of(meta)))
    if isinstance(meta, list | tuple):
        return [constant(item, reason) for item in meta]
    return None


def _tensors(values: Any) -> list[Value]:
    if isinstance(values, Value):
        return [values]
    if isinstance(values, list | tuple):
        return [v for item in values for v in _tensors(item)]
    return []


def run(program: ExportedProgram, canonical: Mapping[str, str]) -> Flow:
    """Apply the rules to every node of an exported program.

    `canonical` maps each parameter name to the one name under which a tied parameter is known.
    """
    flow = Flow()
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    inputs: list[tuple[Any, bool]] = []
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if not node.users:  # the other name of a tied parameter, or one that the forward pass does not use
            inputs.append((None, False))
            continue
        spec = kinds[node.name]
        meta = node.meta.get("val")
        if spec.kind is InputKind.PARAMETER and isinstance(meta, torch.Tensor):
            name = canonical[str(spec.target)]
            dims = tuple(Var(n) for n in shape_of(meta))
            value = Value(dims, (name, tuple(range(len(dims)))))
            flow.parameters[name] = value
            inputs.append((value, True))
        elif spec.kind is InputKind.BUFFER:
            inputs.append((constant(meta, f"buffer {spec.target}, which is computed and not stored"), False))
        else:
            inputs.append((constant(meta, "an input of the model"), False))
    outputs = _run_graph(flow, program.graph_module, inputs)
    for value in _tensors(outputs):
        for dim in value.dims:
            freeze(dim, "an output of the model")
    return flow


def _run_graph(flow: Flow, graph: fx.GraphModule, inputs: Sequence[tuple[Any, bool]]) -> Any:
    """Interpret one graph on (value, learned); sub-graphs of higher-order operators are entered."""
    from secateur.space.rules import RULES  # the rules need the types above

    waiting = list(inputs)
    result: Any = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            flow.nodes[node], learned = waiting.pop(0)
            flow.learned |= {node} if learned else set()
        elif node.op == "get_attr":
            flow.nodes[node] = None
        elif node.op == "output":
            result = flow.value(node.args[0])
        else:
            flow.order.append(node)
            flow.learned |= {node} if flow.learned.intersection(node.all_input_nodes) else set()
            flow.nodes[node] = _apply(flow, graph, node, RULES)
    return result


def _apply(flow: Flow, graph: fx.GraphModule, node: fx.Node, rules: Mapping[str, Any]) -> Any:
    name = op_name(node)
    if name.startswith("wrap_with"):
        submodule, *inputs = [a for a in node.args if isinstance(a, fx.Node)]
        return _run_graph(
            flow, getattr(graph, str(submodule.target)), [(flow.value(i), i in flow.learned) for i in inputs]
        )
    meta = node.meta.get("val")
    args = [flow.value(a) for a in node.args]
    kwargs = {key: flow.value(a) for key, a in node.kwargs.items()}
    if name == "getitem":
        source, index = args
        return source[index] if isinstance(source, list) else None
    operands = _tensors(args) + _tensors(list(kwargs.values()))
    where = f"{name} in {module_of(node) or 'the root module'}"
    noted = name in NOTED and node in flow.learned
    if meta is None or not (noted or any(value.live for value in operands)):
        return constant(meta, _first_reason(operands) or f"made by {where}")
    rule = rules.get(name)
    if rule is None:
        for value in operands:
            for dim in value.dims:
                freeze(dim, f"{where}: no rule for this operator")
        return constant(meta, f"{where}: no rule for this operator")
    return rule(flow, node, *args, **kwargs)


def _first_reason(operands: Sequence[Value]) -> str | None:
    """The reason that says most: a buffer if there is one, else that of the last dimension (the first are batch)."""
    dims = [dim for value in operands for dim in reversed(value.dims)]
    reasons = [d.frozen for d in dims if isinstance(d, Var) and d.frozen and d.size > 1]
    return next((r for r in reasons if r.startswith("buffer")), reasons[0] if reasons else None)


def op_name(node: fx.Node) -> str:
    """``aten.linear`` for an ATen overload, the bare name for anything else."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return getattr(node.target, "__name__", str(node.target))
