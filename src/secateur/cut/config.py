"""What a Hugging Face config calls the sizes, and which config describes a cut model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.choose.plan import Plan
from secateur.errors import SecateurError, nearest
from secateur.space import Space, evaluate

# Names of one size over the configs of the field, first match wins; Minitron's own names come last.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_groups": ("num_key_value_heads", "num_kv_heads", "num_query_groups"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers share, by kind; heads are counted over all groups."""

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_groups: int | None = None
    layers: int | None = None

    def get(self, kind: str) -> int | None:
        """Size of a kind, None where the model has none or its layers differ."""
        size: int | None = getattr(self, kind)
        return size


def field_of(config: Any, kind: str) -> str | None:
    """The config's own name for the size of a kind (GPT-2 stores hidden_size as n_embd)."""
    name = next((name for name in FIELDS[kind] if hasattr(config, name)), None)
    return None if name is None else str(getattr(config, "attribute_map", {}).get(name, name))


def kind_of(config: Any, name: str) -> str:
    """The kind that a config integer, or Minitron's name for it, sets.

    Raises:
        SecateurError: for a name that is none of them; names the nearest.
    """
    own = {field_of(config, kind): kind for kind in FIELDS}
    for kind, names in FIELDS.items():
        if name in (*names, kind, field_of(config, kind)):
            return kind
    known = [n for n in own if n] + ["ffn_hidden_size", "num_query_groups", "num_layers"]
    raise SecateurError(f"dims: the config has no size {name!r}{nearest(name, known)}")


def sizes_of(space: Space, plan: Plan | None = None) -> Sizes:
    """The sizes of a model, or of what a plan makes of it; None where layers differ."""
    plan = plan or Plan()
    found: dict[str, int | None] = {}
    for kind in ("hidden", "ffn", "heads", "kv_groups"):
        values = set()
        for axis in space.of_kind(kind):
            if axis.block not in plan.dropped:
                values.add(_kept_size(space, plan, axis.name))
        found[kind] = values.pop() if len(values) == 1 else None
    stacks = list(space.gone_layers(plan.dropped).values())
    found["layers"] = stacks[0].count(False) if len(stacks) == 1 else None
    return Sizes(**found)


def _kept_size(space: Space, plan: Plan, name: str) -> int:
    axis = space.axis(name)
    kept = plan.kept.get(name)
    size = axis.size if kept is None else len(kept.units)
    if axis.parent is not None:
        # Heads of a group that goes, go with it.
        groups = plan.kept.get(axis.parent)
        size = size // axis.groups * (axis.groups if groups is None else len(groups.units))
    return size


def cut_config(config: Any, space: Space, plan: Plan) -> Any:
    """The stock config of a cut model, or None where no setting of its sizes can describe the cut.

    Raises:
        SecateurError: where the config class itself rejects the sizes; the message is the class's own.
    """
    before, after = sizes_of(space), sizes_of(space, plan)
    if any(before.get(kind) is not None and after.get(kind) is None for kind in FIELDS):
        return None
    if any(block.name in plan.dropped and block.kind != "layers" for block in space.blocks):
        return None
    if len(space.stacks) > 1 and any(any(gone) for gone in space.gone_layers(plan.dropped).values()):
        return None  # each list of layers has a number of its own
    return resized_config(config, before, after, next(iter(space.gone_layers(plan.dropped).values()), []))


def resized_config(config: Any, before: Sizes, after: Sizes, gone: Sequence[bool]) -> Any:
    """The config with other sizes; None where it has no name for one of them.

    Args:
        config: the dense model's.
        before: its sizes.
        after: the sizes to set.
        gone: for each layer, whether it is dropped.

    Raises:
        SecateurError: where the config class itself rejects the sizes.
    """
    changed = {kind: after.get(kind) for kind in FIELDS if before.get(kind) != after.get(kind)}
    head_dim = getattr(config, "head_dim", None) or _implied_head_dim(config)
    values = copy.deepcopy(config).to_dict()
    for kind, size in changed.items():
        name = field_of(config, kind)
        if name is None:
            return None
        values[name] = size
        if kind == "heads" and before.kv_groups is None and hasattr(config, "num_key_value_heads"):
            values["num_key_value_heads"] = size
    ffn = field_of(config, "ffn")
    if ffn is not None and values.get(ffn, 0) is None:
        values[ffn] = after.ffn  # GPT-2 derives it from the hidden size where it is not said
    if {"hidden", "heads"} & set(changed) and head_dim is not None and _takes_head_dim(config):
        values["head_dim"] = head_dim
    if "layers" in changed:
        values |= cut_lists(values, gone)
    values.pop("transformers_version", None)
    return build_config(config, values)


