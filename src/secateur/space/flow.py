"""Carry dimensions through an exported graph: one pass in graph order, one rule per ATen operator."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from secateur.errors import SecateurError
from secateur.space.dims import Term, Var, freeze, is_live, leaves, resolve
from secateur.space.zeros import keeps_zeros

# Operators whose rule takes notes for others, and so runs even where nothing can be cut any more.
NOTED = frozenset(f"aten.{n}" for n in ("linear", "addmm", "mm", "matmul", "bmm", "embedding"))
NOTED |= {"aten.softmax", "aten.scaled_dot_product_attention"}
NOTED |= {"aten.expand", "aten.repeat", "aten.repeat_interleave"}  # one KV head: nothing but the copies can be cut
NOTED |= {f"aten.{n}" for n in ("conv1d", "conv2d", "conv3d", "convolution", "einsum", "baddbmm", "lstm", "gru")}
# Filled with one value: every unit is like every other, so any may go. Python code gave their sizes.
FILLED = frozenset(f"aten.{n}" for n in ("zeros", "ones", "full", "empty"))
FILLED |= frozenset(f"aten.new_{n}" for n in ("zeros", "ones", "full", "empty"))
COUNTED = ("aten.histc", "aten.bincount", "aten.one_hot")
# What numbers units before these operators does so after them.
RENUMBERED = frozenset(
    f"aten.{n}" for n in ("view", "reshape", "flatten", "to", "sort", "index", "contiguous", "clone")
)
RENUMBERED |= frozenset(
    f"aten.{n}" for n in ("transpose", "permute", "unsqueeze", "squeeze", "slice", "select", "expand")
)


@dataclass(frozen=True)
class Value:
    """What is known of one tensor in the graph: its dimensions, and the parameter that it is a view of."""

    dims: tuple[Term, ...]
    source: tuple[str, tuple[int | None, ...]] | None = None
    """(parameter name, the parameter's dimension behind each dimension of this tensor)."""
    numbers: Term | None = None
    """The dimension whose units this tensor of integers numbers (what a router chose)."""
    clean: bool = True
    """Whether a unit whose parameters are zeros is zero here too. What is not, may only be read through a weight."""

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
    node: str
    numbers: tuple[int, ...]
    """All the numbers that stand together in the node's arguments."""
    place: int
    named: str


@dataclass(frozen=True)
class Attention:
    """One attention: the terms of its heads and of the key's and value's last dimension, and where it happens."""

    module: str
    heads: Term
    key: Term
    value: Term


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates of one operator: `factor` times the product of the sizes of `terms`."""

    module: str
    terms: tuple[Term, ...]
    factor: int = 1


@dataclass(frozen=True)
class Deferred:
    """A freeze that waits for the end of the pass: a router may couple all experts, and they may go all the same."""

    term: Term
    reason: str
    at_least: int = 1
    """Units that must stay (the k of ``topk``)."""


@dataclass
class Flow:
    """All that one pass over the graph finds out."""

    parameters: dict[str, Value] = field(default_factory=dict)
    buffers: dict[str, Value] = field(default_factory=dict)
    """Buffers that are part of the state: a cut slices them as it does parameters."""
    work: list[Work] = field(default_factory=list)
    deferred: list[Deferred] = field(default_factory=list)
    nodes: dict[fx.Node, Any] = field(default_factory=dict)
    order: list[fx.Node] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    norms: list[tuple[str, Term]] = field(default_factory=list)
    """(module, normalised dimension), in graph order."""
    literals: list[Literal] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    routed: list[tuple[fx.Node, Term]] = field(default_factory=list)
    """(product of rows with their own expert's matrix, its experts)."""
    constants: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    """Tensors that are written out in the code."""
    learned: set[fx.Node] = field(default_factory=set)
    """Nodes that depend on a parameter (masks and rotary tables do not)."""

    def note_literals(self, node: fx.Node, numbers: Sequence[Any], terms: Sequence[Term], named: str = "") -> None:
        """Python code in the node's module gave these numbers, and each is the size of a term.

        `named` is the argument's name, where others of the node may have the same value.
        """
        plain = tuple(n if isinstance(n, int) else -1 for n in numbers)
        for place, (number, term) in enumerate(zip(plain, terms, strict=True)):
            if number > 1:
                self.literals.append(Literal(module_of(node), number, term, node.name, plain, place, named))

    def hold(self, term: Term, reason: str, at_least: int = 1) -> None:
        """Freeze a dimension at the end of the pass, unless its units turn out to be experts."""
        self.deferred.append(Deferred(term, reason, at_least))

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
    """Concrete shape of a fake tensor.

    Raises:
        SecateurError: where it depends on the values of a tensor.
    """
    for size in value.shape:
        if not isinstance(size, int):
            from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

            if not free_unbacked_symbols(size):
                continue
            raise SecateurError(
                f"a tensor's shape, {tuple(value.shape)}, depends on the values of another: give it a fixed size while "
                "torch.compiler.is_exporting()"
            )
    return tuple(int(n) for n in value.shape)


def constant(meta: Any, reason: str) -> Any:
    """Dimensions that nothing may cut, for a node's fake result."""
    if isinstance(meta, torch.Tensor):
        return Value(tuple(Var(n, frozen=reason) for n in shape_of(meta)))
    if isinstance(meta, list | tuple):
        return [constant(item, reason) for item in meta]
    return None


def binding(outputs: Sequence[Any], spec: Any) -> list[Value]:
    """Outputs whose shape users rely on: all, but for hidden states beside the logits of a Hugging Face model."""
    keys = spec.context if isinstance(spec.context, list) and spec.type not in (list, tuple) else None
    if keys is None or not any("logits" in str(key) for key in keys):
        return _tensors(outputs)
    found: list[Value] = []
    start = 0
    for key, child in zip(keys, spec.children(), strict=True):
        own = outputs[start : start + child.num_leaves]
        start += child.num_leaves
        if child.is_leaf() and "hidden_state" not in str(key):
            found += _tensors(own)
    return found


def _tensors(values: Any) -> list[Value]:
    if isinstance(values, Value):
        return [values]
    if isinstance(values, list | tuple):
        return [v for item in values for v in _tensors(item)]
    return []


def run(program: ExportedProgram, canonical: Mapping[str, str]) -> Flow:
    """Apply the rules to every node of an exported program.

    `canonical` maps each name of a parameter or persistent buffer to the one name under which a tied tensor is known.
    """
    flow = Flow()
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    flow.constants = {
        node: program.constants[str(kinds[node.name].target)]
        for node in program.graph.nodes
        if node.op == "placeholder" and kinds[node.name].kind is InputKind.CONSTANT_TENSOR
    }
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
        elif spec.kind is InputKind.BUFFER and spec.persistent and isinstance(meta, torch.Tensor):
            name = canonical[str(spec.target)]
            dims = tuple(Var(n) for n in shape_of(meta))
            flow.buffers[name] = Value(dims, (name, tuple(range(len(dims)))))
            inputs.append((flow.buffers[name], False))
        elif spec.kind is InputKind.BUFFER:
            inputs.append((constant(meta, f"buffer {spec.target}, which is computed and not stored"), False))
        else:
            written = spec.kind is InputKind.CONSTANT_TENSOR
            reason = "a tensor that is written out in the code" if written else "an input of the model"
            inputs.append((constant(meta, reason), False))
    outputs = _run_graph(flow, program.graph_module, inputs)
    for value in binding(outputs, program.call_spec.out_spec):
        for dim in value.dims:
            freeze(dim, "an output of the model")
    for held in flow.deferred:
        for leaf in leaves(held.term):
            if "experts" not in leaf.roles:
                freeze(leaf, held.reason)
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
        elif not node.users and not op_name(node).endswith("_"):
            flow.nodes[node] = None  # only its shape was asked for
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
    if name in FILLED and isinstance(meta, torch.Tensor):
        return _filled(flow, node, meta)
    args = [flow.value(a) for a in node.args]
    kwargs = {key: flow.value(a) for key, a in node.kwargs.items()}
    if name == "getitem":
        return args[0][args[1]] if isinstance(args[0], list) else None
    operands = _tensors(args) + _tensors(list(kwargs.values()))
    clean = keeps_zeros(name, node, [(x.clean, x.live) for x in operands])
    noted = name in NOTED and node in flow.learned
    if name in COUNTED and isinstance(args[0], Value) and args[0].numbers is not None:
        return _counted(flow, node, name, args[0])
    if meta is None or not (noted or any(value.live for value in operands)):
        return _renumbered(
            name,
            args,
            constant(meta, _first_reason(operands) or f"made by {name} in {module_of(node) or 'the root module'}"),
        )
    rule = rules.get(name) or rules.get(name.rstrip("_")) or _without_rule  # in place or not, the same dimensions
    return _renumbered(name, args, _marked(rule(flow, node, *args, **kwargs), clean=clean))


def _without_rule(_: Flow, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
    """Never guess: what an unknown operator touches is frozen."""
    reason = f"{op_name(node)} in {module_of(node) or 'the root module'}: no rule for this operator"
    for value in _tensors([*args, *kwargs.values()]):
        for dim in value.dims:
            freeze(dim, reason)
    return constant(node.meta["val"], reason)


def _marked(result: Any, *, clean: bool) -> Any:
    if isinstance(result, Value):
        return result if result.clean == clean else replace(result, clean=clean)
    return [_marked(item, clean=clean) for item in result] if isinstance(result, list) else result


def _renumbered(name: str, args: Sequence[Any], result: Any) -> Any:
    """The result, knowing which units its integers number where its operand knew."""
    numbers = args[0].numbers if args and isinstance(args[0], Value) else None
    if numbers is None or name not in RENUMBERED:
        return result
    if isinstance(result, list):
        return [replace(result[0], numbers=numbers), *result[1:]]
    return replace(result, numbers=numbers)


def _counted(flow: Flow, node: fx.Node, name: str, chosen: Value) -> Value:
    """How often each unit was chosen: one number for each unit that there is."""
    units = chosen.numbers or Var(0)
    if len(node.args) > 1:
        flow.note_literals(node, [node.args[1]], [units])
    kept = chosen.dims if name == "aten.one_hot" else ()
    return Value((*kept, resolve(units)))


def _filled(flow: Flow, node: fx.Node, meta: torch.Tensor) -> Value:
    """A new tensor of one value. Sizes of its dimensions are literals of the code that made it."""
    dims = tuple(Var(n, frozen=None if n > 1 else "one unit") for n in shape_of(meta))
    sizes = next((a for a in node.args if isinstance(a, list | tuple)), ())
    if len(sizes) == len(dims):
        flow.note_literals(node, sizes, dims)
    return Value(dims)


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
