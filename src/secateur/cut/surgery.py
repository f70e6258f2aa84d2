"""Cut a model in place of rebuilding it: for cuts that no stock config describes."""

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.cost import lengths
from secateur.choose.plan import Plan
from secateur.cut.config import FIELDS, cut_lists, field_of, sizes_of
from secateur.cut.names import new_name, renumbered
from secateur.cut.verify import literal_mismatch
from secateur.errors import SecateurError
from secateur.load.mode import evaluating
from secateur.space import Block, Space, evaluate
from secateur.space.trace import example_inputs

# Integers that a module keeps of its own weight's shape: attribute -> dimension of `weight`.
_SHAPE_ATTRIBUTES: Mapping[str, Mapping[str, int]] = {
    "Linear": {"out_features": 0, "in_features": 1},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "Conv1D": {"nx": 0, "nf": 1},
}
_MOST_TRIALS = 64
_NUMBERS = ("layer_idx", "layer_index", "layer_id")
"""Attributes that say which layer a module is in."""


class RemovedSublayer(nn.Module):
    """Stands in for a dropped attention or MLP: adds nothing to the residual stream, has no parameters.

    A dropped attention still counts positions in the KV cache, with one head of one number (an empty one counts as no
    position): models ask their first layer how long the past is.
    """

    def __init__(self, output: Any, layer_idx: int | None = None) -> None:
        """Remember the structure of the output: tensors like the input become zeros, the rest None."""
        super().__init__()
        self.layer_idx = layer_idx
        self.leaves, self.structure = pytree.tree_flatten(output)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the input's shape, where the sub-layer's own result stood."""
        cache = next((x for x in (*args, *kwargs.values()) if hasattr(x, "get_seq_length")), None)
        if cache is not None and self.layer_idx is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        zeros = [torch.zeros_like(hidden_states) if isinstance(x, str) else None for x in self.leaves]
        return pytree.tree_unflatten(zeros, self.structure)


def operate(
    model: nn.Module,
    plan: Plan,
    space: Space,
    tensors: Mapping[str, torch.Tensor],
    inputs: Mapping[str, Any] | None,
) -> nn.Module:
    """A copy of `model` with the given parameters in place of its own, and attributes that agree with them.

    Integers that its Python code reads are found through the graph: an attribute of a module that equals an integer
    which this module's code put into the graph follows the size behind it. Where several sizes were equal before the
    cut, the combinations are tried, and the one is kept whose trace is as predicted.

    Raises:
        SecateurError: where no combination gives the predicted trace.
    """
    new = _copy(model, tensors)
    removed = [b for b in space.blocks if b.name in plan.dropped and b.kind != "layers"]
    _remove_sublayers(model, new, removed, inputs)
    _drop_layers(new, plan, space)
    _set_shape_attributes(new)
    _set_config_sizes(new, plan, space)
    choices = _choices(new, plan, space)
    trials = list(itertools.islice(itertools.product(*choices.values()), _MOST_TRIALS + 1))
    if len(trials) > _MOST_TRIALS:
        raise SecateurError(f"{type(model).__name__}: more than {_MOST_TRIALS} ways to update its attributes")
    wrong: str | None = None
    for other_path, trial in itertools.product((False, True), trials):
        for (_, _, old), meanings in choices.items():  # nothing of the trial before stays
            for change in meanings:
                _set(new, [(module, attribute, old) for module, attribute, _ in change])
        for change in trial:
            _set(new, change)
        wrong = literal_mismatch(new, plan, space, inputs, other_path=other_path)
        if wrong is None:
            if not other_path:
                _undo_needless(new, dict(zip(choices, trial, strict=True)), plan, space, inputs)
            return new
    raise SecateurError(f"{type(model).__name__} cannot be cut as planned: {wrong}")


def _set(new: nn.Module, change: Sequence[tuple[str, str, int]]) -> None:
    for module, attribute, value in change:
        setattr(new.get_submodule(module), attribute, value)


def _undo_needless(
    new: nn.Module, changes: Mapping[Any, Any], plan: Plan, space: Space, inputs: Mapping[str, Any] | None
) -> None:
    """Give attributes their old value back where the trace is right with it too: they meant something else."""
    for (_, _, old), change in changes.items():
        _set(new, [(module, attribute, old) for module, attribute, _ in change])
        if literal_mismatch(new, plan, space, inputs) is not None:
            _set(new, change)


def _copy(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Deep copy in which every parameter is replaced; tied ones are replaced by the same."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(tensors.get(name, torch.empty(0)), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _remove_sublayers(model: nn.Module, new: nn.Module, blocks: list[Block], inputs: Mapping[str, Any] | None) -> None:
    outputs: dict[str, Any] = {}

    def remember(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs[name] = pytree.tree_map(lambda x: "tensor" if isinstance(x, torch.Tensor) else None, output)

        return hook

    handles = [model.get_submodule(b.name).register_forward_hook(remember(b.name)) for b in blocks]
    try:
        if blocks:
            with evaluating(model), torch.no_grad():
                model(**(example_inputs(model) if inputs is None else inputs))
    finally:
        for handle in handles:
            handle.remove()
    for block in blocks:
        first, *others = pytree.tree_leaves(outputs[block.name])
        del first
        structure = outputs[block.name]
        if any(other is not None for other in others):  # attention weights: there are none any more
            structure = (structure[0], *(None for _ in structure[1:]))
        index = getattr(new.get_submodule(block.name), "layer_idx", None) if block.kind == "attention" else None
        new.set_submodule(block.name, RemovedSublayer(structure, index))
        for idle in block.idle:
            new.set_submodule(idle, nn.Identity())


def _drop_layers(new: nn.Module, plan: Plan, space: Space) -> None:
    stacks: dict[str, list[bool]] = defaultdict(list)
    for layer in space.layers():
        stacks[layer.stack].append(layer.name in plan.dropped)
    for stack, gone in stacks.items():
        if not any(gone):
            continue
        layers = new.get_submodule(stack)
        kept = [(i, module) for i, (module, out) in enumerate(zip(layers.children(), gone, strict=True)) if not out]
        for index, (before, kept_layer) in enumerate(kept):
            for module in kept_layer.modules():
                for name, value in vars(module).items():
                    if name in _NUMBERS and value == before:
                        setattr(module, name, index)
        new.set_submodule(stack, nn.ModuleList(module for _, module in kept))
        for part in _configs(new):
            for key, value in cut_lists(vars(part), gone).items():
                setattr(part, key, value)


def _configs(new: nn.Module) -> list[Any]:
    """The model's config and the configs inside of it."""
    config = getattr(new, "config", None)
    return [] if config is None else [config, *(c for c in vars(config).values() if hasattr(c, "to_dict"))]


