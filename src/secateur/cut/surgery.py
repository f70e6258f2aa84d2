"""Cut a model in place of rebuilding it: for cuts that no stock config describes, and models that have none."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from secateur.choose.plan import Plan
from secateur.cut.attributes import followed, look_alikes
from secateur.cut.config import FIELDS, config_of, cut_lists, field_of, sizes_of
from secateur.cut.names import new_name, renumbered
from secateur.cut.verify import mismatch
from secateur.errors import SecateurError
from secateur.load.megatron import Opened
from secateur.load.modeling_secateur import Idle, RemovedSublayer, SizedAttention
from secateur.space import Block, Space
from secateur.space.provenance import Attribute, holders, read, write
from secateur.space.trace import Inputs

_NUMBERS = ("layer_idx", "layer_index", "layer_id")
"""Attributes that say which layer a module is in."""


def operate(
    model: nn.Module, plan: Plan, space: Space, tensors: Mapping[str, torch.Tensor], inputs: Inputs
) -> nn.Module:
    """A copy of `model` with the given tensors in place of its own, and attributes that agree with them.

    Which attributes the forward pass reads, and for which sizes, is known from the trace of the dense model. The
    others follow where they can mean one thing only, so that what prints or rebuilds the model sees the new sizes.

    Raises:
        SecateurError: where the trace of the result is not as predicted; says what differs.
    """
    new = with_tensors(model, tensors)
    free = _free_attentions(new, plan, space)
    removed = [b for b in space.blocks if b.name in plan.dropped and b.kind != "layers"]
    _remove_sublayers(new, removed)
    _drop_layers(new, plan, space)
    if not isinstance(new, Opened):
        _set_config_sizes(new, plan, space)
    moved = renumbered(space, plan)
    needed = followed(model, plan, space, free)
    _assign(new, needed, moved)
    others = {} if isinstance(new, Opened) else look_alikes(model, plan, space, free)
    before = _assign(new, {k: v for k, v in others.items() if k not in needed}, moved)
    if isinstance(new, Opened):
        new.fit()  # it knows what its numbers mean
    wrong = mismatch(new, plan, space, inputs, free)
    if wrong is not None and before:  # one of the others meant something else
        _assign(new, before, moved)
        wrong = mismatch(new, plan, space, inputs, free)
    if wrong is not None:
        raise SecateurError(f"{type(model).__name__} cannot be cut as planned: {wrong}")
    return new


def _assign(new: nn.Module, values: Mapping[Attribute, int], moved: dict[str, str | None]) -> dict[Attribute, int]:
    """Set attributes; returns what they were."""
    owners = {(path, is_config): holder for path, holder, is_config in holders(new)}
    before: dict[Attribute, int] = {}
    for attribute, value in values.items():
        path = attribute.owner if attribute.is_config else new_name(attribute.owner, moved)
        holder = owners.get((str(path), attribute.is_config))
        if holder is None or attribute.name not in vars(holder) or attribute.name in _NUMBERS:
            continue
        if read(holder, attribute) != value:
            before[attribute] = read(holder, attribute)
            write(holder, attribute, value)
    return before


def with_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Deep copy in which every tensor is replaced; tied ones are replaced by the same."""
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = nn.Parameter(tensors.get(name, torch.empty(0)), parameter.requires_grad)
        noted = {key: value for key, value in vars(parameter).items() if not key.startswith("_")}
        vars(memo[id(parameter)]).update(noted)  # Megatron's parameters say how they are sharded
    for name, buffer in model.named_buffers():
        if name in tensors:
            memo[id(buffer)] = tensors[name]
    return copy.deepcopy(model, memo)


def _free_attentions(new: nn.Module, plan: Plan, space: Space) -> list[str]:
    """nn.MultiheadAttention has one number for the size of its input and of its heads: let the two differ.

    Returns:
        Paths of the attentions that are cut.
    """
    cut: dict[str, float] = {}
    for name, kept in plan.kept.items():
        axis = space.axis(name)
        projections = [p.parameter for p in axis.slices if p.dim == 0 and axis.kind == "heads"]
        for path in {p.parameter.rpartition(".")[0].removesuffix(".out_proj") for p in axis.slices}:
            made = {f"{path}.in_proj_weight", f"{path}.q_proj_weight"}.intersection(projections)
            cut[path] = cut.get(path, 1.0) * (len(kept.units) / kept.size if made else 1.0)
    found = []
    for path, module in list(new.named_modules()):
        if isinstance(module, nn.MultiheadAttention) and path in cut:
            sized = SizedAttention.of(module) if type(module) is nn.MultiheadAttention else module
            new.set_submodule(path, sized)
            sized.num_heads = round(module.num_heads * cut[path])
            found.append(path)
    return found


def _remove_sublayers(new: nn.Module, blocks: list[Block]) -> None:
    for block in blocks:
        structure = block.output
        _, *others = pytree.tree_leaves(structure)
        if any(other is not None for other in others):  # attention weights: there are none any more
            structure = (structure[0], *(None for _ in structure[1:]))
        index = getattr(new.get_submodule(block.name), "layer_idx", None) if block.kind == "attention" else None
        new.set_submodule(block.name, RemovedSublayer(structure, index))
        for idle in block.idle:
            new.set_submodule(idle, Idle())


def _drop_layers(new: nn.Module, plan: Plan, space: Space) -> None:
    for stack, gone in space.gone_layers(plan.dropped).items():
        if not any(gone):
            continue
        layers = new.get_submodule(stack)
        kept = [(i, module) for i, (module, out) in enumerate(zip(layers.children(), gone, strict=True)) if not out]
        for index, (before, kept_layer) in enumerate(kept):
            for module in kept_layer.modules():
                for name, value in vars(module).items():
                    if name in _NUMBERS and value == before:
                        setattr(module, name, index)
        new.set_submodule(stack, type(layers)(*_as_one(layers, [module for _, module in kept])))
        own = config_of(new, stack)
        for part in (holder for path, holder, is_config in holders(new) if is_config and path == own):
            for key, value in cut_lists(vars(part), gone).items():
                setattr(part, key, value)


def _as_one(layers: nn.Module, kept: list[nn.Module]) -> Iterator[Any]:
    """What the constructor of a list or a sequence takes."""
    if isinstance(layers, nn.ModuleList):
        yield kept
    else:
        yield from kept


def _set_config_sizes(new: nn.Module, plan: Plan, space: Space) -> None:
    """Sizes that all layers still share go into the config: some forward passes read them there (Phi-3)."""
    config = getattr(new, "config", None)
    before, after = sizes_of(space), sizes_of(space, plan)
    for kind in FIELDS if config is not None else ():
        name, size = field_of(config, kind, before.get(kind)), after.get(kind)
        if name is not None and size is not None and size != before.get(kind):
            setattr(config, name, size)
