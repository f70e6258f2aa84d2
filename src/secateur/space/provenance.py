"""Which attributes of which modules the integers in a graph come from.

During the trace every whole number that a module or a config keeps is replaced by a `Tagged` one, which behaves the
same and remembers its name through arithmetic. What reaches a torch function is noted beside the node it makes. So
after a cut it is known, and not guessed, which attribute has to follow which size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_SIGNS: Mapping[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b if b else 0,
}


@dataclass(frozen=True)
class Attribute:
    """A whole number that a module (or a config: ``config``, ``config.text_config``) keeps under a name."""

    owner: str
    name: str
    item: int | None = None
    """Place in the list or tuple of that name; None for a plain number."""
    is_config: bool = False


@dataclass(frozen=True)
class Operation:
    """Arithmetic on such numbers."""

    sign: str
    left: "Expression"
    right: "Expression"


Expression = Attribute | Operation | int


def value_of(expression: Expression, values: Mapping[Attribute, int]) -> int:
    """What an expression gives with these attributes."""
    if isinstance(expression, Attribute):
        return values[expression]
    if isinstance(expression, Operation):
        return _SIGNS[expression.sign](value_of(expression.left, values), value_of(expression.right, values))
    return expression


def attributes_in(expression: Expression | None) -> Iterator[Attribute]:
    """Every attribute of an expression."""
    if isinstance(expression, Attribute):
        yield expression
    elif isinstance(expression, Operation):
        yield from attributes_in(expression.left)
        yield from attributes_in(expression.right)


class Tagged(int):
    """A whole number that remembers where it came from."""

    origin: Expression

    def __new__(cls, value: int, origin: Expression) -> "Tagged":
        """Make one."""
        new = super().__new__(cls, value)
        new.origin = origin
        return new

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        """What is stored is a plain number."""
        return int, (int(self),)

    def __deepcopy__(self, _: Any) -> "Tagged":
        """Configs are copied for their parts, and the copy means the same."""
        return self


def _arithmetic(name: str, sign: str, *, swapped: bool) -> Callable[[Any, Any], Any]:
    plain = getattr(int, name)

    def operate(self: Tagged, other: Any) -> Any:
        result = plain(self, other)
        if not isinstance(other, int) or isinstance(other, bool) or result is NotImplemented:
            return result
        own, others = self.origin, other.origin if isinstance(other, Tagged) else int(other)
        return Tagged(result, Operation(sign, others, own) if swapped else Operation(sign, own, others))

    return operate


for _name, _sign in (("add", "+"), ("sub", "-"), ("mul", "*"), ("floordiv", "//")):
    setattr(Tagged, f"__{_name}__", _arithmetic(f"__{_name}__", _sign, swapped=False))
    setattr(Tagged, f"__r{_name}__", _arithmetic(f"__r{_name}__", _sign, swapped=True))


class Recorder(TorchFunctionMode):
    """Notes which tagged numbers reach which node of the graph that is being traced."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}
        """Node name -> every whole number among the arguments of the call that made it, in order."""
        self.outputs: dict[str, Any] = {}
        """Module -> the structure of what it returned: "tensor" for a tensor, None for anything else."""

    def note_output(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        """A forward hook that remembers the structure of a module's output."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.outputs[path] = pytree.tree_map(lambda x: "tensor" if isinstance(x, torch.Tensor) else None, output)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; connect its tagged arguments with the nodes that it makes."""
        numbers = [x for x in _flat((args, kwargs or {})) if isinstance(x, int) and not isinstance(x, bool)]
        from torch.fx.experimental.proxy_tensor import get_proxy_mode  # costs a third of a second

        mode = get_proxy_mode() if any(isinstance(x, Tagged) for x in numbers) else None
        graph = mode.tracer.graph if mode is not None else None
        last = next(iter(reversed(graph.nodes)), None) if graph is not None else None
        result = func(*args, **(kwargs or {}))
        if graph is not None:
            node = next(iter(reversed(graph.nodes)))
            while node is not last and node.op != "root":
                self.seen[node.name] = numbers
                node = node.prev
        return result

    def source(self, node: str, numbers: Sequence[int], place: int, named: str = "") -> Expression | None:
        """Where ``numbers[place]``, one of the numbers of a node, came from; None where nothing is known."""
        given = self.seen.get(node, [])
        wide = len(numbers)
        runs = (given[i : i + wide] for i in range(len(given) - wide + 1))
        run = next((run for run in runs if run == list(numbers)), None)
        found = [run[place]] if run is not None and not named else [x for x in given if x == numbers[place]]
        origins = [x.origin for x in found if isinstance(x, Tagged)]
        own = [x for x in origins if named and isinstance(x, Attribute) and named in x.name]
        return next(iter(own or origins), None)


class SizeRecorder(TorchFunctionMode):
    """Notes which tagged numbers the tensors that a constructor makes have for sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Expression, ...]] = {}
        """Storage -> where each size came from."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function; remember the sizes of what it makes."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            numbers = [x for x in _flat((args, kwargs or {})) if isinstance(x, int) and not isinstance(x, bool)]
            wide = result.dim()
            for start in range(len(numbers) - wide + 1) if any(isinstance(x, Tagged) for x in numbers) else ():
                run = numbers[start : start + wide]
                if tuple(run) == tuple(result.shape):
                    origins = tuple(x.origin if isinstance(x, Tagged) else int(x) for x in run)
                    self.made[result.untyped_storage()._cdata] = origins
                    break
        return result


def made_sizes(kind: Callable[[Any], nn.Module], config: Any) -> dict[str, tuple[Expression, ...]]:
    """Build ``kind(config)`` on meta tensors: parameter name -> which numbers of the config each of its sizes is.

    Args:
        kind: a model class.
        config: a copy that nobody else needs.
    """
    for path, holder, _ in _configs("config", config):
        own = vars(holder)
        own.update({key: _tag(value, path, key, True) for key, value in own.items() if not key.startswith("_")})
    with torch.device("meta"), SizeRecorder() as recorder:
        model = kind(config)
    named = model.named_parameters()
    return {n: recorder.made[c] for n, p in named if (c := p.untyped_storage()._cdata) in recorder.made}


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    elif isinstance(values, dict):
        yield from _flat(list(values.values()))
    elif isinstance(values, slice):
        yield from (values.start, values.stop, values.step)
    elif not isinstance(values, torch.Tensor):
        yield values


def holders(model: nn.Module) -> Iterator[tuple[str, Any, bool]]:
    """(path, object, whether it is a config) of all that keeps numbers: modules, and configs once each."""
    for path, module in model.named_modules():
        yield path, module, False
    yield from _configs("config", getattr(model, "config", None))


def _configs(name: str, config: Any) -> Iterator[tuple[str, Any, bool]]:
    waiting = [(name, config)] if hasattr(config, "to_dict") else []
    done: set[int] = set()
    while waiting:
        path, config = waiting.pop(0)
        if id(config) in done:
            continue
        done.add(id(config))
        yield path, config, True
        waiting += [(f"{path}.{k}", v) for k, v in vars(config).items() if hasattr(v, "to_dict")]


@contextmanager
def tagging(model: nn.Module) -> Iterator[Recorder]:
    """Tag every whole number above one, and give the old ones back in the end."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for path, holder, is_config in holders(model):
            own = vars(holder)
            new = {key: _tag(value, path, key, is_config) for key, value in own.items() if not key.startswith("_")}
            changed = {key: own[key] for key, value in new.items() if value is not own[key]}
            kept.append((own, changed))
            own.update({key: new[key] for key in changed})
        recorder = Recorder()
        hooks = [m.register_forward_hook(recorder.note_output(path)) for path, m in model.named_modules()]
        try:
            with recorder:
                yield recorder
        finally:
            for hook in hooks:
                hook.remove()
    finally:
        for own, changed in kept:
            own.update(changed)


def _tag(value: Any, owner: str, name: str, is_config: bool) -> Any:
    if type(value) is int and value > 1:
        return Tagged(value, Attribute(owner, name, None, is_config))
    if type(value) in (list, tuple) and any(type(x) is int and x > 1 for x in value):
        return type(value)(
            Tagged(x, Attribute(owner, name, i, is_config)) if type(x) is int and x > 1 else x
            for i, x in enumerate(value)
        )
    return value


def read(holder: Any, attribute: Attribute) -> int:
    """The number that an attribute has."""
    value = vars(holder)[attribute.name]
    return int(value if attribute.item is None else value[attribute.item])


def write(holder: Any, attribute: Attribute, value: int) -> None:
    """Give an attribute another number; lists and tuples are replaced, since others may share them."""
    if attribute.item is None:
        setattr(holder, attribute.name, value)
        return
    old = vars(holder)[attribute.name]
    new = [value if i == attribute.item else x for i, x in enumerate(old)]
    setattr(holder, attribute.name, type(old)(new))