def describes(model: nn.Module, space: Space, sizes: Sizes) -> bool:
    """Whether the stock class can be configured to these sizes, tried on one layer and on meta tensors.

    GPT-2's config cannot set a head dimension, so its hidden size and heads must be cut together; Llama's rejects a
    hidden size that its heads do not divide.
    """
    layers = space.layers()
    gone = [i > 0 for i in range(len(layers))]
    one_layer = replace(sizes, layers=1 if layers else sizes.layers)
    try:
        config = resized_config(model.config, sizes_of(space), one_layer, gone)
        if config is None:
            return False
        with torch.device("meta"):
            skeleton = type(model)(config)
    except (SecateurError, ValueError):
        return False  # the class says no to such sizes: that is the answer to the question
    groups = sizes.kv_groups or 1
    lengths = {"hidden": sizes.hidden, "ffn": sizes.ffn, "kv_groups": sizes.kv_groups}
    lengths["heads"] = None if sizes.heads is None else sizes.heads // groups
    at = {axis.name: lengths.get(axis.kind) or axis.per_group for axis in space.axes}
    parameters = dict(skeleton.named_parameters())
    return all(
        name in space.parameters and tuple(p.shape) == tuple(int(evaluate(d, at)) for d in space.parameters[name].dims)
        for name, p in parameters.items()
    )


def build_config(config: Any, values: Mapping[str, Any]) -> Any:
    """A config of the same class with other values.

    Raises:
        SecateurError: with the class's own words, where it rejects them.
    """
    try:
        new = type(config).from_dict(dict(values))
    except Exception as error:  # huggingface_hub's strict dataclasses raise types of their own
        text = " ".join(str(error).split())
        raise SecateurError(f"{type(config).__name__} rejects these sizes: {text}") from error
    for name in ("_attn_implementation", "_name_or_path"):
        if getattr(config, name, None) is not None:
            setattr(new, name, getattr(config, name))
    return new


def with_head_dim(config: Any) -> Any:
    """A copy that says its head_dim, where the class takes one: it may then differ from hidden / heads."""
    new = copy.deepcopy(config)
    if _takes_head_dim(config) and getattr(config, "head_dim", None) is None:
        head_dim = _implied_head_dim(config)
        if head_dim is not None:
            vars(new)["head_dim"] = head_dim
    return new


def _implied_head_dim(config: Any) -> int | None:
    hidden, heads = (getattr(config, field_of(config, kind) or "", None) for kind in ("hidden", "heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _takes_head_dim(config: Any) -> bool:
    """Models read an explicit head_dim wherever their config knows one, or knows grouped keys (Phi-3)."""
    return hasattr(config, "head_dim") or hasattr(config, "num_key_value_heads")


def cut_lists(values: Mapping[str, Any], gone: Sequence[bool]) -> dict[str, Any]:
    """Lists of a config that speak of layers, after some are dropped.

    A list with one entry for each layer (layer_types...) loses theirs; a list of layer numbers is renumbered.
    """
    kept = [i for i, out in enumerate(gone) if not out]
    cut: dict[str, Any] = {}
    for key, value in values.items():
        if "layer" not in str(key) or not isinstance(value, list) or not value:
            continue
        if _are_layer_numbers(value, len(gone)):
            cut[key] = [kept.index(i) for i in value if i in kept]
        elif len(value) == len(gone):
            cut[key] = [value[i] for i in kept]
    return cut


def _are_layer_numbers(value: list[Any], layers: int) -> bool:
    """Ascending whole numbers below the number of layers, and not one flag of 0 or 1 for each layer."""
    numbers = all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    ascending = numbers and value == sorted(set(value)) and value[0] >= 0 and value[-1] < layers
    return ascending and not (len(value) == layers and set(value) <= {0, 1})
