"""Weights that a mask may thin out: which tensors are multiplied with activations, and as which matrices.

No trace is needed: modules of PyTorch and Hugging Face say it themselves, and what other parameters are is seen in one
forward pass. So masks work on models that `discover` cannot follow.
"""

import fnmatch
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from secateur.errors import SecateurError, nearest
from secateur.load.mode import evaluating
from secateur.space.products import Dims, Product, Products, Span, plain_attention
from secateur.space.trace import Inputs, arguments

Part = tuple[Span, ...]
"""For each dimension of a tensor the range of it."""
_LEAF = re.compile(r"weight|(in|[qkv])_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?")
"""How modules of torch.nn name what they multiply with."""
_CHOOSING = tuple(getattr(torch.ops.aten, name) for name in ("topk", "sort", "argmax", "max"))


@dataclass(frozen=True)
class Weight:
    """A tensor that activations are multiplied with, and which matrices it holds.

    Attributes:
        name: Of the parameter.
        shape: Of the tensor.
        rows: Its dimensions that number outputs.
        columns: Its dimensions that are summed over; the innermost last, which N:M groups run along.
        groups: Dimension 0 holds so many matrices one after another (grouped convolutions).
    """

    name: str
    shape: tuple[int, ...]
    rows: Dims
    columns: Dims
    groups: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def channels(self) -> int:
        """Length of the innermost dimension that is summed over, in one group."""
        last = self.columns[-1]
        return self.shape[last] // (self.groups if last == 0 else 1)

    def parts(self) -> list[Part]:
        """The matrices that the tensor holds: one, or one for each group or for each of a stack (experts)."""
        ranges: list[list[Span]] = []
        for d, length in enumerate(self.shape):
            if d == 0 and self.groups > 1:
                step = length // self.groups
                ranges.append([(i * step, (i + 1) * step) for i in range(self.groups)])
            elif d in self.rows or d in self.columns:
                ranges.append([(0, length)])
            else:
                ranges.append([(i, i + 1) for i in range(length)])
        return [tuple(part) for part in itertools.product(*ranges)]

    def matrix(self, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        """A part of a tensor of this shape as a matrix [rows, columns]; a copy unless it is one already."""
        own = self._ordered(tensor, part)
        return own.reshape(own.shape[: len(self.rows)].numel(), -1)

    def put(self, tensor: torch.Tensor, part: Part, matrix: torch.Tensor) -> None:
        """Write a matrix into its part of the tensor."""
        own = self._ordered(tensor, part)
        own.copy_(matrix.reshape(own.shape))

    def _ordered(self, tensor: torch.Tensor, part: Part) -> torch.Tensor:
        own = tensor[tuple(slice(a, b) for a, b in part)]
        rest = [d for d in range(tensor.dim()) if d not in self.rows and d not in self.columns]
        own = own.permute(*self.rows, *self.columns, *rest)
        return own.reshape(own.shape[: len(self.rows) + len(self.columns)]) if rest else own


@dataclass(frozen=True)
class Weights:
    """The maskable weights of a model, and what of it is left alone."""

    chosen: tuple[Weight, ...]
    left: Mapping[str, str]
    """Tensors of two dimensions or more that are not masked -> why."""

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.chosen)

    def __len__(self) -> int:
        return len(self.chosen)