def _set_config_sizes(new: nn.Module, plan: Plan, space: Space) -> None:
    """Sizes that all layers still share go into the config: some forward passes read them there (Phi-3)."""
    config = getattr(new, "config", None)
    before, after = sizes_of(space), sizes_of(space, plan)
    for kind in FIELDS if config is not None else ():
        name, size = field_of(config, kind), after.get(kind)
        if name is not None and size is not None and size != before.get(kind):
            setattr(config, name, size)


def _set_shape_attributes(new: nn.Module) -> None:
    for module in new.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        for attribute, dim in _SHAPE_ATTRIBUTES.get(type(module).__name__, {}).items():
            setattr(module, attribute, weight.shape[dim])
        if isinstance(getattr(module, "normalized_shape", None), tuple):
            setattr(module, "normalized_shape", tuple(weight.shape))  # noqa: B010 - mypy knows modules by their tensors


def _choices(new: nn.Module, plan: Plan, space: Space) -> dict[Any, list[Any]]:
    """(module class, attribute, old value) -> possible changes, each a list of (module, attribute, new value)."""
    at, moved = lengths(space, plan), renumbered(space, plan)
    modules = dict(new.named_modules())
    kinds = {axis.name: axis.kind for axis in space.axes}
    table: dict[Any, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for literal in space.literals:
        path = new_name(literal.module, moved)
        module = modules.get(str(path))
        if module is None or isinstance(module, RemovedSublayer):
            continue
        meaning = tuple(sorted((tuple(kinds[n] for n in names), c) for names, c in literal.size.items()))
        after = int(evaluate(literal.size, at))
        for attribute in _integers(module, literal.value):
            table[type(module), attribute, literal.value][meaning].append((path, attribute, after))
    choices = {}
    for key, meanings in table.items():
        if any(value != key[2] for changes in meanings.values() for *_, value in changes):
            choices[key] = list(meanings.values())
    return choices


def _integers(module: nn.Module, value: int) -> Iterator[str]:
    shape = _SHAPE_ATTRIBUTES.get(type(module).__name__, {})
    for name, found in vars(module).items():
        if (
            isinstance(found, int)
            and not isinstance(found, bool)
            and found == value
            and name not in (*shape, *_NUMBERS)
        ):
            yield name