def maskable(
    model: nn.Module, inputs: Inputs = None, *, only: Sequence[str] = (), ignore: Sequence[str] = ()
) -> Weights:
    """Find the weights that a mask may thin out.

    Embeddings, norms, routers and the projection to the vocabulary are left alone; a classifier's last layer is a layer
    as any other. Parameters that no known module owns (stacked experts, attention written out) are found in one forward
    pass, if there are inputs; so are routers that are linear layers.

    Args:
        model: any module.
        inputs: arguments of one forward pass; None = those of a Hugging Face model, if it has parameters that only a
            forward pass explains.
        only: names of weights or modules, or patterns (``*.mlp.*``), to which masks are confined; all by default. Only
            by name are routers and the projection to the vocabulary masked.
        ignore: the same, of what is left dense.

    Raises:
        SecateurError: for a pattern that matches nothing, and where nothing is left to mask.
    """
    only, ignore = ([given] if isinstance(given, str) else given for given in (only, ignore))
    owners = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    aliases: dict[str, list[str]] = {name: [] for name in parameters}
    for alias, parameter in model.named_parameters(remove_duplicate=False):
        aliases[owners[id(parameter)]].append(alias)
    found = {owners[id(p)]: replace(weight, name=owners[id(p)]) for p, weight in _known(model)}
    left = {name: "no product with it is known" for name, p in parameters.items() if p.dim() > 1 and name not in found}
    known_not = _known_not(model, owners)
    unknown = [name for name in left if name not in known_not and parameters[name].is_floating_point()]
    seen: dict[str, Weight] = {}
    if inputs is not None or ((unknown or _has_experts(model)) and _from_transformers(model)):
        seen, routers = _probe(model, inputs, parameters)
        known_not |= dict.fromkeys(routers, "a router")
    found |= {name: weight for name, weight in seen.items() if name in unknown}
    every = {**seen, **found}
    named = {name: weight for name, weight in every.items() if any(_matches(a, only) for a in aliases[name])}
    found = {name: weight for name, weight in found.items() if name not in known_not}
    chosen = named if only else found
    for pattern in [*only, *ignore]:  # what is left alone anyway may be named too
        matching([alias for name in {**every, **known_not} for alias in aliases[name]], pattern)
    ignored = {name for name in chosen if any(_matches(alias, ignore) for alias in aliases[name])}
    order = {name: place for place, name in enumerate(parameters)}
    result = tuple(chosen[name] for name in sorted(chosen, key=order.__getitem__) if name not in ignored)
    if not result:
        raise SecateurError(f"{type(model).__name__} has no weight to mask: give inputs, or fewer ignore and only")
    kept = {w.name for w in result}
    left = {
        n: known_not.get(n) or left.get(n) or "left out" for n, p in parameters.items() if p.dim() > 1 and n not in kept
    }
    left |= dict.fromkeys(ignored, "ignored")
    return Weights(result, left)


def _known(model: nn.Module) -> Iterator[tuple[nn.Parameter, Weight]]:
    """Weights whose meaning the class of their module tells."""
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            form = _form(module, leaf, parameter)
            if form is not None:
                yield parameter, Weight("", tuple(parameter.shape), *form)


def _form(module: nn.Module, leaf: str, parameter: nn.Parameter) -> tuple[Dims, Dims, int] | None:
    """(rows, columns, groups) of a parameter."""
    if parameter.dim() < 2 or not _LEAF.fullmatch(leaf):
        return None
    spatial = tuple(range(2, parameter.dim()))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return (1,), (*spatial, 0), module.groups
    if isinstance(module, nn.modules.conv._ConvNd):
        return (0,), (*spatial, 1), module.groups
    if isinstance(module, nn.Linear | nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase):
        return (0,), (1,), 1
    if isinstance(module, nn.Bilinear):
        return (0,), (1, 2), 1
    transposed = type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
    return ((1,), (0,), 1) if transposed else None


def _known_not(model: nn.Module, owners: Mapping[int, str]) -> dict[str, str]:
    """Parameters that are not masked unless asked for -> why."""
    found = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[owners[id(module.weight)]] = "an embedding"
    ask: Any = getattr(model, "get_output_embeddings", None)
    weight = getattr(ask() if ask is not None else None, "weight", None)
    if isinstance(weight, nn.Parameter):
        found.setdefault(owners[id(weight)], "the projection to the vocabulary")
    return found


def _from_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "to_dict")


def _has_experts(model: nn.Module) -> bool:
    """Whether the config of a Hugging Face model counts experts; a router may then be a linear layer as any other."""
    config: Any = getattr(model, "config", None)
    nested = [config.to_dict()] if _from_transformers(model) else []
    for one in nested:
        nested += [value for value in one.values() if isinstance(value, dict)]
    return any("expert" in str(key) and isinstance(v, int) and v > 1 for one in nested for key, v in one.items())


def _probe(
    model: nn.Module, inputs: Inputs, parameters: Mapping[str, torch.Tensor]
) -> tuple[dict[str, Weight], set[str]]:
    """What one forward pass multiplies with, and whose results a choice of the largest (topk) is made from."""
    found: dict[str, Weight] = {}

    def see(product: Product) -> None:
        found.setdefault(product.weight, _weight_of(product, parameters[product.weight]))

    positional, named = arguments(model, inputs)
    watch = _Routers({name: p for name, p in parameters.items() if p.dim() > 1}, see)
    with evaluating(model), torch.no_grad(), plain_attention(), watch:
        try:
            model(*positional, **named)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:  # the user's model on the user's inputs
            text = " ".join(str(error).split())
            raise SecateurError(f"{type(model).__name__} does not run on the inputs: {text[:300]}") from error
    return found, watch.routers


def _weight_of(product: Product, parameter: torch.Tensor) -> Weight:
    groups = 1
    if (
        product.rows
        and len(product.columns) + len(product.rows) == parameter.dim()
        and product.part[0] != (0, parameter.shape[0])
    ):
        whole = parameter.shape[0]
        first, last = product.part[0]
        groups = whole // (last - first) if 0 in product.columns else 1
    return Weight(product.weight, tuple(parameter.shape), product.rows, product.columns, groups)


def multiplied(model: nn.Module, forward: Callable[[], object]) -> dict[str, Weight]:
    """Every weight that a forward pass multiplies activations with, routers and tied ones too, in the order of use.

    Args:
        model: any module.
        forward: makes the pass.
    """
    owners = {id(p): name for name, p in model.named_parameters()}
    parameters = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    found: dict[str, Weight] = {}

    def see(product: Product) -> None:
        found.setdefault(product.weight, _weight_of(product, parameters[product.weight]))

    with evaluating(model), torch.no_grad(), plain_attention(), Products(parameters, see):
        forward()
    known = {owners[id(p)]: replace(weight, name=owners[id(p)]) for p, weight in _known(model)}
    return {name: known.get(name, weight) for name, weight in found.items()}


class _Routers(Products):  # type: ignore[no-untyped-call]
    """Also remembers which results come from which weight, until the largest are chosen from one."""

    def __init__(self, weights: Mapping[str, torch.Tensor], see: Any) -> None:
        super().__init__(weights, see)
        self.made: Any = WeakIdKeyDictionary()
        self.routers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, and tell where its result comes from."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if func.overloadpacket in _CHOOSING:
            self.routers |= {self.made[x] for x in tensors if x in self.made}
        elif isinstance(result, torch.Tensor):
            weight = next((found[0] for x in tensors if (found := self._of(x)) and len(tensors) > 1), None)
            same = {self.made[x] for x in tensors if x in self.made and x.numel() == result.numel()}
            source = weight if weight is not None else next(iter(same)) if len(same) == 1 else None
            if source is not None:
                self.made[result] = source
        return result


def blocks_of(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Weight -> its block: the outermost member of a list of modules, else what is around its module."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    members = [f"{path}.{name}".lstrip(".") for path, module in lists for name, _ in module.named_children()]
    found = {}
    for name in names:
        inside = next((path for path in members if name.startswith(f"{path}.")), None)
        owner = name.rpartition(".")[0]
        found[name] = inside or owner.rpartition(".")[0] or owner or name
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern is the name of a weight or of a module around it, or fits one."""
    around = [name.rsplit(".", k)[0] for k in range(name.count(".") + 1)]
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns for path in around)


def matching(names: Sequence[str], pattern: str) -> list[str]:
    """The weights that a pattern means.

    Raises:
        SecateurError: for one that matches nothing.
    """
    found = [name for name in names if _matches(name, [pattern])]
    if not found:
        around = {name.rsplit(".", k)[0] for name in names for k in range(name.count(".") + 1)}
        parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
        known = parts if "*" in pattern else around
        raise SecateurError(f"the pattern {pattern!r} matches no weight{nearest(pattern.strip('*.'), known)}")
    return found
